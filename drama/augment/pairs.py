"""A query and the teacher's ranking for it, made into a record; shared by all that retrieve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from drama.augment.corpus import Corpus, CorpusDocument
from drama.augment.job import Dropped, Kept
from drama.augment.teacher import Teacher
from drama.augment.windows import Windows, choose
from drama.data.records import Document, Record

DIGITS = 6  # of a score; more than the vectors hold


def retrieved_pairs(
    corpus: Corpus,
    teacher: Teacher,
    windows: Windows,
    kind: str,
    queries: Sequence[tuple[str, CorpusDocument]],
) -> list[Kept | Dropped]:
    """What comes of queries and the documents that they were made from, in order.

    kind: stands before the document's id in the record's query_id.
    """
    numbers_BK, scores_BK = teacher.search([query for query, _ in queries], windows.depth)
    return [
        ranked_pair(
            corpus,
            windows,
            Record(
                query, (), query_id=f"{kind}:{own.document.id}", source=own.source, lang=own.lang
            ),
            int(corpus.contents[own.number]),
            *ranking(numbers, scores),
        )
        for (query, own), numbers, scores in zip(queries, numbers_BK, scores_BK, strict=True)
    ]


def ranking(numbers_K: np.ndarray, scores_K: np.ndarray) -> tuple[list[int], list[float]]:
    """One row of `Teacher.search` as plain numbers; a graph's places without a document go."""
    found_K = numbers_K >= 0
    return numbers_K[found_K].tolist(), [round(x, DIGITS) for x in scores_K[found_K].tolist()]


def ranked_pair(
    corpus: Corpus,
    windows: Windows,
    asked: Record,
    own: int | None,
    numbers: Sequence[int],
    scores: Sequence[float],
) -> Kept | Dropped:
    """The record of one query: `asked` with other documents.

    own: the content of the document that the query was made from, if it is known.
    numbers: documents, best first, in the teacher's order or another's. scores: the teacher's.
    """
    contents: list[int] = corpus.contents[list(numbers)].tolist()
    chosen = choose(windows, contents, scores, own)
    if not chosen.positives:
        return Dropped("no positive left")
    places = [*chosen.positives, *chosen.negatives]
    documents = tuple(corpus[numbers[place]].document for place in places)
    count = len(chosen.positives)
    record = dataclasses.replace(asked, positives=documents[:count], negatives=documents[count:])
    scored = scored_record(record, [scores[place] for place in places])
    return Kept(scored, chosen.own_rank, chosen.left_out)


def scored_record(record: Record, scores: Sequence[float]) -> Record:
    """The record with a score for each of its documents, positives first.

    Scores go by id. Where two documents of different sources share one, the later gets the id of
    its content instead.
    """
    by_id: dict[str, float] = {}
    documents: list[Document] = []
    for document, score in zip((*record.positives, *record.negatives), scores, strict=True):
        if document.id in by_id:
            document = Document(document.text, document.title)
        by_id[document.id] = score
        documents.append(document)
    count = len(record.positives)
    return dataclasses.replace(
        record,
        positives=tuple(documents[:count]),
        negatives=tuple(documents[count:]),
        scores=by_id,
    )
