"""Orders and yes or no lists over numbered passages: read, repaired, and put together.

Passages are numbered from 1 in prompts and answers, from 0 in what is returned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from drama.augment.answers import Dropped, Reason
from drama.augment.cleaning import answer_text
from drama.augment.loose_json import loose_objects

_ID = r"[\[(【]?\s{0,2}\d{1,6}\s{0,2}[\])】]?"
_CHAIN = re.compile(rf"{_ID}(?:\s{{0,2}}(?:-?>|＞|≻|→|&gt;)\s{{0,2}}{_ID})+")
_BRACKETED = re.compile(r"[\[【]\s{0,2}(\d+)\s{0,2}[\]】]")
# "1. Passage 3": a rank and what holds it
_RANKED = re.compile(r"^\W{0,4}(?:rank )?(\d{1,3})\W{1,3}[^\d\n]{0,40}?(\d+)", re.M | re.I)
_NUMBER = re.compile(r"\d+")
_MARK = re.compile(
    r"[\[(【]\s{0,2}(\d+)\s{0,2}[\])】]"
    r"|(?<![\w.,])(\d{1,4})\s{0,2}(?=[:.)\]=|、：\-–—]|\s(?:yes|no)\b)",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"\b(yes|true|relevant)\b|\b(?:no|false|irrelevant|non-relevant)\b"
    r"|(?:\bnot|n['’]t)\s(?:\w{1,12}\s)?relevant\b",
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
    ranks, else anywhere. Repeats and numbers beyond the passages are dropped.
    """
    text = answer_text(answer)
    if not text:
        return Dropped(Reason.EMPTY)
    seen: dict[int, None] = {}
    repeated = out_of_range = 0
    for digits in _ids(text):
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
    """For each passage whether an answer to "relabel" calls it relevant; None where it is silent or
    says both.

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
        labels = [_is_yes(found) for found in _LABEL.finditer(text)]
        if len(labels) != num_passages:
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


def _ids(text: str) -> list[str]:
    if chains := _CHAIN.findall(text):
        longest = max(chains, key=lambda chain: len(_NUMBER.findall(chain)))
        return _NUMBER.findall(longest)
    if bracketed := _BRACKETED.findall(text):
        return bracketed
    ranked = _RANKED.findall(text)
    if len(ranked) > 1 and [int(rank) for rank, _ in ranked] == list(range(1, len(ranked) + 1)):
        return [held for _, held in ranked]
    return _NUMBER.findall(text)


def _numbered_labels(text: str) -> list[tuple[str, bool]]:
    found: list[tuple[str, bool]] = []
    for value in loose_objects(text):
        for key, label in value.items():
            number = _NUMBER.search(str(key))
            match = _LABEL.search(str(label)) if number else None
            if number and match:
                found.append((number[0], _is_yes(match)))
    if found:
        return found
    marks: Sequence[re.Match[str]] = list(_MARK.finditer(text))
    for mark, after in zip(marks, [*marks[1:], None], strict=False):
        part = text[mark.end() : after.start() if after else len(text)].split("\n\n")[0]
        if match := _LABEL.search(part):
            found.append((mark[1] or mark[2], _is_yes(match)))
    return found


def _is_yes(found: re.Match[str]) -> bool:
    return found[1] is not None
