"""Triplets without a corpus: a language model thinks of tasks, then writes an example of each.

Ma et al. 2025, "DRAMA" (arXiv 2502.18460), section 3.1.4, after E5-Mistral (arXiv 2401.00368). What
is asked of triplet number `index` is a function of the seed and of `index` alone (`grid`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drama.augment import answers
from drama.augment.asking import Asking, Talk, together
from drama.augment.grid import Draw, Subject, draw, draw_subject
from drama.augment.in_order import AHEAD, Done, InOrder
from drama.augment.job import Dropped, Job, Kept, Step
from drama.augment.languages import NAMES
from drama.augment.messages import task_messages, triplet_messages
from drama.augment.prompts import Prompt
from drama.data.records import Document, Record
from drama.errors import UserError, nearest

TASKS = 20  # of one list, and triplets that are written from it
TASKS_MAX_TOKENS = 1024
SOURCE = "triplets"
SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("query", "positive", "negative")},
    "required": ["query", "positive", "negative"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class TripletOptions:
    """How many are asked for, in which languages (codes; one that stands twice is drawn twice as
    often), and the user's own prompt for the tasks.

    Raises:
        UserError: a number under 1, or a language that is not known.
    """

    number: int
    languages: tuple[str, ...] = ("en",)
    tasks_prompt: Path | None = None

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserError(f"number {self.number}: ask for 1 triplet or more")
        for code in self.languages:
            if code not in NAMES:
                raise UserError(
                    f"languages: '{code}' is not known{nearest(code, NAMES)}; there are "
                    f"{', '.join(NAMES)}"
                )
        if not self.languages:
            raise UserError("languages is empty; give codes such as en,de")


def make_triplets(out: str | Path, asking: Asking, options: TripletOptions) -> dict[str, Any]:
    """Ask for triplets and write a record for each that can be read; return the report.

    Raises:
        IncompleteError: some have no answer yet; the same call goes on.
        UserError: from `Job` and `LLM`.
    """
    tasks_prompt = Prompt.load("tasks", options.tasks_prompt)
    prompt = Prompt.load("triplets", asking.prompt)
    examples = answers.example_queries(prompt.answers)

    async def work(start: int, talk: Talk) -> list[Kept | Dropped]:
        """The triplets from number `start` on that share a list of tasks."""
        indices = range(start, min(start + TASKS, options.number))
        number = start // TASKS
        subject = draw_subject(asking.seed, number)
        messages = task_messages(tasks_prompt, subject, TASKS)
        answer = await talk.ask(asking.request(messages, index=number, max_tokens=TASKS_MAX_TOKENS))
        tasks = answers.parse_tasks(answer) if isinstance(answer, str) else answer
        if not isinstance(tasks, tuple):
            return [Dropped(f"no task: {tasks.reason}")] * len(indices)
        return await together(
            triplet(index, subject, tasks[(index - start) % len(tasks)], talk) for index in indices
        )

    async def triplet(index: int, subject: Subject, task: str, talk: Talk) -> Kept | Dropped:
        form = draw(asking.seed, index, options.languages)
        messages = triplet_messages(prompt, task, form)
        answer = await talk.ask(asking.request(messages, index=index, schema=SCHEMA), whole=True)
        if isinstance(answer, Dropped):
            return answer
        read = answers.parse_triplet(answer, form.language, examples)
        if isinstance(read, answers.Dropped):
            return Dropped(read.reason)
        record = Record(
            read.query,
            (Document(read.positive),),
            (Document(read.negative),),
            query_id=f"triplet:{index}",
            source=SOURCE,
            lang=form.language,
        )
        return Kept(record, labels=_labels(subject, form))

    about = {
        **asking.about(tasks_prompt, prompt),
        "number": options.number,
        "languages": options.languages,
    }
    with Job(out, "triplets", about) as job:
        if job.report is not None:
            return job.report
        llm = asking.open()
        lists = range(job.start, options.number, TASKS)
        ahead = -(-AHEAD * llm.limits.concurrency // TASKS)
        with InOrder(llm, lists, work, ahead) as results:
            steps = _steps(results, job.start, options.number)
            return job.run(steps, options.number, llm.usage)


def _labels(subject: Subject, form: Draw) -> dict[str, str]:
    """What was drawn for a triplet, for the report; its language is the record's."""
    return {
        "task": subject.search,
        "field": subject.topic,
        "query length": form.query_length,
        "document length": form.document_length,
        "for whom": form.difficulty,
        "clarity": form.clarity,
    }


def _steps(
    results: Iterator[Done[list[Kept | Dropped]]], start: int, number: int
) -> Iterator[Step]:
    for done in results:
        start = min(start + TASKS, number)
        yield Step(start, done.value, done.counts)
