"""Crops of the demo's corpus: drawn by seed and content, ranked as numpy ranks, resumable."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from drama.augment import crops as module
from drama.augment.corpus import Corpus, CorpusDocument, content_number
from drama.augment.crops import NO_TEXT, NOTHING_FITS, CropOptions, crop, make_crops
from drama.augment.job import Dropped
from drama.augment.sentences import split_sentences
from drama.augment.teacher import Retrieval
from drama.augment.windows import Windows
from drama.data.beir import read_corpus
from drama.data.records import Document
from drama.data.sources import Source, read_source
from drama.encoder import Encoder
from drama.errors import UserError
from drama.testing import tiny_llama

ROOT = Path(__file__).parents[2]
SCIFACT = ROOT / "data" / "demo" / "scifact"
WINDOWS = Windows(depth=20, positives=(1, 4), negatives=(8, 20))


def drawn(document, **options):
    item = CorpusDocument(0, document, "", "")
    return crop(item, content_number(document), CropOptions(**options))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and a corpus: short texts, a copy, a title, a scrap."""
    folder = tmp_path_factory.mktemp("crops")
    tiny_llama(folder / "model", num_hidden_layers=1)
    documents = [Document(d.text[:400], d.title, d.id) for d in read_corpus(SCIFACT)][:70]
    first = documents[0]
    documents += [
        Document(first.text, first.title, "copy"),
        Document("", "Only a title", "title"),
        Document("Short.", "", "scrap"),
    ]
    rows = [{**document.to_json(), "lang": "en"} for document in documents]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def retrieval(world, work):
    return Retrieval((Source.parse(world / "c.jsonl"),), str(world / "model"), work)


def test_a_crop_is_a_sentence_drawn_by_seed_and_content():
    documents = list(read_corpus(SCIFACT))[:300]
    first = [drawn(document) for document in documents]
    assert first == [drawn(document) for document in documents]
    for document, query in zip(documents, first, strict=True):
        assert query in split_sentences(document.text) or len(query) <= 300
        assert query in " ".join(document.text.split())
        assert 20 <= len(query) <= 300
    other = [drawn(document, seed=1) for document in documents]
    assert sum(a != b for a, b in zip(first, other, strict=True)) > 150
    copy = Document(documents[0].text, documents[0].title, "another id")
    assert drawn(copy) == first[0]


def test_every_sentence_is_drawn_equally_often():
    text = " ".join(f"Sentence number {n} is about bees and honey." for n in range(5))
    document = Document(text)
    counts = Counter(drawn(document, seed=seed) for seed in range(1000))
    assert len(counts) == 5
    assert min(counts.values()) > 150


def test_what_has_no_fitting_sentence_says_why():
    assert drawn(Document("", "A title")) == Dropped(NO_TEXT)
    assert drawn(Document("Too short.")) == Dropped(NOTHING_FITS)
    assert drawn(Document("Bees. Moons."), least=5, most=9) in ("Bees.", "Moons.")
    with pytest.raises(UserError, match="chars 30-20: the lengths must ascend from 1"):
        CropOptions(least=30, most=20)


def test_records_are_the_windows_of_a_brute_force_ranking(world, tmp_path):
    out, work = tmp_path / "out.jsonl", tmp_path / "work"
    report = make_crops(retrieval(world, work), out, CropOptions(WINDOWS))
    assert report["dropped"] == {NO_TEXT: 1, NOTHING_FITS: 1}
    corpus = Corpus(work / "corpus")
    items = list(corpus.read())
    encoder = Encoder.from_pretrained(world / "model")
    vectors = encoder.encode([item.document.full_text for item in items], "document")
    records = list(read_source(out))
    assert len(records) == report["records"] == len(items) - 2
    ranks = Counter()
    for record in records:
        cosines = (vectors @ encoder.encode([record.query], "query")[0]).tolist()
        own = next(n for n, x in enumerate(items) if record.query_id == f"crop:{x.document.id}")
        assert record.query == drawn(items[own].document)
        assert (record.source, record.lang) == ("c", "en")
        by_id = {item.document.id: item.document for item in items}
        documents = [*record.positives, *record.negatives]
        assert all(by_id[document.id] == document for document in documents)
        assert set(record.scores) == {document.id for document in documents}
        number_of = {item.document.id: item.number for item in items}
        for id_, score in record.scores.items():
            assert score == pytest.approx(cosines[number_of[id_]], abs=2e-3)
        # by score: float16 may change the places of neighbours
        order = sorted(cosines, reverse=True)
        scores = [record.scores[document.id] for document in record.positives]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] == pytest.approx(order[0], abs=2e-3)
        assert min(scores) >= order[4] - 2e-3
        for document in record.negatives:
            assert order[20] - 2e-3 <= record.scores[document.id] <= order[6] + 2e-3
        contents = [content_number(document) for document in documents]
        assert len(set(contents)) == len(contents)
        assert content_number(items[own].document) not in contents[len(record.positives) :]
        own_rank = 1 + int(np.sum(np.array(cosines) > cosines[own] + 1e-6))
        ranks["near" if own_rank <= 21 else "deeper"] += 1
    assert abs(ranks["deeper"] - report["own_ranks"].get("deeper", 0)) <= 3


def test_the_own_document_can_be_left_out(world, tmp_path):
    windows = Windows(depth=20, positives=(1, 4), negatives=(8, 20), own="out", share=0.8)
    report = make_crops(
        retrieval(world, tmp_path / "work"), tmp_path / "out.jsonl", CropOptions(windows)
    )
    for record in read_source(tmp_path / "out.jsonl"):
        assert record.query_id.removeprefix("crop:") not in {d.id for d in record.positives}
        lowest = min(record.scores[document.id] for document in record.positives)
        assert all(record.scores[d.id] <= 0.8 * lowest + 1e-6 for d in record.negatives)
    assert report["negatives_left_out"]["scores near the positive"] > 0


def test_the_real_command_killed_goes_on_to_the_same_bytes(world, tmp_path, monkeypatch):
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys, time\n"
        "from drama.augment import crops, job\n"
        "from drama.cli import main\n"
        "crops.BATCH, job.JOURNAL_EVERY_S, run = 10, 0.0, job.Job._take\n"
        "job.Job._take = lambda *rest: (time.sleep(0.02), run(*rest))\n"
        "main(sys.argv[1:])\n"
    )
    out = tmp_path / "out.jsonl.gz"
    command = [sys.executable, "-P", str(driver), "augment", "crops", str(world / "c.jsonl")]
    options = {"--teacher": world / "model", "--out": out, "--work": tmp_path / "work"}
    options |= {"--depth": 20, "--positives": "1-4", "--negatives": "8-20"}
    command += [str(part) for pair in options.items() for part in pair]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    journal = tmp_path / ".out.jsonl.gz.partial" / "journal.json"
    end = time.monotonic() + 120
    while not journal.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the job ended before it could be killed"
    start = json.loads(journal.read_text())["start"]
    assert 0 < start < 70
    assert start % 10 == 0
    monkeypatch.setattr(module, "BATCH", 10)
    source = retrieval(world, tmp_path / "work")
    make_crops(source, out, CropOptions(WINDOWS))
    make_crops(source, tmp_path / "whole.jsonl.gz", CropOptions(WINDOWS))
    assert out.read_bytes() == (tmp_path / "whole.jsonl.gz").read_bytes()
