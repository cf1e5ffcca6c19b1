"""What small models put around an answer, taken off: thoughts, fences, markdown, quotes."""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS = 40_000  # of an answer that is read; the longest that is asked for is a tenth of it
MAX_LINE = 3000  # what is longer is no line, and is cut there
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*\w*[ \t]*$|```(?:json|text|markdown)?", re.MULTILINE)
_QUOTES = {
    '"': '"', "'": "'", "`": "`", "“": "”", "„": "“”", "”": "”", "‘": "’", "‚": "‘’", "«": "»",
    "»": "«", "「": "」", "『": "』", "《": "》", "<": ">", "[": "]", "*": "*", "_": "_",
}  # fmt: skip
_BULLET = re.compile(r"^(?:[-*–—>#+]+(?:\s+|$)|[•·◦▪]\s*)")
_NUMBER = re.compile(r"^\W{0,3}\d{1,3}[.):]\W{0,3}\s")
_MARKDOWN = re.compile(r"\*\*|`|~~~")
_ODD = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")


def answer_text(answer: str) -> str:
    """The answer without the thoughts of a reasoning model and without code fences."""
    text = printable(answer[:MAX_CHARS])
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    return _FENCE.sub("", text).strip()


def printable(text: str) -> str:
    """Without control characters and halves of surrogate pairs, which no file of records holds."""
    return _ODD.sub(" ", text)


def plain(text: str) -> str:
    """One line without bullet, emphasis and enclosing quotes.

    Quotes and emphasis inside a sentence stay, but for `**` and backticks, which are markdown only.
    """
    text = " ".join(text[:MAX_LINE].split())
    while True:
        shorter = unquoted(_BULLET.sub("", _MARKDOWN.sub("", text))).strip()
        if shorter == text:
            return text
        text = shorter


def unlisted(line: str) -> str:
    """An item of a list: `plain`, and without its number. Elsewhere "3. Liga" is no item."""
    return plain(_NUMBER.sub("", plain(line)))


def is_listed(line: str) -> bool:
    """Whether a line begins with a bullet or a number."""
    return bool(_BULLET.match(line.strip()) or _NUMBER.match(line.strip()))


def unquoted(text: str) -> str:
    """Without a quote that encloses all of it, or one whose other half a model forgot."""
    if len(text) < 2:
        return text
    first, inner, last = text[0], text[1:-1], text[-1]
    closing = _QUOTES.get(first, "")
    if last in closing and first not in inner and last not in inner:
        return inner
    if first in '"“„«*' and not any(mark in text[1:] for mark in closing):
        return text[1:]
    # inches are written like quotes
    if last in '"”»*' and not text[-2].isdigit() and not any(mark in inner for mark in '"“„«*'):
        return text[:-1]
    return text


def words(text: str) -> list[str]:
    """The words of a text in folded case, without punctuation; a character where no spaces are
    written. What two texts have in common is compared in these."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_FOLD).split()


def is_unspaced(word: str) -> bool:
    """Whether a word of `words` is a character of a script without spaces."""
    return _FOLD[ord(word[0])] != word[0]


class _Fold(dict[int, str]):
    """For `str.translate`: punctuation becomes a space, unspaced scripts are taken apart."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if category[0] in "PSZ" or category == "Cc":
            value = " "
        elif category == "Cf":
            value = ""
        else:
            name = unicodedata.name(char, "").split("-")[0].split(" ")[0]
            value = f" {char} " if name in _UNSPACED else char
        self[code] = value
        return value


_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}
_FOLD = _Fold()
