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

from drama.data.lines import is_url, parse_json
from drama.data.manifest import MANIFEST, Manifest, Shard, TokenSettings, damaged, read_manifest
from drama.data.members import payload_of
from drama.data.records import Record
from drama.data.remote import PieceCache, RemoteFile
from drama.data.tokens import TokenRecord
from drama.errors import UserError

OPEN_SHARDS = 128  # per process; two descriptors would else be held for every shard of a corpus


class _File(Protocol):
    """Bytes of a tar, by place."""

    def pread(self, start: int, end: int) -> bytes: ...

    def forget(self, start: int, end: int) -> bool: ...


class ShardSet:
    """The records of one or several shard folders, numbered from 0 in the order given.

    A folder is a path, or an address that fsspec opens (s3://, gs://, hf://, https://); what is
    read from afar goes through `cache`. Every record is compared with its checksum. Reading may be
    shared by threads and forked workers; a set pickles without its open files.

    Raises:
        UserError: from `read_manifest` for each folder, or an address that does not answer.
    """

    def __init__(self, paths: Sequence[str | Path], cache: PieceCache | None = None) -> None:
        if not paths:
            raise UserError("no folder of shards was given")
        self._cache = cache or PieceCache()
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

    def _make_caches(self) -> None:
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def read(self, index: int) -> Record:
        """The record with this number.

        Raises:
            IndexError: `index` is not in [0, len).
            UserError: damaged data; names the shard, the record in it and its byte offset.
        """
        return Record.trusted(parse_json(bytes(payload_of(memoryview(self._member(index, 0))))))

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
        """Start to fetch what these records need from afar; returns at once."""
        for index in indices:
            number = bisect_right(self._ends, index)
            file, shard, members = self._shards[number]
            if is_url(file):
                row = (index - self._ends[number] + shard.records) * members
                opened = self._open(number)
                start, end = opened.offsets[row], opened.offsets[row + members]
                assert isinstance(opened.file, RemoteFile)
                opened.file.prefetch(start, end)

    def _member(self, index: int, which: int) -> bytes:
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        file, shard, members = self._shards[number]
        row = index - self._ends[number] + shard.records
        opened = self._open(number)
        place = row * members + which
        start, end = opened.offsets[place], opened.offsets[place + 1]
        member = opened.file.pread(start, end)
        if crc32(member) != opened.checksums[place]:
            if opened.file.forget(start, end):  # the copy here may be at fault
                member = opened.file.pread(start, end)
            if len(member) < end - start:
                fault = f"truncated: {len(member)} of {end - start} bytes are there"
                raise damaged(f"{file}: record {row} at byte {start}", fault)
            if crc32(member) != opened.checksums[place]:
                fault = "its checksum differs, these are not the bytes that were written"
                raise damaged(f"{file}: record {row} at byte {start}", fault)
        return member

    def _manifest(self, path: str | Path) -> Manifest:
        if not is_url(path):
            return read_manifest(path)
        address = f"{str(path).rstrip('/')}/{MANIFEST}"
        return Manifest.from_json(self._cache.whole(address), address)

    def _open_shard(self, number: int) -> _OpenShard:
        path, shard, members = self._shards[number]
        if isinstance(path, Path):
            return _OpenShard(
                _LocalFile(path),
                _read_local(path.with_name(shard.idx_file)),
                path.with_name(shard.idx_file),
                shard,
                members,
            )
        address = path.removesuffix(".tar") + ".idx"
        file = RemoteFile(path, shard.bytes, shard.sha256, self._cache)
        index = RemoteFile(address, 12 * shard.records * members + 8, shard.idx_sha256, self._cache)
        content = index.pread(0, index.size)
        if hashlib.sha256(content).hexdigest() != shard.idx_sha256:
            index.forget(0, index.size)  # the copy here may be at fault
            content = index.pread(0, index.size)
        return _OpenShard(file, content, address, shard, members)


class _OpenShard:
    """A shard's bytes, offsets and checksums."""

    def __init__(
        self, file: _File, index: bytes, where: str | Path, shard: Shard, members: int
    ) -> None:
        self.file = file
        if hashlib.sha256(index).hexdigest() != shard.idx_sha256:
            raise damaged(where, "is not the index that the manifest names")
        count = shard.records * members
        # plain integers come out of these three times as fast as out of numpy's arrays
        whole = memoryview(index)
        self.offsets = whole[: 8 * (count + 1)].cast("Q")
        self.checksums = whole[8 * (count + 1) :].cast("I")


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


def _read_local(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
