"""A corpus on disk: all kinds of sources, in a stream and by number."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from drama.augment import corpus as module
from drama.augment.corpus import Draw, Survey, content_number, survey, write_corpus
from drama.data.beir import read_corpus
from drama.data.records import Document, Record
from drama.data.sources import Source
from drama.data.writer import write_shards
from drama.errors import UserError

SCIFACT = Path(__file__).parents[2] / "data" / "demo" / "scifact"
TEXTS = [
    {"text": "Bees store honey.", "title": "Bees", "id": "1", "lang": "en"},
    {"text": "蜜蜂储存蜂蜜。", "lang": "zh"},
    {"text": " "},
    {"text": "", "title": "Only a title"},
    {"text": "BEES  store honey.", "title": "bees", "id": "3"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(folder, *paths, **options):
    return write_corpus([Source.parse(path) for path in paths], folder, **options)


def test_the_demos_corpus_in_a_stream_and_by_number(tmp_path):
    corpus = make(tmp_path / "c", SCIFACT)
    want = list(read_corpus(SCIFACT))
    items = list(corpus.read())
    assert [item.document for item in items] == want
    assert [item.number for item in items] == list(range(len(want))) == list(range(len(corpus)))
    for number in (0, 700, len(want) - 1, 3):
        assert corpus[number] == items[number]
        assert int(corpus.contents[number]) == content_number(want[number])
    assert [item.number for batch in corpus.batches(500, 600) for item in batch] == list(
        range(600, len(want))
    )
    assert {item.source for item in items} == {"scifact"}
    with pytest.raises(IndexError, match="document 1200 of 1200"):
        corpus[len(want)]


def test_every_source_gives_the_same_documents(tmp_path):
    lines = write(tmp_path / "lines.jsonl", TEXTS)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    beir = tmp_path / "beir"
    beir.mkdir()
    write(beir / "corpus.jsonl", [{"_id": str(i), **row} for i, row in enumerate(TEXTS)])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TEXTS), tmp_path / "p.parquet")
    body = [{"body": row["text"], **{k: v for k, v in row.items() if k != "text"}} for row in TEXTS]
    other = write(tmp_path / "other.jsonl", body)
    records = [Record.from_json(row) for row in TEXTS if row["text"].strip() or "title" in row]
    write_shards(records, tmp_path / "shards")
    want = [(r.positives[0].title, r.positives[0].text, r.lang) for r in records]
    for number, (path, options) in enumerate(
        [
            (lines, {}),
            (packed, {}),
            (beir, {}),
            (tmp_path / "p.parquet", {}),
            (tmp_path / "shards", {}),
            (other, {"text_column": "body"}),
        ]
    ):
        corpus = make(tmp_path / f"c{number}", path, **options)
        found = [(x.document.title, x.document.text, x.lang) for x in corpus.read()]
        # shards are grouped by language, so their order is another one
        assert (sorted(found), path) == (sorted(want), path)
        assert corpus.left_out == ({} if path.name == "shards" else {"empty text": 1})
        assert corpus.contents[0] == corpus.contents[len(found) - 1] or path.name == "shards"


def test_plain_text_and_names(tmp_path):
    (tmp_path / "book.txt").write_text("One line\nand more.\n\nAnother document.\n")
    corpus = make(
        tmp_path / "c", f"mine={tmp_path / 'book.txt'}", write(tmp_path / "x.jsonl", TEXTS)
    )
    assert [item.source for item in corpus.read()] == ["mine"] * 2 + ["x"] * 4
    assert corpus[0].document.text == "One line\nand more."


def test_records_with_queries_give_each_document_once(tmp_path):
    rows = [
        {"query": "q", "positives": [{"text": "a"}], "negatives": [{"text": "b"}, {"text": "c"}]},
        {"query": "r", "positives": [{"text": "B "}], "negatives": [{"text": "d"}]},
    ]
    corpus = make(tmp_path / "c", write(tmp_path / "pairs.jsonl", rows))
    assert [item.document.text for item in corpus.read()] == ["a", "b", "c", "d"]


def test_it_is_written_once_and_whole(tmp_path, monkeypatch):
    source = write(tmp_path / "x.jsonl", TEXTS)
    folder = tmp_path / "c"

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(folder, source)
    assert not folder.exists()
    first = make(folder, source)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", lambda *_: pytest.fail("written again"))
        assert make(folder, source).sha256 == first.sha256
    write(source, TEXTS[:2])
    with pytest.raises(UserError, match="c holds the corpus of other sources, or of the same befo"):
        make(folder, source)
    (folder / "corpus.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match="c: a corpus of another version; remove that folder"):
        make(folder, source)


def test_faults_name_file_and_line(tmp_path):
    bad = write(tmp_path / "bad.jsonl", [TEXTS[0], {"text": 3}])
    with pytest.raises(UserError, match=r"bad\.jsonl:2: .*text must be a string"):
        make(tmp_path / "c", bad)
    empty = write(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match=r"empty\.jsonl: no documents to read, or empty ones only"):
        make(tmp_path / "c", empty)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "empty.jsonl"]


def test_one_content_for_copies_only():
    assert content_number(Document("A  b", "T")) == content_number(Document("a b", "t", "other"))
    assert content_number(Document("a b")) != content_number(Document("a c"))


def test_a_draw_takes_so_many_at_random_and_the_same_again(tmp_path):
    source = write(tmp_path / "x.jsonl", [{"text": f"document {n}"} for n in range(300)])
    corpus = make(tmp_path / "a", source, draw=Draw(70, 3))
    found = [int(item.document.text.split()[1]) for item in corpus.read()]
    assert len(found) == len(corpus) == 70
    assert found == sorted(set(found))
    again = make(tmp_path / "b", source, draw=Draw(70, 3))
    assert again.sha256 == corpus.sha256
    assert make(tmp_path / "c", source, draw=Draw(70, 4)).sha256 != corpus.sha256
    assert (
        make(tmp_path / "d", source, draw=Draw(300)).sha256 == make(tmp_path / "e", source).sha256
    )
    with pytest.raises(UserError, match="a holds the corpus of other sources"):
        make(tmp_path / "a", source)
    with pytest.raises(UserError, match=r"x\.jsonl: 301 documents .* are 300; draw 300 at most"):
        make(tmp_path / "f", source, draw=Draw(301))
    assert not (tmp_path / "f").exists()


def test_every_document_is_as_likely_to_be_drawn():
    counts = np.zeros(12)
    for seed in range(6000):
        counts += list(Draw(5, seed).of(12))
    assert counts.sum() == 5 * 6000
    # a binomial share of 5/12: four standard deviations
    assert np.abs(counts / 6000 - 5 / 12).max() < 4 * (5 / 12 * 7 / 12 / 6000) ** 0.5


def test_a_survey_counts_and_samples_without_writing(tmp_path):
    source = [Source.parse(write(tmp_path / "x.jsonl", [{"text": f"{n}"} for n in range(40)]))]
    assert survey(source) == Survey(40)
    assert sorted(int(d.text) for d in survey(source, sample=50).sample) == list(range(40))
    counts = np.zeros(40)
    for seed in range(400):
        found = survey(source, sample=10, seed=seed).sample
        assert len(found) == 10
        counts[[int(document.text) for document in found]] += 1
    assert np.abs(counts / 400 - 0.25).max() < 4.5 * (0.25 * 0.75 / 400) ** 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
