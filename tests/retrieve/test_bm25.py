from __future__ import annotations

import math
import re

import pytest

from drama.data.beir import read_corpus, read_queries
from drama.data.records import Document
from drama.retrieve.bm25 import bm25_run


def test_scores_follow_the_formula():
    """Robertson's BM25 with Lucene's idf, ln(1 + (N - n + .5) / (n + .5)), computed by hand."""
    texts = ["red apple", "green apple apple tree", "blue sky", "red red wine glass table"]
    documents = [Document(text=text, id=str(i)) for i, text in enumerate(texts)]
    run = bm25_run(documents, {"q": "red apples"})
    words = [re.findall(r"\w+", text) for text in texts]
    mean = sum(map(len, words)) / len(words)

    def score(document: list[str]) -> float:
        total = 0.0
        for term in ("red", "apple"):
            n, tf = sum(term in other for other in words), document.count(term)
            idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
            total += idf * tf / (tf + 1.2 * (1 - 0.75 + 0.75 * len(document) / mean))
        return total

    expected = {str(i): score(document) for i, document in enumerate(words) if score(document)}
    assert run["q"] == pytest.approx(expected, rel=1e-5)
    assert list(run["q"]) == sorted(expected, key=expected.__getitem__, reverse=True)


def test_title_stems_and_stop_words(dataset):
    documents, queries = list(read_corpus(dataset)), read_queries(dataset)
    run = bm25_run(documents, queries, k=3)
    assert next(iter(run["q1"])) in ("d1", "d7")
    assert next(iter(run["q2"])) == "d4"
    assert next(iter(run["q3"])) == "d5"
    assert all(len(found) <= 3 for found in run.values())
    assert set(bm25_run(documents, {"q": "volcano"})["q"]) == {"d3"}  # in the title, another form


@pytest.mark.parametrize("query", ["", "the of and", "zzzz unseen", "?!"])
def test_a_query_that_matches_nothing_finds_nothing(dataset, query):
    run = bm25_run(list(read_corpus(dataset)), {"q": query, "r": "moon"})
    assert run["q"] == {}
    assert set(run["r"]) == {"d5"}
    assert bm25_run(list(read_corpus(dataset)), {"q": query}) == {"q": {}}


def test_a_corpus_without_words():
    assert bm25_run([Document(text="", id="a")], {"q": "moon"}) == {"q": {}}
