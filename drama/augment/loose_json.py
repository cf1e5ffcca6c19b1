"""JSON as small models write it: the objects in a text, whatever can be made of them.

Read besides JSON itself: single, typographic and missing quotes, quotes and newlines inside
strings, trailing and missing commas, Python's True and None, and an end that was cut off.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 6
MAX_STARTS = 20  # braces at which an object is tried
_CLOSING = {'"': '"', "'": "'", "“": '”"', "‘": "’'", "`": "`"}
_BARE = re.compile(r"[^,}\]\n]*")
_BARE_KEY = re.compile(r"[\w \-]{1,40}(?=\s*[:：=])")
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
# what shows that a quote closes its string
_AFTER_KEY = r"(?=\s{0,99}[:：=])"
_AFTER_VALUE = (
    r"(?=\s{0,99}(?:[}\]]|\Z|[,;]\s{0,99}(?:[\"'“‘`{\[}\]]|\w[\w ]{0,40}[:：]|\Z))"
    # the next member on a line of its own, the comma forgotten
    r"|[ \t]{0,9}\n\s{0,99}[\"'“‘][^\n]{1,40}[\"'”’]\s?:)"
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": " ", "f": " "}


def loose_objects(text: str) -> list[dict[str, Any]]:
    """The objects in a text in order, each followed by those inside it; never raises.

    An object that is valid JSON is read as such, any other as far as it goes.
    """
    found: list[dict[str, Any]] = []
    place = 0
    for _ in range(MAX_STARTS):
        place = text.find("{", place)
        if place < 0:
            break
        value, place = _one(text, place)
        found += _nested(value)
    return [value for value in found if value]


def loose_strings(text: str) -> list[str]:
    """The strings of the first list in a text, those in its objects included, or of the first
    object where it holds no list; never raises."""
    start = re.search(r"[\[{]", text)
    if not start:
        return []
    value, _ = _one(text, start.start())
    return _strings(_first_list(value) or value)


def _first_list(value: Any, depth: int = 0) -> list[Any]:
    if isinstance(value, list):
        return value
    if depth > MAX_DEPTH or not isinstance(value, dict):
        return []
    found = (_first_list(item, depth + 1) for item in value.values())
    return next(filter(None, found), [])


def _one(text: str, place: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        reader = _Reader(text, place)
        value = reader.value(0)
        return value, max(reader.place, place + 1)


def _nested(value: Any, depth: int = 0) -> list[dict[str, Any]]:
    if depth > MAX_DEPTH or not isinstance(value, dict | list):
        return []
    inner = value.values() if isinstance(value, dict) else value
    own = [value] if isinstance(value, dict) else []
    return own + [found for item in inner for found in _nested(item, depth + 1)]


def _strings(value: Any, depth: int = 0) -> list[str]:
    if isinstance(value, str):
        return [value]
    if depth > MAX_DEPTH or not isinstance(value, dict | list):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [found for item in inner for found in _strings(item, depth + 1)]


class _Reader:
    """Reads one value from `place` on; `place` ends behind it."""

    def __init__(self, text: str, place: int) -> None:
        self.text = text
        self.place = place

    def value(self, depth: int) -> Any:
        self._skip()
        char = self.text[self.place : self.place + 1]
        if char == "{" and depth < MAX_DEPTH:
            return self._object(depth)
        if char == "[" and depth < MAX_DEPTH:
            return self._list(depth)
        if char in _CLOSING:
            return self._string(key=False)
        bare = _BARE.match(self.text, self.place)
        assert bare is not None  # it may be empty
        self.place = bare.end()
        word = bare[0].strip()
        return _CONSTANTS.get(word.casefold(), word)

    def _object(self, depth: int) -> dict[str, Any]:
        self.place += 1
        value: dict[str, Any] = {}
        while True:
            self._skip(",;")
            char = self.text[self.place : self.place + 1]
            if char in ("", "}"):
                self.place += len(char)
                return value
            if char in _CLOSING:
                key = self._string(key=True)
            elif bare := _BARE_KEY.match(self.text, self.place):
                key = bare[0].strip()
                self.place = bare.end()
            else:  # no object after all, or prose between its members
                return value
            self._skip()
            if self.text[self.place : self.place + 1] not in (":", "：", "="):
                return value
            self.place += 1
            value.setdefault(key, self.value(depth + 1))

    def _list(self, depth: int) -> list[Any]:
        self.place += 1
        value: list[Any] = []
        while True:
            self._skip(",;")
            char = self.text[self.place : self.place + 1]
            if char in ("", "]", "}"):
                self.place += char == "]"
                return value
            before = self.place
            value.append(self.value(depth + 1))
            if self.place == before:  # nothing that can be read
                return value[:-1]

    def _string(self, key: bool) -> str:
        """From its opening quote to the quote that what follows shows to be the closing one."""
        closing = rf"(?<!\\)(?:\\\\)*(?P<quote>[{re.escape(_CLOSING[self.text[self.place]])}])"
        ends = re.compile(closing + (_AFTER_KEY if key else _AFTER_VALUE))
        start = self.place + 1
        found = ends.search(self.text, start)
        first = found.start("quote") if found else len(self.text)
        self.place = min(first + 1, len(self.text))
        return _unescaped(self.text[start:first])

    def _skip(self, also: str = "") -> None:
        while self.place < len(self.text) and (
            self.text[self.place].isspace() or self.text[self.place] in also
        ):
            self.place += 1


def _unescaped(text: str) -> str:
    def one(found: re.Match[str]) -> str:
        if found[1]:
            return chr(int(found[1], 16))
        return _ESCAPES.get(found[2], found[2])

    # JSON writes what lies beyond the first 65,536 characters as two halves
    text = re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.)|$)", lambda m: one(m) if m[1] or m[2] else "", text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
