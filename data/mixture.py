"""Batches out of several sources by weight, as a function of the seed and the step.

Every source has an order of its own and gives its next records whenever it is asked, so its epochs
pass at its own pace. How many records it gives to a batch is drawn by systematic sampling: with
batch size B, shares W and one u in [0, 1) for each batch, the sources up to s together give
floor(B * W_1..s + u) (Madow, "On the theory of systematic sampling, II", 1949). So a batch has
exactly B records, and a source's number is never more than one away from its share.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from drama.data.manifest import Shard
from drama.data.order import LaneOrder
from drama.data.stream import ShardSet
from drama.errors import UserError, nearest

MIX_DRAW = 2**32  # third word of the seed, beyond the windows of any order
DRAWS = 4096  # batches drawn at a time


@dataclass(frozen=True)
class _Group:
    """The records of one source, or of one language of it."""

    name: str  # in metrics and messages
    source: str
    lang: str
    content: str  # a hash of its shards
    starts: np.ndarray  # of each shard: number of its first record in the shard set
    sizes: np.ndarray
    order: LaneOrder

    @property
    def per_epoch(self) -> int:
        return self.order.batches_per_epoch * self.order.lanes

    def take(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next records from a position on: their numbers, epochs, and where in the lanes they
        lie, 0 to 1."""
        numbers, epochs, places = [], [], []
        lanes = self.order.lanes
        while count:
            epoch, at = divmod(position, self.per_epoch)
            part = min(count, self.per_epoch - at)
            first, stop = at // lanes, -(-(at + part) // lanes)
            skip = at - first * lanes
            numbers.append(self.order.batches(epoch, first, stop).T.ravel()[skip : skip + part])
            epochs.append(np.full(part, epoch))
            places.append((at + np.arange(part)) % lanes / lanes)
            position, count = position + part, count - part
        local = np.concatenate(numbers)
        ends = np.cumsum(self.sizes)
        shard = np.searchsorted(ends, local, side="right")
        numbers_of_set = self.starts[shard] + local - (ends[shard] - self.sizes[shard])
        return numbers_of_set, np.concatenate(epochs), np.concatenate(places)


