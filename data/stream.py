"""Read shards by record number, and the order in which training reads them.

Shapes: L lanes, P records of one batch in one lane, W records of one window.
"""

from __future__ import annotations

import os
import tarfile
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from drama.data.lines import parse_json
from drama.data.manifest import Shard, damaged, read_manifest
from drama.data.records import Record
from drama.errors import UserError

TAR_BLOCK = 512
OPEN_SHARDS = 128  # per process; two descriptors would else be held for every shard of a corpus

# Third word of the seed of every draw; windows count on from WINDOW_DRAW.
BLOCK_DRAW = 0
WINDOW_DRAW = 1


def member_bytes(payload_bytes: int) -> int:
    """Bytes of a tar member: its header and its contents, padded to whole tar blocks."""
    return TAR_BLOCK + -(-payload_bytes // TAR_BLOCK) * TAR_BLOCK


class ShardSet:
    """The records of one or several shard folders, numbered from 0 in the order given.

    Reading is one `pread` at the index's offset, so that it may be shared by threads and forked
    workers; it pickles without its open files.

    Raises:
        UserError: from `read_manifest` for each folder.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        if not paths:
            raise UserError("no folder of shards was given")
        self._shards = [
            (Path(path) / shard.file, shard)
            for path in paths
            for shard in read_manifest(path).shards
        ]
        self.shard_sizes = [shard.records for _, shard in self._shards]
        self._ends = list(accumulate(self.shard_sizes))
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_OpenShard)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_OpenShard)

    def read(self, index: int) -> Record:
        """The record with this number.

        Raises:
            IndexError: `index` is not in [0, len).
            UserError: damaged data; names the shard, the record in it and its byte offset.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        path, shard = self._shards[number]
        row = index - (self._ends[number] - shard.records)
        opened = self._open(path, shard)
        start, end = int(opened.offsets[row]), int(opened.offsets[row + 1])
        try:
            return Record.from_json(parse_json(_payload(opened.pread(start, end), end - start)))
        except UserError as error:
            raise damaged(f"{path}: record {row} at byte {start}", str(error)) from None


class _OpenShard:
    """A shard's descriptor and its offsets, closed when the last reader lets go of it."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self._fd = -1
        self.offsets = _read_offsets(path.with_name(shard.idx_file), shard)
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def pread(self, start: int, end: int) -> bytes:
        return os.pread(self._fd, end - start, start)


def _read_offsets(path: Path, shard: Shard) -> np.ndarray:
    try:
        offsets = np.fromfile(path, dtype="<u8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    sound = (
        len(offsets) == shard.records + 1
        and offsets[0] == 0
        and offsets[-1] <= shard.bytes
        and bool((offsets[1:] > offsets[:-1]).all())
    )
    if not sound:
        raise damaged(path, "its offsets do not fit the shard")
    return offsets


def _payload(member: bytes, expected: int) -> bytes:
    """The contents of one tar member, whose header is checked."""
    if len(member) < expected:
        raise UserError(f"truncated: {len(member)} of {expected} bytes are there")
    try:
        info = tarfile.TarInfo.frombuf(member[:TAR_BLOCK], "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise UserError(f"broken tar header: {error}") from None
    if not info.isreg() or not info.name.endswith(".json") or "/" in info.name:
        raise UserError(f"the tar member '{info.name}' is no plain .json file")
    if member_bytes(info.size) != expected:
        raise UserError(f"the tar member has {info.size} bytes, the index leaves {expected}")
    return member[TAR_BLOCK : TAR_BLOCK + info.size]


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
        start, end = batch * self.per_lane, (batch + 1) * self.per_lane
        windows = range(start // self.window, (end - 1) // self.window + 1)
        rows_LW = np.concatenate([self._window_LW(epoch, window) for window in windows], axis=1)
        skip = windows.start * self.window
        return rows_LW[:, start - skip : end - skip]

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
