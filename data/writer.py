"""Records into a folder of shards: one open tar for each source and language.

The bytes depend on the records and their keys only. The writer's position is a few numbers, so
that a long job can go on after a kill: `position` while writing, `FolderWriter.resume` after.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any
from zlib import crc32

import numpy as np

from drama.console import progress
from drama.data.manifest import MANIFEST, NAME_PATTERN, Manifest, Shard, TokenSettings, is_ours
from drama.data.members import end_of_tar, make_member
from drama.data.records import Record
from drama.data.tokens import TokenRecord
from drama.errors import UserError
from drama.files import replacing, replacing_folder

OPEN_FILES = 64
READ_BYTES = 2**20
PROGRESS_EVERY = 500


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """A record as it goes into a tar, and what the manifest counts of it."""

    source: str
    lang: str
    members: tuple[bytes, ...]
    checksums: tuple[int, ...]
    query_chars: int | None  # a text has no query
    document_chars: tuple[int, ...]

    @classmethod
    def of(cls, record: Record, key: int, tokens: TokenRecord | None = None) -> EncodedRecord:
        """Members `KEY.json` and, with token ids, `KEY.tok`."""
        value = record.to_json()
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        members = [make_member(f"{key:010d}.json", text)]
        if tokens is not None:
            members.append(make_member(f"{key:010d}.tok", tokens.to_bytes()))
        return cls(
            record.source,
            record.lang,
            tuple(members),
            tuple(map(crc32, members)),
            None if record.is_text else bucket(len(record.query)),
            tuple(
                bucket(len(d.title) + len(d.text)) for d in (*record.positives, *record.negatives)
            ),
        )


class _OpenShard:
    """One tar that is being written."""

    def __init__(self, folder: Path, file: str, source: str, lang: str) -> None:
        self.path, self.source, self.lang = folder / file, source, lang
        self.sha256 = hashlib.sha256()
        self.offsets, self.checksums, self.records = array("Q", [0]), array("I"), 0
        self.file: IO[bytes] = self.path.open("wb")

    @property
    def size(self) -> int:
        return self.offsets[-1]

    def _opened(self) -> IO[bytes]:
        if self.file.closed:
            self.file = self.path.open("ab")
        return self.file

    def write(self, record: EncodedRecord) -> None:
        file = self._opened()
        for member in record.members:
            file.write(member)
            self.sha256.update(member)
            self.offsets.append(self.size + len(member))
        self.checksums.extend(record.checksums)
        self.records += 1

    def _write_index(self, path: Path, of_tar: bytes) -> str:
        offsets, checksums = np.array(self.offsets, "<u8"), np.array(self.checksums, "<u4")
        content = offsets.tobytes() + checksums.tobytes() + of_tar
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def close(self) -> Shard:
        end, file = end_of_tar(self.size), self._opened()
        file.write(end)
        self.sha256.update(end)
        _sync(file)
        file.close()
        idx_sha256 = self._write_index(self.path.with_suffix(".idx"), self.sha256.digest())
        return Shard(
            file=self.path.name,
            bytes=self.size + len(end),
            sha256=self.sha256.hexdigest(),
            idx_sha256=idx_sha256,
            records=self.records,
            source=self.source,
            lang=self.lang,
        )

    def position(self) -> dict[str, Any]:
        parked, file = self.file.closed, self._opened()
        _sync(file)
        if parked:
            file.close()
        self._write_index(self.path.with_suffix(".idx.open"), b"")
        return {
            "file": self.path.name,
            "source": self.source,
            "lang": self.lang,
            "records": self.records,
        }

    @classmethod
    def resume(cls, folder: Path, at: dict[str, Any], members: int) -> _OpenShard:
        shard = cls.__new__(cls)
        shard.path = folder / at["file"]
        shard.source, shard.lang, shard.records = at["source"], at["lang"], at["records"]
        count = shard.records * members
        content = shard.path.with_suffix(".idx.open").read_bytes()
        # the index may be newer than the journal
        total = (len(content) - 8) // 12
        offsets = np.frombuffer(content, "<u8", total + 1)[: count + 1]
        checksums = np.frombuffer(content, "<u4", total, 8 * (total + 1))[:count]
        shard.offsets, shard.checksums = array("Q", offsets), array("I", checksums)
        shard.sha256 = hashlib.sha256()
        cut_back(shard.path, shard.size)
        shard.file = shard.path.open("r+b")
        while part := shard.file.read(READ_BYTES):
            shard.sha256.update(part)
        return shard


class FolderWriter:
    """Writes `folder/NAME-000000.tar`, ... with their indices, then, at the end, the manifest.

    A shard is closed before the record that would take it over `shard_bytes`.

    Raises:
        UserError: a bad name or size.
    """

    def __init__(
        self, folder: Path, name: str, shard_bytes: int, tokens: TokenSettings | None = None
    ) -> None:
        check_name(name)
        if shard_bytes < 1:
            raise UserError(f"shard_bytes is {shard_bytes}; it must be at least 1")
        self.folder, self.name, self.shard_bytes, self.tokens = folder, name, shard_bytes, tokens
        self.open: dict[tuple[str, str], _OpenShard] = {}
        self._hot: dict[tuple[str, str], _OpenShard] = {}  # written to lately, the last one last
        self.closed: list[Shard] = []
        self.num_shards = self.num_records = 0
        self.query_chars: Counter[int] = Counter()
        self.document_chars: Counter[int] = Counter()

    def add(self, record: EncodedRecord) -> tuple[int, int]:
        """Write a record; return its shard's number and its row there."""
        group = (record.source, record.lang)
        shard = self.open.get(group)
        size = sum(map(len, record.members))
        if shard is not None and shard.size + size > self.shard_bytes:
            self.closed.append(shard.close())
            shard = None
        if shard is None:
            file = f"{self.name}-{self.num_shards:06d}.tar"
            shard = _OpenShard(self.folder, file, *group)
            self.num_shards += 1
        self.open[group] = shard
        shard.write(record)
        self._hot.pop(group, None)
        self._hot[group] = shard
        if len(self._hot) > OPEN_FILES:  # a corpus may have hundreds of languages
            self._hot.pop(next(iter(self._hot))).file.close()
        self.num_records += 1
        if record.query_chars is not None:
            self.query_chars[record.query_chars] += 1
        self.document_chars.update(record.document_chars)
        return shard_number(shard.path.name), shard.records - 1

    def finish(self, **about: Any) -> Manifest:
        """Close every shard and return the manifest; `write_manifest` makes the folder whole.

        Raises:
            UserError: not one record was written.
        """
        if not self.num_records:
            raise UserError("no records to write")
        self.closed += [shard.close() for shard in self.open.values()]
        self.open.clear()
        self._hot.clear()
        return Manifest(
            name=self.name,
            shards=tuple(sorted(self.closed, key=lambda shard: shard_number(shard.file))),
            query_chars=dict(sorted(self.query_chars.items())),
            document_chars=dict(sorted(self.document_chars.items())),
            tokens=self.tokens,
            **about,
        )

    def abandon(self) -> None:
        """Close the files; what was written stays for `resume`."""
        for shard in self.open.values():
            shard.file.close()

    def position(self) -> dict[str, Any]:
        """Bring everything to the disk, and say where the writer stands, in plain values."""
        return {
            "open": [shard.position() for shard in self.open.values()],
            "closed": [asdict(shard) for shard in self.closed],
            "num_shards": self.num_shards,
            "num_records": self.num_records,
            "query_chars": list(self.query_chars.items()),
            "document_chars": list(self.document_chars.items()),
        }

    def resume(self, at: dict[str, Any]) -> None:
        """Go on from a position; what was written after it is cut off.

        Raises:
            OSError: the files are not those of the position.
        """
        self.num_shards, self.num_records = at["num_shards"], at["num_records"]
        self.query_chars, self.document_chars = (
            Counter(dict(map(tuple, at[key]))) for key in ("query_chars", "document_chars")
        )
        self.closed = [Shard(**shard) for shard in at["closed"]]
        for closed in self.closed:
            if (self.folder / closed.file).stat().st_size != closed.bytes:
                raise OSError(f"{closed.file} is not the one that was closed")
            (self.folder / closed.idx_file).stat()
        members = 2 if self.tokens else 1
        for opened in at["open"]:
            shard = _OpenShard.resume(self.folder, opened, members)
            shard.file.close()  # opened again by the next record
            self.open[(shard.source, shard.lang)] = shard


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json: from now on the folder is one of shards."""
    with replacing(folder / MANIFEST) as path:
        path.write_bytes(manifest.to_bytes())


def check_name(name: str) -> None:
    """Refuse what is no name of shards.

    Raises:
        UserError: says which characters are.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"shard name '{name}': use letters, digits, '.', '_' and '-' only")