class Mixture:
    """The order of training over weighted sources: any step, for any world size.

    Args:
        shards: as `ShardSet.shards`.
        weights: of each source, in any unit; a source that is not named has weight 1; none at all
            means that each source counts by its records.
        one_source: a batch holds records of one source, drawn with its weight.
        language_alpha: languages share in proportion to (their share) ** alpha, as multilingual
            models are trained: below 1 it lifts the rare ones.

    Raises:
        UserError: a weight of an unknown source, or a source with fewer records than its share of
            one batch.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        batch_size: int,
        seed: int,
        weights: Mapping[str, float],
        one_source: bool = False,
        language_alpha: float | None = None,
        lanes: int = 64,
        block: int = 256,
        window: int = 1024,
    ) -> None:
        self.batch_size, self.seed, self.one_source = batch_size, seed, one_source
        by_language = language_alpha is not None
        self.groups = _groups(shards, seed, by_language, lanes=lanes, block=block, window=window)
        self.shares_G = _shares(self.groups, shards, weights)
        if language_alpha is not None:
            self.shares_G = _tempered(self.groups, self.shares_G, language_alpha)
        self._check_sizes()
        self.batches_per_epoch = max(1, sum(s.records for s in shards) // batch_size)
        edges = np.cumsum(self.shares_G)
        self._edges = np.concatenate(([0.0], edges[:-1] / edges[-1], [1.0]))
        self.first = 0
        self.start_G = np.zeros(len(self.groups), np.int64)
        self._reset()

    def _reset(self) -> None:
        self._milestones = [self.start_G]  # positions at the chunks of draws from `first` on
        self._counts = lru_cache(maxsize=2)(self._draw_counts)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_counts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    # -- what a step takes --------------------------------------------------------------------

    def rank_records(self, step: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Record numbers int64 [n] of one rank and their epochs.

        Raises:
            UserError: more ranks than records of a batch.
        """
        if world_size > self.batch_size:
            raise UserError(f"{world_size} ranks cannot share batches of {self.batch_size}")
        positions_G = self.positions(step)
        counts_G = self._counts(step // DRAWS)[step % DRAWS]
        parts = [
            group.take(int(position), int(count))
            for group, position, count in zip(self.groups, positions_G, counts_G, strict=True)
            if count
        ]
        numbers, epochs, places = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        # neighbours in a lane go to one rank: its reads lie close together
        own = np.array_split(np.argsort(places, kind="stable"), world_size)[rank]
        return numbers[own], epochs[own]

    def positions(self, step: int) -> np.ndarray:
        """How many records each group has given before a step, int64 [G]."""
        if step < self.first:
            raise IndexError(f"step {step} lies before this mixture began, at {self.first}")
        first_chunk, chunk = self.first // DRAWS, step // DRAWS
        while len(self._milestones) <= chunk - first_chunk:
            number = first_chunk + len(self._milestones) - 1
            self._milestones.append(self._milestones[-1] + self._given(number, DRAWS))
        return self._milestones[chunk - first_chunk] + self._given(chunk, step % DRAWS)

    def epochs(self, step: int) -> dict[str, float]:
        """How often each group's records were gone through before a step."""
        return {
            group.name: round(int(position) / group.per_epoch, 4)
            for group, position in zip(self.groups, self.positions(step), strict=True)
        }

    def _given(self, chunk: int, stop: int) -> np.ndarray:
        begin = self.first % DRAWS if chunk == self.first // DRAWS else 0
        given: np.ndarray = self._counts(chunk)[begin:stop].sum(axis=0)
        return given

    def _draw_counts(self, chunk: int) -> np.ndarray:
        """Records of each group in each batch of a chunk, int64 [DRAWS, G]."""
        seeds = np.random.SeedSequence([self.seed, MIX_DRAW, chunk])
        words = np.random.Philox(seeds).random_raw(DRAWS) >> np.uint64(32)
        u = words.astype(np.float64)[:, None] / 2**32  # so coarse that B + u stays below B + 1
        drawn = 1 if self.one_source else self.batch_size
        counts = np.diff(np.floor(drawn * self._edges + u).astype(np.int64), axis=1)
        return counts * (self.batch_size // drawn)

    # -- going on with other sources or weights -----------------------------------------------

    def state(self, step: int) -> dict[str, Any]:
        """What `resume` needs, in plain values."""
        return {
            "first": self.first,
            "start": self._by_name(self.start_G),
            "now": self._by_name(self.positions(step)),
            "shares": self._by_name(self.shares_G),
            "content": {group.name: group.content for group in self.groups},
        }

    def resume(self, state: Mapping[str, Any], step: int) -> list[str]:
        """Go on at a step; return what is not as it was.

        With other sources or weights the old sources go on where they stand, new ones start at
        their beginning, and so does a source whose records were replaced.
        """
        content = {group.name: group.content for group in self.groups}
        shares = self._by_name(self.shares_G)
        if (state["shares"], state["content"]) == (shares, content):
            self.first = int(state["first"])
            self.start_G = np.array([int(state["start"][name]) for name in content])
            self._reset()
            return []
        kept = [name for name in content if state["content"].get(name) == content[name]]
        self.first = step
        self.start_G = np.array(
            [int(state["now"][name]) if name in kept else 0 for name in content], np.int64
        )
        self._reset()
        notes = [f"{name} has other records, it starts anew" for name in content
                 if name in state["content"] and name not in kept]  # fmt: skip
        notes += [f"{name} is new" for name in content if name not in state["content"]]
        notes += [f"{name} is left out" for name in state["content"] if name not in content]
        notes += [
            f"{name} has the share {shares[name]:.4g}, it was {state['shares'][name]:.4g}"
            for name in kept
            if state["shares"][name] != shares[name]
        ]
        return notes

    def _by_name(self, values_G: np.ndarray) -> dict[str, Any]:
        return {g.name: value for g, value in zip(self.groups, values_G.tolist(), strict=True)}

    def _check_sizes(self) -> None:
        for group, share in zip(self.groups, self.shares_G, strict=True):
            records = int(group.sizes.sum())
            part = self.batch_size if self.one_source else math.ceil(self.batch_size * share)
            if part > records:
                raise UserError(
                    f"source {group.name} has {records:,} records, fewer than its part of one "
                    f"batch, {part:,}; lower its weight or train.batch_size"
                )


def training_order(
    shards: ShardSet,
    *,
    batch_size: int,
    seed: int,
    weights: Mapping[str, float],
    one_source: bool,
    language_alpha: float | None,
    lanes: int,
    block: int,
    window: int,
) -> LaneOrder | Mixture:
    """A mixture where weights are given, here or in the manifests, or asked for in another way;
    else all records in one order, each once an epoch.

    Raises:
        UserError: as `Mixture` and `LaneOrder`, or manifests that differ about a weight.
    """
    found: dict[str, float] = {}
    for manifest in shards.manifests:
        for source, weight in manifest.weights.items():
            if source not in weights and found.setdefault(source, weight) != weight:
                raise UserError(
                    f"the shards give source '{source}' the weights {found[source]:g} and "
                    f"{weight:g}; set data.weights"
                )
    found |= weights
    sizes = {"batch_size": batch_size, "lanes": lanes, "block": block, "window": window}
    if found or one_source or language_alpha is not None:
        return Mixture(
            shards.shards,
            seed=seed,
            weights=found,
            one_source=one_source,
            language_alpha=language_alpha,
            **sizes,
        )
    return LaneOrder(shards.shard_sizes, seed=seed, **sizes)


def _groups(shards: Sequence[Shard], seed: int, by_language: bool, **sizes: int) -> list[_Group]:
    starts = np.cumsum([0, *(shard.records for shard in shards)])
    members: dict[tuple[str, str], list[int]] = {}
    for number, shard in enumerate(shards):
        key = (shard.source, shard.lang if by_language else "")
        members.setdefault(key, []).append(number)
    groups = []
    for (source, lang), numbers in sorted(members.items()):
        name = f"{source or '(none)'} [{lang}]" if lang else source or "(none)"
        records = [shards[n].records for n in numbers]
        lanes = _lanes(sizes["lanes"], sum(records))
        own_seed = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
        groups.append(
            _Group(
                name,
                source,
                lang,
                hashlib.sha256("".join(shards[n].sha256 for n in numbers).encode()).hexdigest(),
                starts[numbers],
                np.array(records),
                LaneOrder(
                    records,
                    batch_size=lanes,
                    seed=int.from_bytes(own_seed, "little"),
                    **(sizes | {"lanes": lanes}),
                ),
            )
        )
    return groups


def _lanes(most: int, records: int) -> int:
    """So many lanes that an epoch leaves out few records: those that do not fill the lanes."""
    most = min(most, records)
    return min(range(max(1, most // 2), most + 1), key=lambda lanes: (records % lanes, -lanes))


def _shares(
    groups: Sequence[_Group], shards: Sequence[Shard], weights: Mapping[str, float]
) -> np.ndarray:
    """Of each group, adding up to 1; a source's weight is split over its languages by records."""
    records: Counter[str] = Counter()
    for shard in shards:
        records[shard.source] += shard.records
    for source in weights:
        if source not in records:
            raise UserError(
                f"data.weights names the source '{source}', which the shards do not hold"
                f"{nearest(source, records)}"
            )
    shares_G = np.array(
        [
            group.sizes.sum()
            * (weights.get(group.source, 1.0) / records[group.source] if weights else 1.0)
            for group in groups
        ]
    )
    return shares_G / shares_G.sum()


def _tempered(groups: Sequence[_Group], shares_G: np.ndarray, alpha: float) -> np.ndarray:
    """Shares of languages to the power of alpha; within a language they keep their proportions."""
    _, language_G = np.unique([group.lang for group in groups], return_inverse=True)
    sums_G = np.bincount(language_G, weights=shares_G)[language_G]
    tempered_G = shares_G * sums_G ** (alpha - 1)
    return tempered_G / tempered_G.sum()
