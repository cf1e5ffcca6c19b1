"""Texts without queries: out of every kind of source, and into shards."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from drama.data import sharding
from drama.data.records import Document, Record
from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.shards import merge, to_jsonl, verify
from drama.data.sources import Source, read_source
from drama.data.stream import ShardSet, open_pairs
from drama.data.writer import write_shards
from drama.errors import UserError
from drama.testing import byte_tokenizer
from drama.tokenizer import TextEncoder, load_tokenizer

ROWS = [{"_id": str(i), "title": f"Title {i}", "text": f"Bees, part {i}\nin two lines"}
        for i in range(7)]  # fmt: skip
DOCUMENTS = [Document(row["text"], row["title"], row["_id"]) for row in ROWS]


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def shard(paths: list[Any], out: Path, workers: int = 1, **options: Any) -> sharding.Outcome:
    sources = [Source.parse(path) for path in paths]
    return shard_sources(sources, out, ShardingOptions(**options), workers=workers)


def read_all(folder: Path) -> list[Record]:
    shards = ShardSet([folder])
    return [shards.read(index) for index in range(len(shards))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder)
    return folder


# -- sources --------------------------------------------------------------------------------------


def gzipped(folder: Path) -> Path:
    path = folder / "x.jsonl.gz"
    path.write_bytes(gzip.compress(write(folder / "plain.jsonl", ROWS).read_bytes()))
    return path


def with_more_columns(folder: Path) -> Path:
    return write(folder / "x.jsonl", [row | {"url": f"u{i}", "timestamp": i, "meta": {"a": 1}}
                                      for i, row in enumerate(ROWS)])  # fmt: skip


def array(folder: Path) -> Path:
    (folder / "x.json").write_text(json.dumps(ROWS))
    return folder / "x.json"


def parquet(folder: Path) -> Path:
    rows = [row | {"url": None if i % 2 else "u"} for i, row in enumerate(ROWS)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "x.parquet")
    return folder / "x.parquet"


def saved(folder: Path) -> Path:
    rows = [{"docid": int(row["_id"]), "text": row["text"], "title": row["title"]} for row in ROWS]
    Dataset.from_list(rows).save_to_disk(folder / "x")
    return folder / "x"


def laid_out(folder: Path) -> Path:
    (folder / "x").mkdir()
    parquet(folder).rename(folder / "x" / "train.parquet")
    return folder / "x"


@pytest.mark.parametrize(
    "make", [gzipped, with_more_columns, array, parquet, saved, laid_out], ids=lambda f: f.__name__
)
def test_rows_with_text_are_recognised(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    expected = [Record("", (document,), source="x") for document in DOCUMENTS]
    assert list(read_source(make(tmp_path))) == expected
    assert all(record.is_text for record in expected)


def test_a_beir_folder_gives_its_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", ROWS)
    write(folder / "queries.jsonl", [{"_id": "q", "text": "bees"}])
    (folder / "qrels" / "train.tsv").write_text("q\t0\t1\n")
    shard([folder], tmp_path / "texts", text_column="text")
    assert read_all(tmp_path / "texts") == [Record("", (d,), source="set") for d in DOCUMENTS]
    shard([folder], tmp_path / "pairs")
    (pair,) = read_all(tmp_path / "pairs")
    assert (pair.query, pair.positives) == ("bees", (DOCUMENTS[0],))


def test_a_column_of_any_layout(tmp_path: Path) -> None:
    packages = [{"package": "p", "synopsis": "s", "description": "d d", "title": "T", "lang": "en"}]
    pairs = [{"query": "q", "positives": [{"text": "p"}], "description": "e", "prompt": "P"}]
    paths = [write(tmp_path / "a.jsonl", packages), write(tmp_path / "b.jsonl", pairs)]
    shard(paths, tmp_path / "out", text_column="description")
    assert read_all(tmp_path / "out") == [
        Record("", (Document("d d", "T"),), source="a", lang="en"),
        Record("", (Document("e"),), source="b"),
    ]
    shard(paths[:1], tmp_path / "titles", text_column="title")
    assert read_all(tmp_path / "titles")[0].positives == (Document("T"),)
    for skip in (False, True):
        with pytest.raises(UserError, match=r"a\.jsonl:1: no column 'descripton' .*'description'"):
            shard(paths, tmp_path / "no", text_column="descripton", skip_bad=skip)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_plain_text(tmp_path: Path, suffix: str) -> None:
    import lzma

    pack = {
        "": bytes, ".gz": gzip.compress, ".xz": lzma.compress,
        ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
    }[suffix]  # fmt: skip
    path = tmp_path / f"a.book.txt{suffix}"
    text = '\ufeff\r\n{"query": 1}\r\nähm\r\n\u3000\r\n[two]\r\n\r\n \r\n  three'
    path.write_bytes(pack(text.encode()))
    expected = ['{"query": 1}\nähm', "[two]", "three"]
    for column in (None, "body"):  # a file without columns
        shard([path], tmp_path / "out", text_column=column)
        got = read_all(tmp_path / "out")
        assert got == [Record("", (Document(text),), source="a.book") for text in expected]


def test_plain_text_of_many_documents_and_workers(tmp_path: Path) -> None:
    """The number of documents is a multiple of a chunk's rows, so the file ends with a chunk."""
    texts = [f"document {i}" for i in range(2 * sharding.CHUNK_ROWS)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    for workers in (1, 2):
        shard([tmp_path / "a.txt"], tmp_path / str(workers), workers)
        assert [r.positives[0].text for r in read_all(tmp_path / str(workers))] == texts


def test_bad_texts_are_named_or_skipped(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"good\n\nbad \xff\nline\n\ngood again")
    rows = [{"text": "t"}, {"text": " "}, {"text": 3}, {"body": "x"}, {"text": "t", "title": [1]}]
    lines = write(tmp_path / "b.jsonl", rows)
    with pytest.raises(UserError, match=r"a\.txt:3: invalid UTF-8 in line 1 of the document"):
        shard([plain], tmp_path / "out")
    with pytest.raises(UserError, match=r"b\.jsonl:2: record\.text is empty"):
        shard([lines], tmp_path / "out")
    outcome = shard([plain, lines], tmp_path / "out", 2, skip_bad=True)
    assert outcome.left_out == {"invalid UTF-8": 1, "empty text": 1, "wrong key or type": 3}
    places = [json.loads(line)["where"] for line in (tmp_path / "out/bad.jsonl").open()]
    assert places == [f"{plain}:3", *(f"{lines}:{n}" for n in (2, 3, 4, 5))]
    assert len(read_all(tmp_path / "out")) == 3
    (tmp_path / "c.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"c\.txt holds no records"):
        shard([tmp_path / "c.txt"], tmp_path / "none")


# -- shards ---------------------------------------------------------------------------------------


def many(count: int = 900) -> Iterator[dict[str, Any]]:
    draw = np.random.default_rng(0)
    for i in range(count):
        yield {
            "text": f"{i} " + "bees and honey " * int(draw.integers(1, 40)),
            "lang": ("", "en", "ja")[i % 3],
            "source": "ab"[i % 2],
        }


def test_a_killed_job_goes_on_to_the_same_bytes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = "\n\n".join(row["text"] for row in many())
    (tmp_path / "y.txt").write_text(texts)
    sources = [write(tmp_path / "x.jsonl", list(many())), tmp_path / "y.txt"]
    options = {"shard_bytes": 60_000, "tokenizer": str(model)}
    shard(sources, tmp_path / "whole", 2, **options)
    out = tmp_path / "out"
    pid = os.fork()
    if pid == 0:
        try:
            sharding.JOURNAL_EVERY_S = 0.0
            take, taken = sharding._Job._take, []

            def take_and_die(job: Any, result: Any) -> None:
                take(job, result)
                taken.append(1)
                if len(taken) == 1500:
                    os.kill(os.getpid(), signal.SIGKILL)

            sharding._Job._take = take_and_die  # type: ignore[method-assign]
            shard(sources, out, **options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not out.exists()
    starts, run = [], sharding._Job.run

    def noting(job: Any, *rest: Any) -> None:
        starts.append(job.rows_in_all)
        run(job, *rest)

    monkeypatch.setattr(sharding._Job, "run", noting)
    shard(sources, out, 2, **options)
    assert starts == [900 + 2 * 256]  # in the second source, at the last chunk that was noted
    assert contents(out) == contents(tmp_path / "whole")


def test_another_column_is_another_job(tmp_path: Path) -> None:
    def fingerprint(column: str | None) -> str:
        options = ShardingOptions(text_column=column)
        return sharding._Work.of([Source.parse(path)], options).fingerprint

    path = write(tmp_path / "x.jsonl", ROWS)
    assert len({fingerprint(column) for column in (None, "text", "title")}) == 3


def test_what_a_folder_of_texts_is(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "x.jsonl", list(many()))
    settings = {"query_prefix": "Q: ", "document_prefix": "D: ", "max_tokens": 90}
    shard([source], tmp_path / "out", tokenizer=str(model), **settings)
    manifest = verify(tmp_path / "out")
    assert (manifest.num_records, manifest.num_pairs, manifest.query_chars) == (900, 0, {})
    assert sum(manifest.document_chars.values()) == 900
    assert manifest.counts("source") == {"a": 450, "b": 450}
    assert manifest.counts("lang") == {"": 300, "en": 300, "ja": 300}
    shards, encode = ShardSet([tmp_path / "out"]), TextEncoder(load_tokenizer(model), "Q: ", "D: ")
    for index in range(0, 900, 7):
        record = shards.read(index)
        query, document = (row.tolist() for row in shards.read_tokens(index).rows())
        assert query == []
        assert [document] == encode([record.positives[0].full_text], "document", 90)[0]
    to_jsonl([tmp_path / "out"], tmp_path / "back.jsonl.gz")
    shard([tmp_path / "back.jsonl.gz"], tmp_path / "again", tokenizer=str(model), **settings)
    assert read_all(tmp_path / "again") == read_all(tmp_path / "out")


@pytest.mark.parametrize("text_first", [True, False])
def test_pairs_and_texts_in_one_folder(tmp_path: Path, text_first: bool) -> None:
    pairs = [Record(f"query {i}", (Document("p"),), source="pairs") for i in range(3)]
    texts = [Record("", (Document(f"text {i}", "T"),), source="texts") for i in range(4)]
    write_shards(pairs, tmp_path / "pairs")
    write_shards(texts, tmp_path / "texts")
    folders = [tmp_path / name for name in ("pairs", "texts")]
    merged = merge(folders[::-1] if text_first else folders, tmp_path / "both")
    assert (merged.num_records, merged.num_pairs) == (7, 3)
    verify(tmp_path / "both")
    to_jsonl([tmp_path / "both"], tmp_path / "both.jsonl")
    records = read_all(tmp_path / "both")
    assert list(read_source(tmp_path / "both.jsonl")) == records
    assert sorted(records, key=lambda r: r.source) == pairs + texts


def test_texts_that_come_twice(tmp_path: Path) -> None:
    long = "the bees of the north carry honey over the hills in the early summer"
    rows: list[dict[str, Any]] = [
        {"text": long}, {"text": long.upper()}, {"text": long + "s"}, {"text": "another one"},
    ]  # fmt: skip
    outcome = shard([write(tmp_path / "x.jsonl", rows)], tmp_path / "out")
    assert (outcome.duplicates.exact, outcome.duplicates.near) == (1, 1)
    assert outcome.duplicates.examples == [(long, long + "s")]
    assert outcome.manifest.own_texts == "texts"
    query = {"query": long, "positives": [{"text": "p"}]}  # a query is no copy of a text
    outcome = shard([write(tmp_path / "y.jsonl", [query, rows[0]])], tmp_path / "out")
    assert (outcome.duplicates.exact, outcome.duplicates.near) == (0, 0)
    assert outcome.manifest.own_texts == "queries and texts"
    # what is beyond the compared part does not count, nor take memory
    longer = [{"text": "honey " * 20_000 + end} for end in ("a", "b")]
    assert shard([write(tmp_path / "z.jsonl", longer)], tmp_path / "out").duplicates.near == 1


def test_texts_of_an_evaluation_set_are_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": "1", "title": "Bees", "text": "Honey is stored."},
        {"_id": "2", "text": "x y"},
    ]
    write(folder / "corpus.jsonl", corpus)
    write(folder / "queries.jsonl", [{"_id": "q", "text": "who stores honey"}])
    (folder / "qrels" / "test.tsv").write_text("q\t1\t1\n")
    texts = ["honey is stored", "Bees: honey is stored", "Who stores honey?", "x y", "fresh"]
    source = write(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    outcome = shard([source], tmp_path / "out", decontaminate=(str(folder),))
    assert outcome.left_out == {"in set": 3}
    assert [r.positives[0].text for r in read_all(tmp_path / "out")] == ["x y", "fresh"]


def test_a_retriever_is_not_trained_on_texts(tmp_path: Path) -> None:
    pair, text = Record("q", (Document("p"),)), Record("", (Document("t"),))
    write_shards([pair, pair], tmp_path / "pairs")
    write_shards([pair, text, text], tmp_path / "both")
    assert len(open_pairs([tmp_path / "pairs"])) == 2
    with pytest.raises(UserError, match=r"both: 2 of its 3 records are texts .*recover\.py") as e:
        open_pairs([tmp_path / "pairs", tmp_path / "both"])
    assert "\n" not in str(e.value)
