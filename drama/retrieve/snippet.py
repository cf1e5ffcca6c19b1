"""The part of a document that answers a query, by the words that both have."""

from __future__ import annotations

import re
from collections.abc import Iterator

import Stemmer
from bm25s.stopwords import STOPWORDS_EN

SNIPPET = 200  # characters
Spans = tuple[tuple[int, int], ...]

# scripts without spaces between words: each letter counts as one
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
# . ! ? … before a space; the marks of Chinese, Japanese and the Indic scripts before anything
_SENTENCE_END = re.compile("(?<=[.!?\u2026])\\s+|(?<=[\u3002\uff01\uff1f\u0964])\\s*")


def query_words(query: str) -> frozenset[str]:
    """The stems of a query's words, without English stop words."""
    return frozenset(stem for stem, *_ in _stems(query) if stem not in STOPWORDS_EN)


def snippet(text: str, words: frozenset[str], limit: int = SNIPPET) -> tuple[str, Spans]:
    """At most `limit` characters of a text, and where in them words of the query stand.

    It begins with the sentence that has most of the words, or with the text where none has any;
    what was cut is marked by "…". White space is collapsed.

    Args:
        words: what `query_words` gives.
    """
    text = " ".join(text.split())
    if len(text) > limit:
        start = _best_sentence(text, words)
        text = text[start:]
        first = next((at for stem, at, _ in _stems(text) if stem in words), 0)
        if first > limit // 2:  # one long sentence: its words would be cut off
            begin = text.rfind(" ", 0, first - limit // 4) + 1 or first
            start, text = start + begin, text[begin:]
        before = "… " if start else ""
        room = limit - len(before)
        if len(text) > room:
            text = (text[: room - 1].rsplit(" ", 1)[0] if " " in text else text[: room - 1]) + "…"
        text = before + text
    return text, marks(text, words)


def marks(text: str, words: frozenset[str]) -> Spans:
    """Where words of the query stand in a text: (start, end) of each."""
    return tuple((start, end) for stem, start, end in _stems(text) if stem in words)


def _best_sentence(text: str, words: frozenset[str]) -> int:
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text))]
    ends = [*starts[1:], len(text)]
    counts = [
        len({stem for stem, *_ in _stems(text[start:end])} & words)
        for start, end in zip(starts, ends, strict=True)
    ]
    return starts[counts.index(max(counts))]


def _stems(text: str) -> Iterator[tuple[str, int, int]]:
    """Each word's English stem, in small letters, with its start and end."""
    stem = Stemmer.Stemmer("english").stemWord
    for match in _WORD.finditer(text):
        yield stem(match[0].casefold()), match.start(), match.end()
