"""Documents as data inside a prompt: cut to a length, unable to pass for the prompt's own marks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# each is replaced by a look-alike that neither our prompts nor a chat template use
_LOOK_ALIKES = (
    # what opens a mark of a chat template: <|im_end|>, <｜User｜>, <<SYS>>, [INST]
    (re.compile(r"<(?=[|｜]|<SYS>)"), "‹"),
    (re.compile(r"\[(?=/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS)\])"), "("),
    # <s>, <start_of_turn> and the like, and the tags that our prompts put around documents
    (
        re.compile(
            r"<(?=/?\s*(?:s|bos|eos|pad|unk|think|(?:start|end)_of_turn|tool_call|system|user"
            r"|assistant|document|query|passages?|relevant)\s*/?>)",
            re.IGNORECASE,
        ),
        "‹",
    ),
    # the number of a passage; the footnotes of an encyclopedia look the same
    (re.compile(r"\[(\s*\d+\s*)\]"), r"(\1)"),
    # the labels of an answer; in running text the same words are no mark
    (
        re.compile(
            r"^([^\w\n]{0,8}(?:task|query|language|answer|ranking|system|user|assistant)"
            r"[ \t]{0,3})[:：]",
            re.IGNORECASE | re.MULTILINE,
        ),
        r"\1–",
    ),
)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")


def quoted(text: str, max_chars: int) -> str:
    """`text` on one line, cut to `max_chars` on a word boundary, marks replaced by look-alikes."""
    # what a cut would drop need not be looked at, however long the text is
    text = _UNPRINTABLE.sub(" ", text[: 4 * max_chars + 1000])
    for pattern, replacement in _LOOK_ALIKES:
        text = pattern.sub(replacement, text)
    return cut(" ".join(text.split()), max_chars)


def cut(text: str, max_chars: int) -> str:
    """At most `max_chars` characters of `text`, ending with a whole word.

    A script without spaces, or a word longer than half the limit, is cut between characters, and
    no letter loses its vowel signs or accents.
    """
    if len(text) <= max_chars:
        return text
    space = max(text.rfind(mark, 0, max_chars + 1) for mark in " \n\t")
    if space >= max_chars / 2:
        return text[:space].rstrip()
    end = max_chars
    while end > 0 and unicodedata.category(text[end]).startswith("M"):
        end -= 1
    return text[: end or max_chars].rstrip()


def numbered(passages: Sequence[str]) -> str:
    """The passages one a line, as `[1] text`."""
    return "\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, start=1))
