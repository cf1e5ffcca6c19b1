"""Reranking: a language model puts the teacher's best documents in order, and its order is cut.

Ma et al. 2025, "DRAMA" (arXiv 2502.18460), section 3.1.3: the first of 20 is the positive, ranks 10
to 20 are hard negatives. One call takes `window` passages; more go through RankGPT's sliding
window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from drama.augment import answers, rankings
from drama.augment.asking import Asking, Talk
from drama.augment.corpus import Corpus
from drama.augment.given import Given
from drama.augment.in_order import InOrder, steps
from drama.augment.job import Dropped, Job, Kept
from drama.augment.messages import rerank_messages
from drama.augment.pairs import ranked_pair, ranking
from drama.augment.prompts import Prompt
from drama.augment.teacher import Retrieval, Teacher
from drama.augment.windows import RERANK, Windows
from drama.data.records import Record
from drama.data.sources import Source
from drama.errors import UserError

BATCH = 256  # queries that are searched, and written, together
OWN_KINDS = ("query", "crop")  # what stands before the document's id in `query_id`
NOT_RANKED = "windows without an order, left as they were"
REPAIRED = "orders repaired"


@dataclass(frozen=True)
class RerankOptions:
    """What the orders depend on, besides records, corpus, teacher and model.

    window, step: passages of one call, and how far the next one moves. max_chars: of a passage.

    Raises:
        UserError: a window under 2, or a step that is not from 1 to the window.
    """

    windows: Windows = RERANK
    window: int = 20
    step: int = 10
    max_chars: int = 1200

    def __post_init__(self) -> None:
        if not 1 <= self.step <= self.window or self.window < 2:
            raise UserError(
                f"window {self.window}, step {self.step}: a window has 2 passages or more, and the "
                "step is from 1 to the window"
            )


@dataclass(frozen=True, slots=True)
class _Ranked:
    """A record and the teacher's ranking for its query."""

    record: Record
    numbers: list[int]
    scores: list[float]


def rerank(
    sources: Sequence[Source],
    retrieval: Retrieval,
    out: str | Path,
    asking: Asking,
    options: RerankOptions,
) -> dict[str, Any]:
    """Write every record with the positives and negatives that the model's order gives in place of
    its own; return the report.

    Raises:
        IncompleteError: some queries have no order yet; the same call goes on.
        UserError: a row that is no record with a query; from `Job`, `Retrieval` and `LLM`.
    """
    prompt = Prompt.load("rerank", asking.prompt)
    given = Given(sources)
    own = asdict(options)
    about = {
        **given.about(), **retrieval.about(), **asking.about(prompt), **own.pop("windows"), **own,
    }  # fmt: skip
    with Job(out, "rerank", about) as job:
        if job.report is not None:
            return job.report
        llm, total = asking.open(), len(given)
        corpus, teacher = retrieval.open()

        async def work(row: _Ranked, talk: Talk) -> Kept | Dropped:
            return await _reordered(row, talk, corpus, asking, prompt, options)

        ranked = _ranked(given.read(job.start), teacher, options.windows.depth)
        with InOrder(llm, ranked, work) as results:
            return job.run(steps(results, BATCH, job.start), total, llm.usage)


def _ranked(records: Iterator[Record], teacher: Teacher, depth: int) -> Iterator[_Ranked]:
    # the batches of the steps, so that a job that goes on searches the same ones together
    while batch := list(islice(records, BATCH)):
        found = teacher.search([record.query for record in batch], depth)
        for record, numbers_K, scores_K in zip(batch, *found, strict=True):
            yield _Ranked(record, *ranking(numbers_K, scores_K))


async def _reordered(
    row: _Ranked, talk: Talk, corpus: Corpus, asking: Asking, prompt: Prompt, options: RerankOptions
) -> Kept | Dropped:
    texts = [corpus[number].document.full_text for number in row.numbers]
    windows = rankings.Windows(len(texts), options.window, options.step)
    asked, fault = 0, Dropped("no documents to order")
    while places := windows.places:
        asked += 1
        passages = [texts[place] for place in places]
        messages = rerank_messages(prompt, row.record.query, passages, options.max_chars)
        answer = await talk.ask(asking.request(messages))
        order: rankings.Ranking | answers.Dropped = answers.Dropped(answers.Reason.NO_RANKING)
        if isinstance(answer, Dropped):
            fault = answer
        else:
            order = rankings.parse_ranking(answer, len(places))
            if isinstance(order, answers.Dropped):
                fault = Dropped(order.reason)
            else:
                talk.counts[REPAIRED] += order.is_repaired
        windows.take(order)
    if windows.dropped == asked and len(texts) != 1:  # the teacher's order is not the model's
        return fault
    talk.counts[NOT_RANKED] += windows.dropped
    own = _own_place(row, corpus)
    kept = ranked_pair(
        corpus,
        options.windows,
        row.record,
        None if own is None else int(corpus.contents[row.numbers[own]]),
        [row.numbers[place] for place in windows.order],
        [row.scores[place] for place in windows.order],
    )
    if isinstance(kept, Dropped) or not _own_id(row.record):
        return kept
    # the teacher's rank, as all kinds report it, not the model's
    return replace(kept, own_rank=0 if own is None else own + 1)


def _own_place(row: _Ranked, corpus: Corpus) -> int | None:
    """Where the teacher has the document that the query was made from."""
    ids = [corpus[number].document.id for number in row.numbers]
    own = _own_id(row.record)
    return ids.index(own) if own and own in ids else None


def _own_id(record: Record) -> str:
    """The id of the document that a query of ours was made from; "" for other queries."""
    kind, _, own = (record.query_id or "").partition(":")
    return own if kind in OWN_KINDS else ""
