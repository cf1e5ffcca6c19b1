"""Read public data sets in the layouts in which they come, packed or not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drama.data.lines import PACKED_SUFFIXES, parse_json, read_lines, read_objects
from drama.errors import UserError

Pair = tuple[str, str, str]  # query, title, text
Judged = tuple[dict[str, str], list[tuple[str, str]]]  # texts by id; (question, id of its text)


def squad(path: Path) -> Judged:
    """Every paragraph of a file in SQuAD's layout, and its questions.

    Raises:
        UserError: it is not there, or of another layout.
    """
    texts: dict[str, str] = {}
    questions = []
    try:
        for article in read_json(path)["data"]:
            for paragraph in article["paragraphs"]:
                id_ = text_id(paragraph["context"])
                texts[id_] = paragraph["context"]
                questions += [(qa["question"], id_) for qa in paragraph["qas"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not in SQuAD's layout: {error!r}") from None
    return texts, questions


def qed(data: Path) -> Iterator[Pair]:
    """Questions of Natural Questions with their article's title and paragraph."""
    for row in objects(data / "pairs" / "nq-qed-dev" / "qed-dev-pairs.jsonl"):
        yield row["question"], row["title"], row["paragraph"]


def half(title: str) -> int:
    """0 or 1: the half that an article of QED belongs to, test set or training pairs."""
    return hashlib.sha256(title.encode()).digest()[0] % 2


def text_id(text: str) -> str:
    """The same for the same text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def objects(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file, which may be packed.

    Raises:
        UserError: it is not there, or a line is no object.
    """
    return (row for _, row in read_objects(packed(path)))


def read_json(path: Path) -> Any:
    """A whole file of JSON, which may be packed.

    Raises:
        UserError: it is not there, or no JSON.
    """
    found = packed(path)
    try:
        return parse_json("\n".join(line for _, line in read_lines(found)))
    except UserError as error:
        raise UserError(f"{found}: {error}") from None


def packed(path: Path) -> Path:
    """The file, or the same with the suffix of a compression.

    Raises:
        UserError: neither is there.
    """
    tried = [path.with_name(path.name + suffix) for suffix in PACKED_SUFFIXES]
    return next((place for place in tried if place.is_file()), None) or required(path)


def required(path: Path) -> Path:
    """The path, if something is there.

    Raises:
        UserError: nothing is.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; docs/evidence.md says which data sets are needed")
    return path
