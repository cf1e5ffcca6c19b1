"""Orders and yes or no lists over numbered passages: read, repaired, and put together.

Passages are numbered from 1 in prompts and answers, from 0 in what is returned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from drama.augment.answers import Dropped, Reason
from drama.augment.cleaning import answer_text
from drama.augment.loose_json import loose_objects

_ID = r"[\[(【]?\s{0,2}\d{1,6}\s{0,2}[\])】]?"
_BEFORE = r"-?>=?|≥|＞|≻|→|&gt;=?"
_CHAIN = re.compile(rf"{_ID}(?:\s{{0,2}}(?:{_BEFORE}|=)\s{{0,2}}{_ID})+")
_ORDERED = re.compile(_BEFORE)  # "1 = 5" alone is no order
_BRACKETED = re.compile(r"[\[【]\s{0,2}(\d+)\s{0,2}[\]】]")
# "1. Passage 3": a rank and what holds it
_RANKED = re.compile(r"^\W{0,4}(?:rank )?(\d{1,3})\W{1,3}[^\d\n]{0,40}?(\d+)", re.M | re.I)
_NUMBER = re.compile(r"\d+")
_WHOLE_NUMBER = re.compile(r"(?<![\d.])\d+(?!\.?\d)")
_NAME = r"(?:passage|document|doc|text)"
_BETWEEN = re.compile(
    rf"(?:[\s,，、;>＞≥=\[\]【】()*#]|\n[ \t]{{0,8}}[-•]|\band\b|\bthen\b|\b{_NAME}\b)+",
    re.IGNORECASE,
)
_NAMED = re.compile(rf"\b{_NAME}[\W_]{{0,3}}$", re.IGNORECASE)
# "the top 5", whose list begins on the next line
_COUNTED = re.compile(r"[^\W\d_][ \t]{0,2}$")
_MARK = re.compile(
    r"[\[(【]\s{0,2}(\d+)\s{0,2}[\])】]"
    r"|(?<![\w.,])(\d{1,4})\s{0,2}(?=[:.)\]=|、：\-–—]|\s(?:yes|no)\b)",
    re.IGNORECASE,
)
_CLEAR = re.compile(r"\b(?:(yes|true)|no|(?<!not\s)false)\b", re.IGNORECASE)
# as the first word, and not the name of what follows: "relevant: no"
_RELEVANT = re.compile(r"^[\W_]*relevant\b(?!\W{0,3}[:：=?？])", re.IGNORECASE)
_DENIED = re.compile(
    r"\b(?:irrelevant|non-?relevant)\b"
    r"|(?:\b(?:not|never)|n['’]t)\s(?!only\b|just\b|merely\b)(?:\w{1,12}\s){0,3}relevant\b",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\b(?:not|never|no|lacks?|lacking|without|hardly|barely|partly|partially|somewhat|slightly"
    r"|only|but|perhaps|maybe|may|might|possibly|though|although|however|unless|neither|nor)\b"
    r"|n['’]t\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Ranking:
    """A permutation of the passages, the best first, and how much of it the answer gave.

    given: passages that the answer placed. The others follow in their old order. repeated and
    out_of_range: numbers that were dropped.
    """

    order: tuple[int, ...]
    given: int
    repeated: int = 0
    out_of_range: int = 0

    @property
    def missing(self) -> int:
        """Passages that the answer left out."""
        return len(self.order) - self.given

    @property
    def is_repaired(self) -> bool:
        """Whether the answer was anything but a permutation."""
        return bool(self.missing or self.repeated or self.out_of_range)


def parse_ranking(answer: str, num_passages: int) -> Ranking | Dropped:
    """The order in an answer to "rerank", repaired as in RankGPT.

    Numbers count where they stand in a chain (`[3] > [1]`), else in brackets, else in a list of
    ranks, else in the longest run of numbers. Of equally long chains or runs the last one counts,
    with which a model corrects itself. Repeats and numbers beyond the passages are dropped.
    """
    text = answer_text(answer)
    if not text:
        return Dropped(Reason.EMPTY)
    seen: dict[int, None] = {}
    repeated = out_of_range = 0
    for digits in _ids(text, num_passages):
        place = int(digits) - 1 if len(digits) < 9 else num_passages
        if not 0 <= place < num_passages:
            out_of_range += 1
        elif place in seen:
            repeated += 1
        else:
            seen[place] = None
    if not seen:
        return Dropped(Reason.NO_RANKING)
    rest = [place for place in range(num_passages) if place not in seen]
    return Ranking((*seen, *rest), len(seen), repeated, out_of_range)


def parse_labels(answer: str, num_passages: int) -> tuple[bool | None, ...] | Dropped:
    """For each passage whether an answer to "relabel" calls it relevant; None where it is silent,
    hedges, or says both.

    Without any numbers, as many answers as there are passages are taken in their order.
    """
    text = answer_text(answer)
    if not text:
        return Dropped(Reason.EMPTY)
    said: list[set[bool]] = [set() for _ in range(num_passages)]
    for digits, label in _numbered_labels(text):
        place = int(digits) - 1 if len(digits) < 9 else num_passages
        if 0 <= place < num_passages:
            said[place].add(label)
    if not any(said):
        labels = _listed_labels(text, num_passages)
        if len(labels) != num_passages or all(label is None for label in labels):
            return Dropped(Reason.NO_LABELS)
        return tuple(labels)
    return tuple(next(iter(labels)) if len(labels) == 1 else None for labels in said)


class Windows:
    """Reranking of more passages than one call takes: RankGPT's window, from the end to the front.

        windows = Windows(100)
        while places := windows.places:
            windows.take(parse_ranking(ask([passages[place] for place in places]), len(places)))
        windows.order

    With 100 passages, a window of 20 and a step of 10 these are 9 calls. Where the number of
    passages does not fit, the last window still begins with the first passage.
    """

    def __init__(self, num_passages: int, window: int = 20, step: int = 10) -> None:
        assert 0 < step <= window, "passages between two windows would be left out"
        self.order: list[int] = list(range(num_passages))
        self.dropped = 0  # windows without an answer of use, which kept their order
        self._window = window
        self._step = step
        self._start = max(num_passages - window, 0)
        self._done = num_passages < 2

    @property
    def places(self) -> tuple[int, ...]:
        """The passages of the next call, best first so far; none when all is done."""
        if self._done:
            return ()
        return tuple(self.order[self._start : self._start + self._window])

    def take(self, answer: Ranking | Dropped) -> None:
        """Put the passages of `places` into the order of the answer, and move on."""
        places = self.places
        if isinstance(answer, Ranking):
            assert len(answer.order) == len(places)
            window = slice(self._start, self._start + len(places))
            self.order[window] = [places[place] for place in answer.order]
        else:
            self.dropped += 1
        self._done = self._start == 0
        self._start = max(self._start - self._step, 0)


def _ids(text: str, num_passages: int) -> list[str]:
    chains = [_NUMBER.findall(chain) for chain in _CHAIN.findall(text) if _ORDERED.search(chain)]
    if chains:
        return max(reversed(chains), key=len)
    if bracketed := _BRACKETED.findall(text):
        return bracketed
    ranked = _RANKED.findall(text)
    if len(ranked) > 1 and [int(rank) for rank, _ in ranked] == list(range(1, len(ranked) + 1)):
        return [held for _, held in ranked]
    return _longest_run(text, num_passages)


def _longest_run(text: str, num_passages: int) -> list[str]:
    """The numbers with nothing but commas and the like between them. One number is no order of
    several passages, unless it is the only one and named: "Passage 2"."""
    numbers = list(_WHOLE_NUMBER.finditer(text))
    if not numbers:
        return []
    runs = [[numbers[0][0]]]
    for before, number in pairwise(numbers):
        between = text[before.end() : number.start()]
        ahead = text[max(before.start() - 20, 0) : before.start()]
        is_count = (
            len(runs[-1]) == 1
            and "\n" in between
            and "," not in between
            and _COUNTED.search(ahead)
            and not _NAMED.search(ahead)
        )
        if _BETWEEN.fullmatch(between) and not is_count:
            runs[-1].append(number[0])
        else:
            runs.append([number[0]])
    longest = max(reversed(runs), key=len)
    is_named = len(numbers) == 1 and _NAMED.search(text[: numbers[0].start()][-20:])
    return longest if len(longest) > 1 or num_passages == 1 or is_named else []


def _numbered_labels(text: str) -> list[tuple[str, bool]]:
    found: list[tuple[str, bool]] = []
    for value in loose_objects(text):
        for key, said in value.items():
            number = _NUMBER.search(str(key))
            label = _label(str(said)) if number else None
            if number and label is not None:
                found.append((number[0], label))
    if found:
        return found
    marks: Sequence[re.Match[str]] = list(_MARK.finditer(text))
    for mark, after in zip(marks, [*marks[1:], None], strict=False):
        part = text[mark.end() : after.start() if after else len(text)].split("\n\n")[0]
        label = _label(part)
        if label is not None:
            found.append((mark[1] or mark[2], label))
    return found


def _listed_labels(text: str, num_passages: int) -> list[bool | None]:
    """The labels of an answer without numbers, a part or a word each."""
    parts = [
        part
        for part in re.split(r"[\n,;.]", text)
        if _CLEAR.search(part) or "relevant" in part.casefold()
    ]
    if len(parts) == num_passages and all(len(_CLEAR.findall(part)) < 2 for part in parts):
        return [_label(part) for part in parts]
    if "relevant" in text.casefold():
        return []
    return [found[1] is not None for found in _CLEAR.finditer(text)]


def _label(part: str) -> bool | None:
    """What is said of one passage; None where that is nothing, or no clear yes or no."""
    if first := _RELEVANT.search(part):
        sentence = re.split(r"[.;\n]", part[first.end() :])[0]
        return None if _HEDGE.search(sentence) else True
    clear, denied = _CLEAR.search(part), _DENIED.search(part)
    if denied and (not clear or denied.start() <= clear.start()):
        # "not irrelevant"
        return None if _HEDGE.search(part[: denied.start()]) else False
    if not clear:
        return None
    if clear[1] is None:
        return False
    return None if _HEDGE.search(part[: clear.start()]) else True  # "not true"
