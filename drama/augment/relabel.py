"""Relabelling: a language model judges the hard negatives of records, for some are positives.

After RLHN (Thakur et al. 2025, arXiv 2505.16967). What it finds relevant becomes a positive, or is
dropped; what it says nothing of stays a negative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from drama.augment.asking import Asking, Talk
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
RIGHT, NO_LABEL, NO_ANSWER = "right", "without a judgement", "in answers of no use"
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

    async def work(record: Record, talk: Talk) -> Kept | Dropped:
        relevant: list[Document] = []
        for start in range(0, len(record.negatives), WINDOW):
            part = record.negatives[start : start + WINDOW]
            passages = [document.full_text for document in part]
            known = record.positives[0].full_text
            messages = relabel_messages(prompt, record.query, known, passages, max_chars)
            answer = await talk.ask(asking.request(messages))
            labels = parse_labels(answer, len(part)) if isinstance(answer, str) else answer
            if not isinstance(labels, tuple):
                talk.counts[f"negatives {NO_ANSWER}"] += len(part)
                continue
            for document, label in zip(part, labels, strict=True):
                outcome = {True: f"relevant, {found}", False: RIGHT, None: NO_LABEL}[label]
                talk.counts[f"negatives {outcome}"] += 1
                if label:
                    relevant.append(document)
        return Kept(_without(record, relevant, found))

    about = {**given.about(), **asking.about(prompt), "found": found, "passage_chars": max_chars}
    with Job(out, "relabel", about) as job:
        if job.report is not None:
            return job.report
        llm, total = asking.open(), given.count()
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
