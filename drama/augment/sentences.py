"""Sentences of many scripts, by their marks alone; pieces where there are none.

Marks that end a sentence whatever follows: 。！？｡ (Chinese, Japanese), ।॥ (Indic), ۔ (Urdu), ။
(Burmese), ។ (Khmer), ። (Ethiopic), ། (Tibetan). Marks that need white space after them: . ! ? … ؟
and ։ (Armenian). A full stop ends none after an initial, a common abbreviation, or before a small
letter. Thai, Lao and others write no marks; what is too long is cut at commas and their like, then
at white space, then between letters, never before a combining sign.
"""

# marks of other scripts look like Latin ones on purpose

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

_CLOSING = "[\"'”’»」』）)\\]]*"
_END = re.compile(rf"(?:[。！？｡।॥۔။។፧።།]+{_CLOSING})|(?:[.!?…؟։]+{_CLOSING}(?=\s|$))|(?:\n\s*\n)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'])(?:[^\W\d_]|[^\W\d_]\.[^\W\d_]|Dr|Mr|Mrs|Ms|Prof|St|Jr|Sr|vs|etc|cf|al|approx|No|"
    r"Fig|Figs|Eq|Vol|pp?|ca|bzw|Nr|Abb|Sra?|Mme|Mlle|Inc|Ltd|Co)\.$"
)
_CLAUSE_MARKS = ",;:،؛、，；：—"
_CLAUSE = re.compile(rf".*?(?:[{_CLAUSE_MARKS}]+\s*|$)", re.DOTALL)
_WORD = re.compile(r"\S+\s*")
# kana, ideographs, hangul and full-width forms say about as much as three letters
_WIDE = re.compile(
    "[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uff60\U00020000-\U0003ffff]"
)


def length(text: str) -> int:
    """Characters, a wide one (Chinese, Japanese, Korean) counted as three."""
    return len(text) + 2 * len(_WIDE.findall(text))


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in order, white space inside collapsed; nothing else is lost."""
    found, start = [], 0
    for match in _END.finditer(text):
        if match[0].startswith(".") and not _ends_here(text, start, match.end()):
            continue
        found.append(text[start : match.end()])
        start = match.end()
    found.append(text[start:])
    return [sentence for part in found if (sentence := " ".join(part.split()))]


def pieces(text: str, least: int, most: int) -> list[str]:
    """What of a text may stand alone as a query: `least` to `most` long, and not all of it.

    Sentences that are too long are cut into runs of clauses, words or letters; so is a text of one
    sentence, into runs of at most half of it.
    """
    sentences = split_sentences(text)
    if len(sentences) == 1:
        most = min(most, length(sentences[0]) // 2)
    runs = (
        run
        for sentence in sentences
        for run in ([sentence] if length(sentence) <= most else _runs(sentence, most))
    )
    return [run for run in runs if length(run) >= least]


def _ends_here(text: str, start: int, end: int) -> bool:
    """Whether a full stop, which ends at `end`, ends a sentence."""
    if _ABBREVIATION.search(text[max(start, end - 12) : end]):
        return False
    following = text[end : end + 8].lstrip()
    return not following[:1].islower()


def _runs(sentence: str, most: int) -> Iterator[str]:
    """Cut at the strongest marks that give pieces of at most `most`, joined again up to it."""
    run = ""
    for unit in _units(sentence, most):
        if run and length((run + unit).rstrip()) > most:
            yield _bare(run)
            run = ""
        run += unit
    yield _bare(run)


def _bare(run: str) -> str:
    """A run without the mark that it was cut at."""
    return run.strip().rstrip(_CLAUSE_MARKS)


def _units(sentence: str, most: int) -> Iterator[str]:
    for clause in _cut([sentence], _CLAUSE, most):
        for word in _cut([clause], _WORD, most):
            yield from [word] if length(word.rstrip()) <= most else _letters(word)


def _cut(texts: Iterable[str], marks: re.Pattern[str], most: int) -> Iterator[str]:
    for text in texts:
        if length(text.rstrip()) <= most:
            yield text
        else:
            yield from (match[0] for match in marks.finditer(text) if match[0])


def _letters(word: str) -> Iterator[str]:
    """Letters with the combining signs that follow them."""
    letter = ""
    for character in word:
        if letter and not unicodedata.category(character).startswith("M"):
            yield letter
            letter = ""
        letter += character
    yield letter
