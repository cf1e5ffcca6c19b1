"""What a job will ask of a language model, told before the first call.

Real prompts are made of a sample of real documents and counted; how long the answers are, nobody
knows before, so there an assumption per kind stands until some are there. As soon as a job has
answers, the server's own counts of those take the place of both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from drama.augment.answers import Dropped, Reason
from drama.augment.chat import estimate
from drama.augment.grid import draw, draw_subject
from drama.augment.job import Standing
from drama.augment.messages import query_messages, rerank_messages, task_messages, triplet_messages
from drama.augment.prompts import Message, Prompt
from drama.augment.rankings import Windows
from drama.augment.recipe import QueriesRecipe, RerankRecipe, TripletsRecipe
from drama.augment.triplets import TASKS
from drama.data.records import Document
from drama.tokenizer import load_tokenizer

SAMPLE = 200  # documents of a corpus whose prompts are made
# tokens of an answer. A query has three lines: task, query, language. An order of 20 passages is
# `[7] > [12] > ...`, 4 tokens each in Llama 3's vocabulary and Qwen's.
QUERY_ANSWER, RANKED_PASSAGE, TASK, TRIPLET = 50, 4, 25, 300
QUERY_CHARS, TASK_CHARS = 70, 100  # of a query or a task that is not written yet

Count = Callable[[Sequence[Message]], int]


@dataclass(frozen=True)
class Expected:
    """What a job asks in all, whatever of it is answered by now.

    documents: that it goes through; for reranking queries, at most. measured: answers that the
    means come from; 0: a sample of prompts, and the assumption.
    """

    name: str
    documents: int
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    measured: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def token_counter(tokenizer: Path | None) -> Count:
    """Counts the tokens of a chat: with the model's own tokenizer and template, or at 4 bytes each.

    Raises:
        UserError: as `load_tokenizer`.
    """
    if tokenizer is None:
        return lambda messages: estimate("\n".join(message["content"] for message in messages))
    loaded = load_tokenizer(tokenizer)

    def count(messages: Sequence[Message]) -> int:
        chat = list(messages)
        if loaded.chat_template:
            text = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        else:
            text = "\n".join(message["content"] for message in chat)
        return len(loaded(text, add_special_tokens=False)["input_ids"])

    return count


def expected_queries(
    name: str,
    documents: int,
    sample: Sequence[Document],
    options: QueriesRecipe,
    count: Count,
    standing: Standing,
) -> Expected:
    """One call a document.

    Args:
        documents: of the whole corpus. sample: some of them. standing: of the job.
    """
    prompt = Prompt.load("queries", options.prompt)
    tokens = fmean(
        count(query_messages(prompt, item.full_text, options.document_chars)) for item in sample
    )
    return _expected(name, documents, documents, tokens, QUERY_ANSWER, standing)


def expected_rerank(
    name: str,
    documents: int,
    queries: int,
    sample: Sequence[Document],
    options: RerankRecipe,
    count: Count,
    standing: Standing,
) -> Expected:
    """A call for each window of each query's ranking. The teacher's rankings are not there yet:
    passages of the sample stand for them, and the beginning of a document for its query.

    queries: that there are, or will be at most.
    """
    prompt = Prompt.load("rerank", options.prompt)
    found = min(options.depth, documents)
    if not (calls := _calls(found, options)):  # a single document is in order
        return Expected(name, queries)
    passages = min(options.window, found)
    draw_of = random.Random(0)

    def messages(item: Document) -> list[Message]:
        others = draw_of.choices(sample, k=passages - 1)
        texts = [other.full_text for other in (item, *others)]
        query = item.text[:QUERY_CHARS]
        return rerank_messages(prompt, query, texts, options.passage_chars)

    tokens = fmean(count(messages(item)) for item in sample)
    answer = RANKED_PASSAGE * passages
    return _expected(name, queries, queries * calls, tokens, answer, standing)


def expected_triplets(
    name: str, seed: int, options: TripletsRecipe, count: Count, standing: Standing
) -> Expected:
    """A call for each triplet, and one for the tasks of each 20."""
    tasks_prompt = Prompt.load("tasks", options.tasks_prompt)
    prompt = Prompt.load("triplets", options.prompt)
    lists = -(-options.number // TASKS)
    task, languages = "x" * TASK_CHARS, tuple(options.languages)
    of_list = fmean(
        count(task_messages(tasks_prompt, draw_subject(seed, number), TASKS))
        for number in range(min(lists, SAMPLE))
    )
    of_triplet = fmean(
        count(triplet_messages(prompt, task, draw(seed, index, languages)))
        for index in range(min(options.number, SAMPLE))
    )
    calls = lists + options.number
    sent = (lists * of_list + options.number * of_triplet) / calls
    written = (lists * TASKS * TASK + options.number * TRIPLET) / calls
    return _expected(name, options.number, calls, sent, written, standing)


def _expected(
    name: str, documents: int, calls: int, sent: float, written: float, standing: Standing
) -> Expected:
    measured = standing.llm.get("calls", 0)
    if measured:
        sent = standing.llm.get("prompt tokens", 0) / measured
        written = standing.llm.get("completion tokens", 0) / measured
    return Expected(name, documents, calls, round(calls * sent), round(calls * written), measured)


def _calls(passages: int, options: RerankRecipe) -> int:
    windows, calls = Windows(passages, options.window, options.step), 0
    while windows.places:
        windows.take(Dropped(Reason.NO_RANKING))
        calls += 1
    return calls
