"""Labelled values in an answer: as lines ("Query: ..."), or as JSON that need not be valid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from drama.augment.cleaning import is_listed, printable
from drama.augment.loose_json import loose_objects

Labels = Mapping[str, str]  # the name of a value, and the pattern of its labels

_END = tuple('.?!。？！؟।…"”»」')


def json_values(text: str, labels: Labels) -> dict[str, str]:
    """The strings under the labels, in the first JSON object that has any, nested ones included."""
    for found in loose_objects(text):
        values: dict[str, str] = {}
        for name, pattern in labels.items():
            for key, value in found.items():
                value = value[0] if isinstance(value, list) and value else value
                if isinstance(value, dict):  # {"query": {"text": "..."}}
                    value = next((value[own] for own in value if _folded(own) == "text"), None)
                if isinstance(value, str) and re.fullmatch(pattern, _folded(key)):
                    values.setdefault(name, printable(value))
        if values:
            return values
    return {}


def is_object(text: str) -> bool:
    """Whether a text is meant as JSON objects, whose keys are no labels of lines."""
    return text.lstrip("[ \n").startswith("{")


def line_values(text: str, labels: Labels) -> dict[str, list[str]]:
    """All values under each label, in order: labels that begin a line, or else any.

    A value is the rest of the line, or the next line that has something; further lines belong to
    it while its sentence has not ended and another label closes it.
    """
    pattern = "|".join(f"(?P<{name}>{label})" for name, label in labels.items())
    mark = rf"(?:{pattern})[ \t]{{0,3}}[*_`\"'”)\]]{{0,4}}[ \t]{{0,3}}[:：=][ \t]{{0,3}}[*_]{{0,3}}"
    starts = list(
        re.finditer(rf"^[^\w\n]{{0,8}}(?:\d{{1,3}}[.)])?[^\w\n]{{0,4}}{mark}", text, _FLAGS)
    )
    at_start = {found.lastgroup for found in starts}
    starts += [
        found
        for found in re.finditer(rf"(?<=[\s*|;,.\"(]){mark}", text, _FLAGS)
        if found.lastgroup not in at_start
    ]
    starts.sort(key=lambda found: found.start())
    values: dict[str, list[str]] = {name: [] for name in labels}
    for found, after in zip(starts, [*starts[1:], None], strict=False):
        part = text[found.end() : after.start() if after else len(text)]
        values[str(found.lastgroup)].append(_value(part, closed=after is not None))
    return values


_FLAGS = re.IGNORECASE | re.MULTILINE


def _value(part: str, closed: bool) -> str:
    lines = part.lstrip().split("\n")
    value = lines[0].strip()
    for line in lines[1:]:
        line = line.strip()
        if not closed or not line or is_listed(line) or value.endswith(_END):
            break
        value = f"{value} {line}"
    return value.rstrip(" |")  # the rest of a table's row


def _folded(key: Any) -> str:
    return re.sub(r"[\W_]+", " ", str(key)).strip().casefold()
