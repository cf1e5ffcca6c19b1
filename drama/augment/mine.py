"""Hard negatives for pairs that exist: what the teacher ranks high and nobody called a positive.

The given positives and their copies are taken out of the ranking, then `Windows.negatives` cuts it
and the positive-aware filter drops what scores like a positive (NV-Retriever, arXiv 2407.15831,
which takes the first candidates below 95 % of the positive's score).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from drama.augment.corpus import Corpus, content_number
from drama.augment.given import Given
from drama.augment.job import Dropped, Job, Kept, Step
from drama.augment.pairs import DIGITS, ranking, scored_record
from drama.augment.teacher import Retrieval, Teacher
from drama.augment.windows import MINING, Windows, choose_negatives
from drama.data.records import Record
from drama.data.sources import Source

BATCH = 1024  # queries that are searched, and written, together


def mine(
    sources: Sequence[Source],
    retrieval: Retrieval,
    out: str | Path,
    windows: Windows = MINING,
) -> dict[str, Any]:
    """Write every record with mined negatives in place of its own, and the teacher's scores of all
    its documents; return the report.

    Args:
        sources: records of any layout, or folders of shards.
        windows: its `positives` must be None.

    Raises:
        UserError: a row that is no record with a query (its file and line); from `Job` and
            `Retrieval`.
    """
    given = Given(sources)
    about = {**given.about(), **retrieval.about(), **asdict(windows)}
    with Job(out, "mine", about) as job:
        if job.report is not None:
            return job.report
        total = len(given)
        corpus, teacher = retrieval.open()
        return job.run(_steps(given, corpus, teacher, windows, job.start), total)


def _steps(
    given: Given, corpus: Corpus, teacher: Teacher, windows: Windows, start: int
) -> Iterator[Step]:
    records = given.read(start)
    while batch := list(islice(records, BATCH)):
        start += len(batch)
        yield Step(start, _mined(batch, corpus, teacher, windows))


def _mined(
    records: Sequence[Record], corpus: Corpus, teacher: Teacher, windows: Windows
) -> list[Kept | Dropped]:
    q_BD = teacher.embed([record.query for record in records])
    numbers_BK, scores_BK = teacher.nearest(q_BD, windows.depth)
    owners = np.repeat(np.arange(len(records)), [len(record.positives) for record in records])
    texts = [document.full_text for record in records for document in record.positives]
    of_positives = iter(teacher.cosines(q_BD[owners], texts).tolist())
    results: list[Kept | Dropped] = []
    for record, numbers_K, scores_K in zip(records, numbers_BK, scores_BK, strict=True):
        numbers, scores = ranking(numbers_K, scores_K)
        own_scores = [round(next(of_positives), DIGITS) for _ in record.positives]
        given = {content_number(document) for document in record.positives}
        contents: list[int] = corpus.contents[numbers].tolist()
        left = [place for place, content in enumerate(contents) if content not in given]
        places, left_out = choose_negatives(
            windows,
            [contents[place] for place in left],
            [scores[place] for place in left],
            given,
            min(own_scores),
        )
        chosen = [left[place] for place in places]
        negatives = tuple(corpus[numbers[place]].document for place in chosen)
        mined = dataclasses.replace(record, negatives=negatives)
        results.append(
            Kept(
                scored_record(mined, [*own_scores, *(scores[place] for place in chosen)]),
                left_out=left_out,
            )
        )
    return results
