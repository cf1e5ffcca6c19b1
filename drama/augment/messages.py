"""The chats that are sent to an LLM, one builder a prompt. Texts of others enter them quoted."""

from __future__ import annotations

from collections.abc import Sequence

from drama.augment.grid import Draw, Subject
from drama.augment.languages import NAMES
from drama.augment.prompts import Message, Prompt
from drama.augment.quoting import numbered, quoted

MAX_QUERY_CHARS = 1000  # of a query inside a prompt


def query_messages(prompt: Prompt, document: str, max_chars: int = 2000) -> list[Message]:
    """Ask for a task, a query that finds `document`, and its language ("queries")."""
    return prompt.messages({"document": quoted(document, max_chars)})


def rerank_messages(
    prompt: Prompt, query: str, passages: Sequence[str], max_chars: int = 1200
) -> list[Message]:
    """Ask for the order of the passages, numbered from 1 ("rerank").

    The scheme is RankGPT's (Sun et al. 2023, arXiv 2304.09542) in one turn. More passages than one
    call takes go through `rankings.Windows`.
    """
    return prompt.messages(_passages(query, passages, max_chars))


def relabel_messages(
    prompt: Prompt, query: str, positive: str, passages: Sequence[str], max_chars: int = 1200
) -> list[Message]:
    """Ask which hard negatives are relevant in truth ("relabel"), given one passage that is.

    After RLHN (Thakur et al. 2025, arXiv 2505.16967).
    """
    values = _passages(query, passages, max_chars)
    return prompt.messages({**values, "positive": quoted(positive, max_chars)})


def task_messages(prompt: Prompt, subject: Subject, number: int = 20) -> list[Message]:
    """Ask for a list of retrieval tasks ("tasks")."""
    values = {"topic": subject.topic, "search": subject.search, "number": str(number)}
    return prompt.messages(values)


def triplet_messages(prompt: Prompt, task: str, draw: Draw) -> list[Message]:
    """Ask for a query, a positive and a hard negative of a task ("triplets")."""
    return prompt.messages(
        {
            "task": quoted(task, MAX_QUERY_CHARS),
            "language": NAMES.get(draw.language, draw.language),
            "query_length": draw.query_length,
            "document_length": draw.document_length,
            "difficulty": draw.difficulty,
            "clarity": draw.clarity,
        }
    )


def _passages(query: str, passages: Sequence[str], max_chars: int) -> dict[str, str]:
    return {
        "query": quoted(query, MAX_QUERY_CHARS),
        "passages": numbered([quoted(passage, max_chars) for passage in passages]),
        "number": str(len(passages)),
    }