def check_target(out: Path) -> None:
    """Refuse to write where something else than shards stands.

    Raises:
        UserError: `out` holds something that is not shards.
    """
    if out.exists() and not (out.is_dir() and (is_ours(out) or not any(out.iterdir()))):
        raise UserError(f"{out} exists and is no folder of shards; choose another or remove it")


def write_shards(
    records: Iterable[Record],
    out: str | Path,
    *,
    name: str = "train",
    shard_bytes: int = 256 * 2**20,
) -> Manifest:
    """Write records of this process as shards, without token ids.

    The folder appears whole or not at all; an older folder of shards at `out` is replaced.
    `shard_sources` does the same for files, in parallel and so that it can be stopped.

    Raises:
        UserError: no records, bad name or size, or `out` holds something that is not shards.
    """
    out = Path(out).resolve()
    check_target(out)
    with replacing_folder(out) as folder, progress() as bar:
        writer = FolderWriter(folder, name, shard_bytes)
        task = bar.add_task(f"shard {name}", total=None, note="")
        try:
            for number, record in enumerate(records):
                writer.add(EncodedRecord.of(record, number))
                if number % PROGRESS_EVERY == 0:
                    bar.update(task, completed=number + 1, note=record.source)
            manifest = writer.finish()
        finally:
            writer.abandon()
        write_manifest(folder, manifest)
        total, note = manifest.num_records, f"{len(manifest.shards)} shards"
        bar.update(task, completed=total, total=total, note=note)
    return manifest


def cut_back(path: Path, size: int) -> None:
    """Cut a file to what it held at some moment.

    Raises:
        OSError: it holds less (truncating would fill it with zeros).
    """
    if path.stat().st_size < size:
        raise OSError(f"{path} has fewer than {size} bytes")
    os.truncate(path, size)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def shard_number(file: str) -> int:
    """7 of NAME-000007.tar."""
    return int(file.removesuffix(".tar").rsplit("-", 1)[1])


def bucket(chars: int) -> int:
    """The smallest power of two that is at least the number of characters."""
    return 1 << max(chars - 1, 0).bit_length()
