"""Which ranks of a teacher's list become positives and hard negatives.

Ma et al. 2025, "DRAMA" (arXiv 2502.18460), section 3.1: for crops and generated queries the teacher
retrieves 50 documents, ranks 1 to 10 are positives and 30 to 50 hard negatives; for reranked ones
it retrieves 20, rank 1 is the positive and 10 to 20 are hard negatives. Ranks count from 1, both
ends included.

The filter is that of Moreira et al. 2024, "NV-Retriever" (arXiv 2407.15831), TopK-PercPos: a
candidate that scores above a share of the positive's score is probably a positive itself. They
recommend 95 %; the DRAMA paper has no such filter.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from drama.errors import UserError

Ranks = tuple[int, int]
Own = Literal["ranked", "out"]
COPY, OWN, NEAR = "copy of another", "the query's own document", "scores near the positive"


def spell_ranks(ranks: Ranks) -> str:
    """(30, 50) as `30-50`: what `parse_ranks` reads."""
    return f"{ranks[0]}-{ranks[1]}"


def parse_ranks(text: str) -> Ranks:
    """`30-50` as (30, 50); `1` as (1, 1).

    Raises:
        UserError: anything else.
    """
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", text)
    if match is None:
        raise UserError(f"'{text}' is no range; write FIRST-LAST, for example 30-50")
    return int(match[1]), int(match[2] or match[1])


@dataclass(frozen=True)
class Windows:
    """How a ranking is cut.

    depth: documents that are retrieved.
    positives: their ranks; None where positives are given (mining).
    negatives: their ranks; in mining, after the given positives were taken out of the list.
    share: drop negatives that score above this part of the lowest positive's score, so that it
        holds for whichever positive training draws; None drops none.
    own: the document that a query was made from. "ranked": it is a positive where its rank is one,
        like any other; the paper takes the ranks as they are and says nothing of it. "out": it is
        never a positive. It is a negative in neither case.

    Raises:
        UserError: ranks that do not ascend, overlap, or lie beyond the depth; a share that is not
            above 0 and at most 1.
    """

    depth: int = 50
    positives: Ranks | None = (1, 10)
    negatives: Ranks = (30, 50)
    share: float | None = None
    own: Own = "ranked"

    def __post_init__(self) -> None:
        for name, ranks in (("positives", self.positives), ("negatives", self.negatives)):
            if ranks is not None and not 1 <= ranks[0] <= ranks[1] <= self.depth:
                raise UserError(
                    f"{name} {spell_ranks(ranks)}: ranks ascend from 1 to the depth, which is "
                    f"{self.depth}"
                )
        if self.positives is not None and self.positives[1] >= self.negatives[0]:
            raise UserError(
                f"positives {spell_ranks(self.positives)} must end before negatives "
                f"{spell_ranks(self.negatives)} begin"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise UserError(f"positive-aware share {self.share:g}: above 0 and at most 1, as 0.95")


PAPER = Windows()
RERANK = Windows(depth=20, positives=(1, 1), negatives=(10, 20))
MINING = Windows(depth=50, positives=None, negatives=(1, 20), share=0.95)


@dataclass(frozen=True)
class Chosen:
    """Places in a ranking, from 0.

    own_rank: where the query's own text stands, from 1; 0 for deeper than the list, None where
        there is none. left_out: candidates for negatives that are none, by reason.
    """

    positives: list[int]
    negatives: list[int]
    own_rank: int | None
    left_out: Counter[str] = field(default_factory=Counter)


def choose(
    windows: Windows, contents: Sequence[int], scores: Sequence[float], own: int | None
) -> Chosen:
    """Cut a ranking, best first, into positives and negatives.

    Equal texts under other ids count as one: the first of several positives stays, and none
    becomes a negative.

    Args:
        contents: for each rank, what equal texts have in common. scores: the teacher's.
        own: the content of the document that the query was made from; None where none is known.
    """
    assert windows.positives is not None
    first, last = windows.positives
    positives: list[int] = []
    taken = {own} if own is not None and windows.own == "out" else set()
    for place in range(first - 1, min(last, len(contents))):
        if contents[place] not in taken:
            taken.add(contents[place])
            positives.append(place)
    own_rank: int | None = next((rank for rank, c in enumerate(contents, 1) if c == own), 0)
    if own is None:
        own_rank = None
    if not positives:
        return Chosen([], [], own_rank)
    lowest = min(scores[place] for place in positives)
    negatives, left_out = choose_negatives(windows, contents, scores, taken, lowest, own=own)
    return Chosen(positives, negatives, own_rank, left_out)


def choose_negatives(
    windows: Windows,
    contents: Sequence[int],
    scores: Sequence[float],
    positives: Collection[int],
    lowest: float,
    own: int | None = None,
) -> tuple[list[int], Counter[str]]:
    """The places of the negatives, and why others in their window are none, by count.

    Args:
        positives: contents that cannot be negatives. lowest: the lowest score of a positive.
    """
    limit = math.inf
    if windows.share is not None:  # the same part below the positive where that is negative
        limit = lowest * (windows.share if lowest > 0 else 2 - windows.share)
    taken, places = set(positives), []
    left_out: Counter[str] = Counter()
    first, last = windows.negatives
    for place in range(first - 1, min(last, len(contents))):
        if contents[place] == own:
            left_out[OWN] += 1
        elif contents[place] in taken:
            left_out[COPY] += 1
        elif scores[place] > limit:
            left_out[NEAR] += 1
        else:
            taken.add(contents[place])
            places.append(place)
    return places, left_out
