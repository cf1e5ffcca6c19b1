"""Shards read by record number, from a disk or from afar."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import numpy as np

from drama.data.lines import is_url, parse_json
from drama.data.manifest import (
    MANIFEST,
    SHA256_BYTES,
    Manifest,
    Shard,
    TokenSettings,
    damaged,
    read_manifest,
)
from drama.data.members import payload_of
from drama.data.records import Record
from drama.data.remote import PieceCache, RemoteFile
from drama.data.tokens import TokenRecord
from drama.errors import UserError

OPEN_SHARDS = 256  # per process; a descriptor would else be held for every shard of a corpus
INDEX_ROWS = 256  # records whose places are read at a time: a block of the order
INDEX_BLOCKS = 4096  # of these are kept, 6 KB each: what the windows of 64 lanes go through


class _File(Protocol):
    """Bytes of a tar, by place."""

    def pread(self, start: int, end: int) -> bytes: ...

    def forget(self, start: int, end: int) -> bool: ...


class ShardSet:
    """The records of one or several shard folders, numbered from 0 in the order given.

    A folder is a path, or an address that fsspec opens (s3://, gs://, hf://, https://); what is
    read from afar goes through `cache`. Every record is compared with its checksum. Reading may be
    shared by threads and forked workers; a set pickles without its open files.

    sources: names of the records' sources, sorted; "(none)" for those without one.

    Raises:
        UserError: from `read_manifest` for each folder, or an address that does not answer.
    """

    def __init__(self, paths: Sequence[str | Path], cache: PieceCache | None = None) -> None:
        if not paths:
            raise UserError("no folder of shards was given")
        self.cache = cache or PieceCache()
        self.manifests = [self._manifest(path) for path in paths]
        self._shards: list[tuple[str | Path, Shard, int]] = []
        for path, manifest in zip(paths, self.manifests, strict=True):
            folder = str(path).rstrip("/") if is_url(path) else Path(path)
            for shard in manifest.shards:
                file = folder / shard.file if isinstance(folder, Path) else f"{folder}/{shard.file}"
                self._shards.append((file, shard, manifest.members))
        self.shards = [shard for _, shard, _ in self._shards]
        self.shard_sizes = [shard.records for shard in self.shards]
        self._ends = list(accumulate(self.shard_sizes))
        names = [shard.source or "(none)" for shard in self.shards]
        self.sources = sorted(set(names))
        self._source_S = np.searchsorted(self.sources, names).astype(np.int64)
        self.is_remote = any(is_url(file) for file, _, _ in self._shards)
        self._make_caches()

    @property
    def tokens(self) -> TokenSettings | None:
        """How the token ids were made, if every folder has them, made in the same way."""
        found = {manifest.tokens for manifest in self.manifests}
        return found.pop() if len(found) == 1 else None

    @property
    def sha256(self) -> list[str]:
        """For each folder, a hash of what its records are."""
        return [
            hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
            for manifest in self.manifests
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    def source_numbers(self, indices: np.ndarray) -> np.ndarray:
        """For each record number the place of its source in `sources`, int64."""
        return self._source_S[np.searchsorted(self._ends, indices, side="right")]

    def _make_caches(self) -> None:
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        self._places = lru_cache(maxsize=INDEX_BLOCKS)(self._read_places)

    def __getstate__(self) -> dict[str, Any]:
        caches = ("_open", "_places")
        return {key: value for key, value in self.__dict__.items() if key not in caches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def read(self, index: int) -> Record:
        """The record with this number.

        Raises:
            IndexError: `index` is not in [0, len).
            UserError: damaged data; names the shard, the record in it and its byte offset.
        """
        payload = payload_of(memoryview(self._member(index, 0)))
        try:
            return Record.trusted(parse_json(bytes(payload)))
        except (UserError, KeyError, TypeError, ValueError):
            number, row = self._place(index)
            fault = "no record of this version, though its checksum fits"
            raise damaged(f"{self._shards[number][0]}: record {row}", fault) from None

    def read_tokens(self, index: int) -> TokenRecord:
        """The token ids of the record with this number, in a set that has `tokens`.

        Raises:
            IndexError, UserError: as `read`.
        """
        return TokenRecord.from_bytes(payload_of(memoryview(self._member(index, 1))))

    def read_token_member(self, index: int) -> bytes:
        """The tar member that holds the token ids, for `TokenRecords`.

        Raises:
            IndexError, UserError: as `read`.
        """
        return self._member(index, 1)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Start to fetch what these records need from afar; returns at once. A fault shows when the
        record is read."""
        self.cache.background(lambda: self._prefetch(list(indices)))

    def _prefetch(self, indices: Sequence[int]) -> None:
        for index in indices:
            number, row = self._place(index)
            file, members = self._open(number), self._shards[number][2]
            if isinstance(file, RemoteFile):
                offsets, _ = self._places(number, row // INDEX_ROWS)
                place = row % INDEX_ROWS * members
                file.prefetch(offsets[place], offsets[place + members])

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the shard, and row in it."""
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return number, index - self._ends[number] + self._shards[number][1].records

    def _member(self, index: int, which: int) -> bytes:
        number, row = self._place(index)
        member, fault = self._read(number, row, which)
        if fault and self._forget(number, row, which):  # the copy here may be at fault
            member, fault = self._read(number, row, which)
        if fault:
            path = self._shards[number][0]
            raise damaged(
                f"{path}: record {row} at byte {self._span(number, row, which)[0]}", fault
            )
        return member

    def _read(self, number: int, row: int, which: int) -> tuple[bytes, str]:
        """A member's bytes and what is wrong with them."""
        start, end, checksum = self._span(number, row, which)
        if not start < end <= self._shards[number][1].bytes:
            return b"", "its index leads elsewhere"
        member = self._open(number).pread(start, end)
        if len(member) < end - start:
            return b"", f"truncated: {len(member)} of {end - start} bytes are there"
        if crc32(member) != checksum:
            return b"", "its checksum differs, these are not the bytes that were written"
        return member, ""

    def _forget(self, number: int, row: int, which: int) -> bool:
        """Drop the copies of a member and its place; whether there were any."""
        file = self._open(number)
        if not isinstance(file, RemoteFile):
            return False
        self._index(number).forget(0, self._index_bytes(number))
        self._places.cache_clear()
        start, end, _ = self._span(number, row, which)
        return file.forget(start, min(end, file.size))

    def _span(self, number: int, row: int, which: int) -> tuple[int, int, int]:
        """Start, end and CRC-32 of a member."""
        offsets, checksums = self._places(number, row // INDEX_ROWS)
        place = row % INDEX_ROWS * self._shards[number][2] + which
        return offsets[place], offsets[place + 1], checksums[place]

    def _read_places(self, number: int, block: int) -> tuple[memoryview, memoryview]:
        """Offsets and checksums of some neighbouring records, a whole index being megabytes.

        Nothing else vouches for an index here: places that are wrong give bytes whose checksum
        differs.
        """
        _, shard, members = self._shards[number]
        count = shard.records * members
        first = block * INDEX_ROWS * members
        stop = min(first + INDEX_ROWS * members, count)
        index, checksums_at = self._index(number), 8 * (count + 1)
        spans = ((8 * first, 8 * (stop + 1)), (checksums_at + 4 * first, checksums_at + 4 * stop))
        expected = 12 * (stop - first) + 8
        offsets, checksums = (index.pread(*span) for span in spans)
        whole = len(offsets) + len(checksums) == expected
        if not whole and index.forget(0, self._index_bytes(number)):  # the copy may be at fault
            offsets, checksums = (index.pread(*span) for span in spans)
        if len(offsets) + len(checksums) != expected:
            raise damaged(f"{self._shards[number][0]}", "its index is truncated")
        # plain integers come out of these three times as fast as out of numpy's arrays
        return memoryview(offsets).cast("Q"), memoryview(checksums).cast("I")

    def _manifest(self, path: str | Path) -> Manifest:
        if not is_url(path):
            return read_manifest(path)
        address = f"{str(path).rstrip('/')}/{MANIFEST}"
        return Manifest.from_json(self.cache.whole(address), address)

    def _open_shard(self, number: int) -> _File:
        path, shard, _ = self._shards[number]
        self._check_index(number)
        if isinstance(path, Path):
            return _LocalFile(path)
        return RemoteFile(path, shard.bytes, shard.sha256, self.cache)

    def _check_index(self, number: int) -> None:
        """Manifest and index belong together; else an older copy of either would go unnoticed."""
        path, shard, _ = self._shards[number]
        index, end = self._index(number), self._index_bytes(number)
        start = end - SHA256_BYTES
        if index.pread(start, end).hex() != shard.sha256:
            if index.forget(start, end) and index.pread(start, end).hex() == shard.sha256:
                return
            where = str(path).removesuffix(".tar") + ".idx"
            raise damaged(where, "is not the index that the manifest names")

    def _index(self, number: int) -> _File:
        path, shard, _ = self._shards[number]
        if isinstance(path, Path):
            return _LocalFile(path.with_name(shard.idx_file))
        address = path.removesuffix(".tar") + ".idx"
        return RemoteFile(address, self._index_bytes(number), shard.idx_sha256, self.cache)

    def _index_bytes(self, number: int) -> int:
        _, shard, members = self._shards[number]
        return 12 * shard.records * members + 8 + SHA256_BYTES


def open_pairs(paths: Sequence[str | Path], cache: PieceCache | None = None) -> ShardSet:
    """Shards to train a retriever on, whose records must have queries.

    Raises:
        UserError: see `ShardSet`; a folder that holds texts without a query.
    """
    shards = ShardSet(paths, cache)
    for path, manifest in zip(paths, shards.manifests, strict=True):
        if texts := manifest.num_records - manifest.num_pairs:
            raise UserError(
                f"{path}: {texts:,} of its {manifest.num_records:,} records are texts without a "
                "query, which launchers/recover.py reads; for a retriever give records with queries"
            )
    return shards


class _LocalFile:
    """A file read by place; closed when the last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        self._path = path

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def pread(self, start: int, end: int) -> bytes:
        try:
            return os.pread(self._fd, end - start, start)
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error.strerror}") from None

    def forget(self, start: int, end: int) -> bool:
        return False
