"""Relabelling: a language model judges the hard negatives of records, for some are positives.

After RLHN (Thakur et al. 2025, arXiv 2505.16967). What it finds relevant becomes a positive, or is
dropped; what it says nothing of stays a negative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from drama.augment.asking import Asking, Talk, together
from drama.augment.given import Given
from drama.augment.in_order import InOrder, steps
from drama.augment.job import Dropped, Job, Kept
from drama.augment.messages import relabel_messages
from drama.augment.prompts import Prompt
from drama.augment.rankings import parse_labels
from drama.data.records import Document, Record
from drama.data.sources import Source

BATCH = 64  # records that are written together
WINDOW = 20  # passages of one call
NO_ANSWER = "answers of no use"
OUTCOMES = {
    True: "negatives that are relevant",
    False: "negatives that are right",
    None: "negatives without a judgement",
}
Found = Literal["move", "drop"]


def relabel(
    sources: Sequence[Source],
    out: str | Path,
    asking: Asking,
    found: Found = "move",
    max_chars: int = 1200,
) -> dict[str, Any]:
    """Write every record with its hard negatives judged; return the report.

    found: what becomes of a negative that is relevant in truth. max_chars: of a passage.

    Raises:
        IncompleteError: some records have no answer yet; the same call goes on.
        UserError: a row that is no record with a query; from `Job` and `LLM`.
    """
    prompt = Prompt.load("relabel", asking.prompt)
    given = Given(sources)

    async def labels(record: Record, start: int, talk: Talk) -> list[bool | None]:
        """What is said of the negatives of one call."""
        passages = [item.full_text for item in record.negatives[start : start + WINDOW]]
        known = record.positives[0].full_text
        messages = relabel_messages(prompt, record.query, known, passages, max_chars)
        answer = await talk.ask(asking.request(messages))
        read = parse_labels(answer, len(passages)) if isinstance(answer, str) else answer
        if isinstance(read, tuple):
            return list(read)
        talk.counts[NO_ANSWER] += 1
        return [None] * len(passages)

    async def work(record: Record, talk: Talk) -> Kept | Dropped:
        starts = range(0, len(record.negatives), WINDOW)
        parts = await together(labels(record, start, talk) for start in starts)
        relevant: list[Document] = []
        for document, label in zip(record.negatives, chain.from_iterable(parts), strict=True):
            talk.counts[OUTCOMES[label]] += 1
            if label:
                relevant.append(document)
        return Kept(_without(record, relevant, found))

    about = {**given.about(), **asking.about(prompt), "found": found, "passage_chars": max_chars}
    with Job(out, "relabel", about) as job:
        if job.report is not None:
            return job.report
        llm, total = asking.open(), len(given)
        with InOrder(llm, given.read(job.start), work) as results:
            return job.run(steps(results, BATCH, job.start), total, llm.usage)


def _without(record: Record, relevant: Sequence[Document], found: Found) -> Record:
    """The record with these of its negatives among its positives, or without them."""
    negatives = tuple(document for document in record.negatives if document not in relevant)
    positives = record.positives + (tuple(relevant) if found == "move" else ())
    scores = record.scores
    if scores is not None:
        left = {document.id for document in (*positives, *negatives)}
        scores = {id_: score for id_, score in scores.items() if id_ in left}
    return dataclasses.replace(record, positives=positives, negatives=negatives, scores=scores)
