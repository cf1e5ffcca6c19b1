"""The bundle that ships: its parts fit each other, and the test split does not leak."""

import gzip
from pathlib import Path

import pytest

from drama.data.beir import read_corpus, read_qrels, read_queries
from drama.data.demo.build import cut, normal
from drama.data.sources import read_source

DEMO = Path(__file__).parents[2] / "data" / "demo"


@pytest.fixture(scope="module")
def pairs():
    return list(read_source(DEMO / "pairs.jsonl.xz"))


@pytest.fixture(scope="module")
def corpus():
    return {document.id: document for document in read_corpus(DEMO / "scifact")}


def test_pairs_are_whole(pairs):
    assert 3500 <= len(pairs) <= 4500
    assert {record.source for record in pairs} == {"medquad", "scifact"}
    assert len({normal(record.query) for record in pairs}) == len(pairs)
    for record in pairs:
        assert 1 <= len(record.negatives) <= 4
        positives = {document.id for document in record.positives}
        assert not positives & {document.id for document in record.negatives}


def test_no_test_query_and_no_test_only_positive_is_trained_on(pairs, corpus):
    queries, qrels = read_queries(DEMO / "scifact"), read_qrels(DEMO / "scifact", "test")
    assert not {normal(text) for text in queries.values()} & {normal(r.query) for r in pairs}
    # A positive of both splits is allowed; one of the test split only would pair a test document
    # with a claim that no train judgement links to it, which the builder asserts.
    trained = {d.id for r in pairs if r.source == "scifact" for d in r.positives}
    tested = {f"scifact:{id_}" for grades in qrels.values() for id_ in grades}
    assert len(trained & tested) <= 182  # documents that both published splits judge


def test_the_collection_is_closed(corpus):
    queries, qrels = read_queries(DEMO / "scifact"), read_qrels(DEMO / "scifact", "test")
    assert len(queries) == 300
    assert set(queries) == set(qrels)
    assert sum(map(len, qrels.values())) == 339
    assert {id_ for grades in qrels.values() for id_ in grades} <= set(corpus)
    assert len(corpus) == 1200


def test_calibration_text_is_paragraphs():
    text = gzip.decompress((DEMO / "calibration.txt.gz").read_bytes()).decode()
    paragraphs = text.strip().split("\n\n")
    assert 350_000 < len(text) < 450_000
    assert len(paragraphs) > 300
    assert all(paragraph.strip() and "\n" not in paragraph for paragraph in paragraphs)


def test_size_and_licences():
    data = [path for path in DEMO.rglob("*") if path.suffix in (".gz", ".xz", ".jsonl", ".tsv")]
    assert sum(path.stat().st_size for path in data) < 3_000_000
    licences = (DEMO / "LICENSES.md").read_text()
    for part in ("MedQuAD", "SciFact", "SciTLDR", "Wikipedia"):
        assert part in licences


def test_cut_ends_at_a_sentence():
    assert cut("One two.  Three\nfour. Five six.", 22) == "One two. Three four."
    assert cut("no sentence end in this text", 14) == "no sentence"
    assert cut("short") == "short"
