"""Hard negatives for the demo's pairs, against numpy."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from drama.augment import mine as module
from drama.augment.corpus import Corpus, content_number
from drama.augment.mine import mine
from drama.augment.teacher import Retrieval
from drama.augment.windows import MINING, Windows
from drama.data.records import Document, Record
from drama.data.sources import Source, read_source
from drama.data.writer import write_shards
from drama.encoder import Encoder
from drama.errors import UserError
from drama.testing import tiny_llama

PAIRS = Path(__file__).parents[2] / "data" / "demo" / "pairs.jsonl.xz"
WINDOWS = Windows(depth=30, positives=None, negatives=(3, 12), share=None)


def short(record):
    """The record with documents that a byte tokenizer does not make long."""
    cut = [tuple(Document(d.text[:150], d.title) for d in docs) for docs in
           (record.positives, record.negatives)]  # fmt: skip
    return Record(record.query, *cut, record.query_id, source=record.source, lang=record.lang)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    tiny_llama(folder / "model", num_hidden_layers=1)
    records = [short(record) for record in islice(read_source(PAIRS), 40)]
    twice = records[0].positives[0]
    text = Document(twice.text.upper(), "", "a copy of the first positive")
    lines = [record.to_json() for record in records]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    documents = {d.id: d for r in records for d in (*r.positives[:1], *r.negatives)}
    rows = [document.to_json() for document in [*documents.values(), text]]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_shards(records, folder / "shards")
    return folder


def run(world, out, windows=WINDOWS, pairs=("pairs.jsonl",), corpus=("corpus.jsonl",)):
    sources = [Source.parse(world / name) for name in pairs]
    searched = tuple(Source.parse(world / name) for name in corpus)
    retrieval = Retrieval(searched, str(world / "model"), out.with_suffix(".work"))
    return mine(sources, retrieval, out, windows)


@pytest.mark.parametrize("share", [None, 0.97])
def test_negatives_are_the_window_without_the_positives(world, tmp_path, share):
    windows = Windows(depth=30, positives=None, negatives=(3, 12), share=share)
    report = run(world, tmp_path / "out.jsonl", windows)
    corpus = Corpus(tmp_path / "out.work" / "corpus")
    documents = [item.document for item in corpus.read()]
    (vectors,) = (tmp_path / "out.work").glob("vectors-*/vectors.npy")
    vectors_ND = np.load(vectors).astype(np.float32)
    encoder = Encoder.from_pretrained(world / "model")
    mined = list(read_source(tmp_path / "out.jsonl"))
    given = list(read_source(world / "pairs.jsonl"))
    assert len(mined) == len(given) == report["read"] == report["records"]
    too_near = 0
    for before, after in zip(given, mined, strict=True):
        assert (after.query, after.query_id, after.lang) == (before.query, before.query_id, "en")
        assert after.positives == before.positives
        cosines = vectors_ND @ encoder.encode([after.query], "query")[0]
        texts = encoder.encode([d.full_text for d in before.positives], "document")
        lowest = float((texts @ encoder.encode([after.query], "query")[0]).min())
        copies = {content_number(document) for document in before.positives}
        ranked = [int(n) for n in np.argsort(-cosines, kind="stable")[:30]]
        left = [n for n in ranked if content_number(documents[n]) not in copies][2:12]
        want, seen = [], set()
        for number in left:
            content = content_number(documents[number])
            if content in seen:
                continue
            if share is not None and cosines[number] > share * lowest:
                too_near += 1
                continue
            seen.add(content)
            want.append(documents[number])
        if share is None:
            assert list(after.negatives) == want
        else:  # a score on the border may fall to either side by its rounding
            assert len({d.id for d in after.negatives} ^ {d.id for d in want}) <= 1
        for document in after.negatives:
            assert after.scores[document.id] == pytest.approx(
                float(cosines[documents.index(document)]), abs=1e-4
            )
        for document, vector in zip(after.positives, texts, strict=True):
            score = float(vector @ encoder.encode([after.query], "query")[0])
            assert after.scores[document.id] == pytest.approx(score, abs=2e-3)
    if share is not None:
        assert too_near > 20
        assert abs(report["negatives_left_out"]["scores near the positive"] - too_near) <= 5


def test_shards_of_pairs_and_the_records_own_documents(world, tmp_path):
    run(world, tmp_path / "a.jsonl", pairs=("pairs.jsonl",), corpus=("pairs.jsonl",))
    run(world, tmp_path / "b.jsonl", pairs=("shards",), corpus=("shards",))
    named = {"medquad"}
    a, b = (list(read_source(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    assert a == b
    assert {record.source for record in a} == named
    distinct = {d.id for r in read_source(world / "pairs.jsonl") for d in r.positives + r.negatives}
    assert len(Corpus(tmp_path / "a.work" / "corpus")) == len(distinct)


def test_a_stopped_job_goes_on_in_the_next_source(world, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 16)
    monkeypatch.setattr("drama.augment.job.JOURNAL_EVERY_S", 0.0)
    pairs = ("pairs.jsonl", "shards")
    run(world, tmp_path / "whole.jsonl", pairs=pairs)
    real, calls = module._mined, []

    def stopping(batch, *rest):
        calls.append(len(batch))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_mined", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(world, tmp_path / "out.jsonl", pairs=pairs)
    monkeypatch.setattr(module, "_mined", lambda *rest: calls.append(0) or real(*rest))
    run(world, tmp_path / "out.jsonl", pairs=pairs)
    assert calls == [16, 16, 16, 16, 0, 0]  # record 48 is the shards' eighth
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_equal_ids_of_other_documents_keep_their_scores_apart(world, tmp_path):
    rows = [{"id": "1", "text": f"honey and bees {n}"} for n in range(5)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = {"query": "bees", "positives": [{"id": "1", "text": "bees"}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(pair) + "\n")
    retrieval = Retrieval(
        (Source.parse(tmp_path / "c.jsonl"),), str(world / "model"), tmp_path / "work"
    )
    windows = Windows(depth=10, positives=None, negatives=(1, 10))
    mine([Source.parse(tmp_path / "p.jsonl")], retrieval, tmp_path / "out.jsonl", windows)
    (record,) = read_source(tmp_path / "out.jsonl")
    assert len(record.negatives) == 5
    assert len({d.id for d in (*record.positives, *record.negatives)}) == 6 == len(record.scores)


def test_what_is_no_pair_is_named(world, tmp_path):
    with pytest.raises(UserError, match=r"corpus\.jsonl:1: a text without a query; give pairs"):
        run(world, tmp_path / "out.jsonl", MINING, pairs=("corpus.jsonl",))
    (tmp_path / "bad.jsonl").write_text('{"query": "q", "positives": []}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1: positives is empty"):
        run(world, tmp_path / "no.jsonl", pairs=(tmp_path / "bad.jsonl",))
