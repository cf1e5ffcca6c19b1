"""The order in which training reads a corpus: a function of seed and epoch only.

Shapes: L lanes, P records of one batch in one lane, W records of one window.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from drama.errors import UserError

# Third word of the seed of every draw; windows count on from WINDOW_DRAW.
BLOCK_DRAW = 0
WINDOW_DRAW = 1


class LaneOrder:
    """The order of training: a function of (seed, epoch), whatever the world size.

    Blocks (`block` consecutive records of one shard) are shuffled over the whole corpus and laid
    end to end; that sequence is cut into `lanes` equal runs; inside a lane, records are shuffled
    within consecutive windows of `window`. A batch takes the next `batch_size / lanes` records of
    every lane. So reading stays nearly sequential, two shards can feed 64 lanes, and (epoch,
    batch) is the whole position.

    In a corpus with fewer than `4 * lanes` blocks the blocks are shorter. The last
    `num_records % batch_size` records of an epoch's sequence are left out; blocks being shuffled,
    each epoch leaves out others.

    Draws are sorted raw words of the Philox generator: numpy keeps these the same from version to
    version, which it does not promise for `permutation`.

    Args:
        shard_sizes: records of each shard, in the order of `ShardSet.shard_sizes`.
        batch_size: records of a global batch, a multiple of `lanes`.

    Raises:
        UserError: sizes that do not fit, with the numbers.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        lanes: int = 64,
        block: int = 256,
        window: int = 1024,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("lanes", lanes),
            ("block", block),
            ("window", window),
        ):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative")
        if batch_size % lanes:
            below = batch_size // lanes * lanes
            near = f"{below} or {below + lanes}" if below else str(lanes)
            raise UserError(
                f"batch_size {batch_size} is no multiple of the {lanes} lanes; take {near}"
            )
        num_records = sum(shard_sizes)
        if num_records < batch_size:
            raise UserError(
                f"the corpus has {num_records} records, fewer than one batch of {batch_size}; "
                "take a smaller batch_size or more data"
            )
        self.seed = seed
        self.lanes = lanes
        self.window = window
        self.per_lane = batch_size // lanes
        self.batches_per_epoch = num_records // batch_size
        block = max(1, min(block, num_records // (4 * lanes)))
        self._starts, self._lengths = _blocks(shard_sizes, block)
        self._make_caches()

    def _make_caches(self) -> None:
        self._sequence = lru_cache(maxsize=2)(self._draw_sequence)
        self._window_LW = lru_cache(maxsize=2)(self._draw_window)

    def __getstate__(self) -> dict[str, Any]:
        caches = ("_sequence", "_window_LW")
        return {key: value for key, value in self.__dict__.items() if key not in caches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def indices(self, epoch: int, batch: int) -> np.ndarray:
        """Record numbers int64 [L, P] of a global batch.

        Raises:
            IndexError: `batch` is not in [0, batches_per_epoch).
        """
        if not 0 <= batch < self.batches_per_epoch:
            raise IndexError(f"batch {batch} of {self.batches_per_epoch}")
        return self.batches(epoch, batch, batch + 1)

    def batches(self, epoch: int, first: int, stop: int) -> np.ndarray:
        """Record numbers int64 [L, (stop - first) * P] of consecutive batches of an epoch."""
        start, end = first * self.per_lane, stop * self.per_lane
        windows = range(start // self.window, (end - 1) // self.window + 1)
        rows_LW = np.concatenate([self._window_LW(epoch, window) for window in windows], axis=1)
        skip = windows.start * self.window
        return rows_LW[:, start - skip : end - skip]

    def rank_records(self, step: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Record numbers int64 [n] of one rank for a step of an endless run, and their epochs.

        Raises:
            UserError: more ranks than lanes.
        """
        epoch, batch = divmod(step, self.batches_per_epoch)
        indices = self.rank_indices(epoch, batch, rank, world_size)
        return indices, np.full(len(indices), epoch)

    def rank_indices(self, epoch: int, batch: int, rank: int, world_size: int) -> np.ndarray:
        """Record numbers int64 [n] of one rank: lanes rank, rank + world_size, ... in order.

        Raises:
            UserError: more ranks than lanes.
        """
        if world_size > self.lanes:
            raise UserError(
                f"{world_size} ranks cannot share {self.lanes} lanes; take lanes >= {world_size}"
            )
        if not 0 <= rank < world_size:
            raise IndexError(f"rank {rank} of {world_size}")
        return self.indices(epoch, batch)[rank::world_size].ravel()

    def _draw_sequence(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """First record and end position of each block, in the epoch's order."""
        order = np.argsort(self._words(epoch, BLOCK_DRAW, len(self._starts)), kind="stable")
        return self._starts[order], np.cumsum(self._lengths[order])

    def _draw_window(self, epoch: int, window: int) -> np.ndarray:
        """Record numbers [L, W] of one window of every lane, shuffled within each lane."""
        run = self.batches_per_epoch * self.per_lane
        begin, end = window * self.window, min((window + 1) * self.window, run)
        words = self._words(epoch, WINDOW_DRAW + window, self.lanes * (end - begin))
        shuffle_LW = np.argsort(words.reshape(self.lanes, -1), axis=1, kind="stable")
        position_LW = np.arange(self.lanes)[:, None] * run + begin + shuffle_LW
        starts, ends = self._sequence(epoch)
        block_LW = np.searchsorted(ends, position_LW, side="right")
        before_LW = np.where(block_LW > 0, ends[block_LW - 1], 0)
        indices_LW = starts[block_LW] + position_LW - before_LW
        indices_LW.flags.writeable = False  # it is cached
        return indices_LW

    def _words(self, epoch: int, draw: int, count: int) -> np.ndarray:
        seeds = np.random.SeedSequence([self.seed, epoch, draw])
        return np.random.Philox(seeds).random_raw(count)


def _blocks(shard_sizes: Sequence[int], block: int) -> tuple[np.ndarray, np.ndarray]:
    """First record and length of every block; none crosses the end of a shard."""
    starts, lengths = [], []
    first = 0
    for size in shard_sizes:
        offsets = np.arange(0, size, block, dtype=np.int64)
        starts.append(first + offsets)
        lengths.append(np.minimum(block, size - offsets))
        first += size
    return np.concatenate(starts), np.concatenate(lengths)
