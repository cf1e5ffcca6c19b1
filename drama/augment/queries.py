"""Queries: a language model writes one for each document, and the teacher finds its documents.

Ma et al. 2025, "DRAMA" (arXiv 2502.18460), section 3.1.2. The model thinks of a task first, which
makes the queries of a corpus differ in kind. Only the query is trained on: a record's `prompt`
would be put before it, so the task is left out (it stays in the cache of answers) and only its kind
is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from drama.augment import answers
from drama.augment.asking import CUT, Asking, Talk
from drama.augment.corpus import Corpus, CorpusDocument
from drama.augment.in_order import Done, InOrder, counted
from drama.augment.job import Dropped, Job, Kept, Step
from drama.augment.messages import query_messages
from drama.augment.pairs import retrieved_pairs
from drama.augment.prompts import Prompt
from drama.augment.tasks import task_kind
from drama.augment.teacher import Retrieval, Teacher
from drama.augment.windows import PAPER, Windows
from drama.data.records import content_id

BATCH = 256  # documents whose queries are searched, and written, together
SEEDS = 2**31 - 1  # what every server takes
Written = tuple[CorpusDocument, answers.Query | Dropped]


def make_queries(
    retrieval: Retrieval,
    out: str | Path,
    asking: Asking,
    windows: Windows = PAPER,
    max_chars: int = 2000,
) -> dict[str, Any]:
    """Write a record for each document of which the model makes a query; return the report.

    max_chars: of a document in the prompt.

    Raises:
        IncompleteError: some documents have no answer yet; the same call goes on.
        UserError: from `Job`, `Retrieval` and `LLM`.
    """
    prompt = Prompt.load("queries", asking.prompt)
    examples = answers.example_queries(prompt.answers)

    async def work(item: CorpusDocument, talk: Talk) -> Written:
        text = item.document.full_text
        # its own seed: with one for all, a server draws alike at each place of every answer
        index = int(content_id(item.document.title, item.document.text), 16) & SEEDS
        messages = query_messages(prompt, text, max_chars)
        answer = await talk.ask(asking.request(messages, index=index))
        if isinstance(answer, Dropped):
            return item, answer
        query = answers.parse_query(answer, text, examples)
        if isinstance(query, answers.Dropped):
            return item, Dropped(query.reason)
        if talk.counts[CUT] and not query.language:  # the line after the query never came
            return item, Dropped("answer cut off")
        return dataclasses.replace(item, lang=item.lang or query.language), query

    about = {
        **retrieval.about(),
        **asking.about(prompt),
        **asdict(windows),
        "document_chars": max_chars,
    }
    with Job(out, "queries", about) as job:
        if job.report is not None:
            return job.report
        llm = asking.open()
        corpus, teacher = retrieval.open()
        with InOrder(llm, corpus.read(job.start), work) as written:
            steps = _steps(written, corpus, teacher, windows, job.start)
            return job.run(steps, len(corpus), llm.usage)


def _steps(
    written: Iterator[Done[Written]],
    corpus: Corpus,
    teacher: Teacher,
    windows: Windows,
    start: int,
) -> Iterator[Step]:
    # batches of fixed places: what is searched together decides the last bits of the scores
    while batch := list(islice(written, BATCH)):
        values = [done.value for done in batch]
        queries = [(q.text, item) for item, q in values if isinstance(q, answers.Query)]
        pairs = iter(retrieved_pairs(corpus, teacher, windows, "query", queries))
        results: list[Kept | Dropped] = [
            _labelled(next(pairs), query) if isinstance(query, answers.Query) else query
            for _, query in values
        ]
        start += len(batch)
        yield Step(start, results, counted(batch))


def _labelled(pair: Kept | Dropped, query: answers.Query) -> Kept | Dropped:
    if isinstance(pair, Dropped):
        return pair
    return dataclasses.replace(pair, labels={"task": task_kind(query.task)})
