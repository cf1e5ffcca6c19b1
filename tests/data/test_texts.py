"""Texts without queries: out of every kind of source, into shards, and as batches for language
models."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from drama.data import sharding
from drama.data.manifest import read_manifest
from drama.data.mixture import Mixture
from drama.data.order import LaneOrder
from drama.data.records import Document, Record
from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.shards import merge, to_jsonl, verify
from drama.data.sources import Source, read_source
from drama.data.stream import ShardSet, open_pairs
from drama.data.texts import RankTexts, TextBatch
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


# -- batches --------------------------------------------------------------------------------------

BATCH, LANES, LONGEST = 16, 8, 40


def make_record(number: int) -> Record:
    """Texts of up to about 130 tokens of source b and without one, and pairs of source a. No part
    of a text comes twice."""

    def document(part: int) -> Document:
        return Document(" ".join(f"{number}/{part}/{word}" for word in range(1 + number % 17)))

    if number % 3 == 0:
        positives = tuple(document(part) for part in range(3))
        return Record(f"query {number}", positives, (Document("negative"),), source="a")
    return Record("", (document(0),), source="b" if number % 3 == 1 else "")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("batches")
    records = sorted(map(make_record, range(120)), key=lambda record: record.source)
    write_shards(records, folder / "text", shard_bytes=30_000)
    to_jsonl([folder / "text"], folder / "x.jsonl")
    options = ShardingOptions(
        shard_bytes=60_000, tokenizer=str(model), document_prefix="D: ", max_tokens=1000
    )
    shard_sources([Source(str(folder / "x.jsonl"), "")], folder / "tokens", options)
    return {name: folder / name for name in ("text", "tokens")}


def batches(
    folders: dict[str, Path], model: Path, name: str, mixed: bool = False, **changes: Any
) -> RankTexts:
    shards = ShardSet([folders[name]])
    sizes: dict[str, Any] = {"batch_size": BATCH, "seed": 3, "lanes": LANES, "block": 4}
    order: Any = LaneOrder([len(shards)], window=8, **sizes)
    if mixed:
        order = Mixture(shards.shards, weights={"a": 2, "b": 1}, window=8, **sizes)
    settings = {"rank": 0, "world_size": 1, "seed": 3, "max_tokens": LONGEST}
    prefix = changes.pop("document_prefix", "D: ")
    # the query prefix is another one than that of the shards: no query is read
    encode = TextEncoder(load_tokenizer(model), "another: ", prefix)
    return RankTexts(shards, order, encode, **(settings | changes))


def as_lists(batch: TextBatch) -> list[tuple[Any, ...]]:
    numbers = (part.tolist() for part in (batch.source_B, batch.index_B, batch.epoch_B))
    return list(zip(batch.rows.tolist(), *numbers, strict=True))


def test_stored_token_ids_give_the_same_batches(folders: dict[str, Path], model: Path) -> None:
    stored, text = (batches(folders, model, name) for name in ("tokens", "text"))
    assert (stored.no_tokens, text.no_tokens) == ("", "the shards hold no token ids")
    assert (stored.num_pairs, stored.sources) == (40, ["(none)", "a", "b"])
    for step in range(2 * stored.order.batches_per_epoch):
        assert as_lists(stored[step]) == as_lists(text[step])
        assert stored[step].num_tokens == sum(map(len, stored[step].rows))
    assert "other prefixes" in batches(folders, model, "tokens", document_prefix="").no_tokens
    assert "were cut at 1000" in batches(folders, model, "tokens", max_tokens=1001).no_tokens


def test_rows_are_whole_documents_or_windows_of_them(folders: dict[str, Path], model: Path) -> None:
    made = batches(folders, model, "tokens")
    encode, eos = made.tokenize, made.tokenize.tokenizer.eos_token_id
    starts: dict[int, set[int]] = defaultdict(set)
    drawn: dict[int, set[int]] = defaultdict(set)
    ends = 0
    for step in range(12 * made.order.batches_per_epoch):
        batch = made[step]
        assert len(batch.rows) == BATCH
        for row, source, index, epoch in as_lists(batch):
            record = made.shards.read(index)
            assert made.sources[source] == (record.source or "(none)")
            assert epoch == step // made.order.batches_per_epoch
            texts = [document.full_text for document in record.positives]
            wholes = encode(texts, "document", 10**9)[0]
            places = [
                (number, start)
                for number, whole in enumerate(wholes)
                for start in range(len(whole) - len(row) + 1)
                if whole[start : start + len(row)] == row
            ]
            ((number, start),) = places
            whole = wholes[number]
            assert len(row) == min(len(whole), LONGEST)
            assert row[-1] == eos or len(whole) > LONGEST
            ends += len(whole) > LONGEST and row[-1] == eos
            drawn[index].add(number)
            if len(whole) > 2 * LONGEST:
                starts[index].add(start)
    assert sum(len(numbers) == 3 for numbers in drawn.values()) > 30  # all positives of a pair
    assert np.mean([len(found) for found in starts.values()]) > 5  # another window each epoch
    assert ends  # the last window is drawn too


def test_a_window_is_a_function_of_seed_epoch_and_record(
    folders: dict[str, Path], model: Path
) -> None:
    row = list(range(1000))
    made = batches(folders, model, "text")
    starts = {made._window(row, index, epoch)[0] for index in range(100) for epoch in range(3)}
    assert len(starts) > 200
    assert max(starts) <= 960
    assert made._window(row, 5, 1) == made._window(row, 5, 1)
    assert made._window(row, 5, 1) != batches(folders, model, "text", seed=4)._window(row, 5, 1)
    # numpy keeps the words of Philox, so a run goes on with another version of it
    assert [made._window(row, index, 1)[0] for index in (5, 6, 2**40)] == [866, 207, 13]
    assert [made._window(row[:n], 5, 1) for n in (39, 40)] == [row[:39], row[:40]]
    assert {made._window(row[:41], i, 0)[0] for i in range(50)} == {0, 1}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["text", "tokens"])
def test_a_global_batch_is_the_same_for_any_ranks_and_workers(
    folders: dict[str, Path], model: Path, name: str, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    steps = range(6, 9)  # into the second epoch
    alone = batches(folders, model, name, mixed)
    whole = [sorted(as_lists(alone[step])) for step in steps]
    assert all(len(rows) == BATCH for rows in whole)
    for world in (1, 2, 4):
        for workers in (0, 2) if world < 4 else (0,):
            shares = [
                DataLoader(
                    batches(folders, model, name, mixed, rank=rank, world_size=world),
                    batch_size=None,
                    sampler=steps,
                    num_workers=workers,
                    multiprocessing_context="fork" if workers else None,
                )
                for rank in range(world)
            ]
            for parts, rows in zip(zip(*shares, strict=True), whole, strict=True):
                assert len({len(part.rows) for part in parts}) == 1
                assert sorted(row for part in parts for row in as_lists(part)) == rows


def test_a_mixture_over_texts_keeps_its_shares(folders: dict[str, Path], model: Path) -> None:
    made = batches(folders, model, "tokens", mixed=True)
    counts: Counter[str] = Counter()
    for step in range(60):
        counts.update(made.sources[number] for number in made[step].source_B.tolist())
    assert counts.total() == 60 * BATCH
    for name, share in (("a", 1 / 2), ("b", 1 / 4), ("(none)", 1 / 4)):
        assert abs(counts[name] - share * 60 * BATCH) < 2


def test_rows_without_anything_to_predict_are_left_out(tmp_path: Path, model: Path) -> None:
    tokenizer = load_tokenizer(model)
    write_shards([Record("", (Document(f"text {i}"),)) for i in range(8)], tmp_path / "out")
    shards = ShardSet([tmp_path / "out"])
    order = LaneOrder([8], batch_size=8, seed=0, lanes=1)
    made = RankTexts(
        shards, order, TextEncoder(tokenizer), rank=0, world_size=1, seed=0, max_tokens=4
    )
    rows = [[1], [], [1, 2], [1, 2, 3, 4, 5, 6], [1], [1, 2, 3], [7, 8], [9]]
    made._tokenised = lambda *_: rows  # type: ignore[method-assign]
    batch = pickle.loads(pickle.dumps(made[0]))
    numbers = order.rank_records(0, 0, 1)[0]
    assert [len(row) for row in batch.rows] == [2, 4, 3, 2]
    assert batch.index_B.tolist() == numbers[[2, 3, 5, 6]].tolist()
    assert len(batch.source_B) == len(batch.epoch_B) == 4
    rows[:] = [[1]] * 8
    assert len(made[0].rows) == 0
    with pytest.raises(UserError, match="max_tokens is 1"):
        RankTexts(shards, order, TextEncoder(tokenizer), rank=0, world_size=1, seed=0, max_tokens=1)


def test_a_damaged_text_ends_the_run_or_is_reported(tmp_path: Path, model: Path) -> None:
    write_shards([Record("", (Document(f"text {i}"),)) for i in range(8)], tmp_path / "out")
    tar = tmp_path / "out" / read_manifest(tmp_path / "out").shards[0].file
    content = bytearray(tar.read_bytes())
    content[content.index(b"text 3")] ^= 1
    tar.write_bytes(content)
    settings: dict[str, Any] = {"rank": 0, "world_size": 1, "seed": 0, "max_tokens": 4}
    shards, encode = ShardSet([tmp_path / "out"]), TextEncoder(load_tokenizer(model))
    order = LaneOrder([8], batch_size=8, seed=0, lanes=1)
    with pytest.raises(UserError, match="record 3 "):
        RankTexts(shards, order, encode, **settings)[0]
    batch = RankTexts(shards, order, encode, on_bad="skip", **settings)[0]
    assert [bad.index for bad in batch.bad] == [3]
    assert sorted(batch.index_B.tolist()) == [0, 1, 2, 4, 5, 6, 7]
