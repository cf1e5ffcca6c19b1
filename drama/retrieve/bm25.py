"""The lexical baseline: BM25 with English stemming, as the figures published for BEIR use it.

Scores follow Lucene's variant of Robertson's formula (Kamphuis et al. 2020, "Which BM25 do you
mean?") through `bm25s` (Lù 2024, arXiv 2407.03618), k1 1.2, b 0.75, title and text as one field,
bm25s' English stop words, Snowball's English stemmer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import bm25s
import Stemmer

from drama.data.records import Document
from drama.retrieve.run import Run

K1, B = 1.2, 0.75


def bm25_run(documents: Sequence[Document], queries: Mapping[str, str], k: int = 100) -> Run:
    """Rank `documents` for each query (id to text); at most `k` each, none that shares no word."""
    stemmer = Stemmer.Stemmer("english")

    def words(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(
            texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
        )

    run: Run = {query_id: {} for query_id in queries}
    documents_words = words([document.full_text for document in documents])
    queries_words = dict(zip(queries, words(list(queries.values())), strict=True))
    askable = {query_id: found for query_id, found in queries_words.items() if found}
    if not any(documents_words) or not askable:
        return run
    retriever = bm25s.BM25(k1=K1, b=B, method="lucene")
    retriever.index(documents_words, show_progress=False)
    rows, scores = retriever.retrieve(
        list(askable.values()),
        k=min(k, len(documents)),
        show_progress=False,
        backend_selection="numpy",
    )
    for query_id, row, score in zip(askable, rows, scores, strict=True):
        run[query_id] = {
            documents[i].id: float(s) for i, s in zip(row, score, strict=True) if s > 0
        }
    return run
