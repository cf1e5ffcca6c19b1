"""Write records as WebDataset shards, and check shards that were written.

One member `KEY.json` a record, KEY its running number. The bytes depend on the records only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import webdataset

from drama.console import progress
from drama.data.manifest import (
    MANIFEST,
    NAME_PATTERN,
    Manifest,
    Shard,
    damaged,
    is_ours,
    read_manifest,
)
from drama.data.records import Record
from drama.data.stream import ShardSet, member_bytes
from drama.errors import UserError
from drama.files import replacing, replacing_folder

PROGRESS_EVERY = 500


def write_shards(
    records: Iterable[Record],
    out: str | Path,
    *,
    name: str = "train",
    shard_bytes: int = 256 * 2**20,
) -> Manifest:
    """Write `out/NAME-000000.tar`, ... with their indices, then `out/manifest.json`.

    A shard is closed before the record that would take it over `shard_bytes`. The folder appears
    whole or not at all; an older folder of shards at `out` is replaced.

    Raises:
        UserError: no records, bad name or size, or `out` holds something that is not shards.
    """
    out = Path(out).resolve()
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"shard name '{name}': use letters, digits, '.', '_' and '-' only")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes is {shard_bytes}; it must be at least 1")
    if out.exists() and not (out.is_dir() and (is_ours(out) or not any(out.iterdir()))):
        raise UserError(f"{out} exists and is no folder of shards; choose another or remove it")
    with replacing_folder(out) as folder:
        manifest = _write(records, folder, name, shard_bytes)
        with replacing(folder / MANIFEST) as path:
            path.write_text(json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n")
    return manifest


def verify(folder: str | Path) -> Manifest:
    """Read every record and compare every SHA-256 with the manifest.

    Raises:
        UserError: names the shard, and where one record is at fault its number and byte offset.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    records = ShardSet([folder])
    index = 0
    with progress() as bar:
        task = bar.add_task("verify", total=len(records), note="")
        for shard in manifest.shards:
            for _ in range(shard.records):
                records.read(index)
                index += 1
            for file, expected in ((shard.file, shard.sha256), (shard.idx_file, shard.idx_sha256)):
                with (folder / file).open("rb") as handle:
                    if hashlib.file_digest(handle, "sha256").hexdigest() != expected:
                        raise damaged(folder / file, "its SHA-256 differs from the manifest's")
            bar.update(task, completed=index, note=shard.file)
    return manifest


class _HashingFile:
    """A file for writing that knows the SHA-256 of what went into it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class _ShardWriter:
    """One tar and its index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hashing = _HashingFile(path.open("wb"))
        self.tar = webdataset.TarWriter(
            self.hashing, user="", group="", mode=0o444, mtime=0, encoder=False, compress=False
        )
        self.offsets = [0]

    def write(self, number: int, payload: bytes) -> None:
        self.tar.write({"__key__": f"{number:010d}", "json": payload})
        self.offsets.append(self.offsets[-1] + member_bytes(len(payload)))

    def close(self) -> Shard:
        self.tar.close()
        self.hashing.close()
        idx = _HashingFile(self.path.with_suffix(".idx").open("wb"))
        idx.write(np.array(self.offsets, dtype="<u8").tobytes())
        idx.close()
        return Shard(
            file=self.path.name,
            bytes=self.path.stat().st_size,
            sha256=self.hashing.sha256.hexdigest(),
            idx_sha256=idx.sha256.hexdigest(),
            records=len(self.offsets) - 1,
        )


def _write(records: Iterable[Record], folder: Path, name: str, shard_bytes: int) -> Manifest:
    shards: list[Shard] = []
    sources: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    query_chars: Counter[int] = Counter()
    document_chars: Counter[int] = Counter()
    writer: _ShardWriter | None = None
    number = -1
    with progress() as bar:
        task = bar.add_task(f"shard {name}", total=None, note="")
        try:
            for number, record in enumerate(records):
                value = record.to_json()
                payload = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
                if writer and writer.offsets[-1] + member_bytes(len(payload)) > shard_bytes:
                    shards.append(writer.close())
                    writer = None
                writer = writer or _ShardWriter(folder / f"{name}-{len(shards):06d}.tar")
                writer.write(number, payload)
                sources[record.source] += 1
                languages[record.lang] += 1
                query_chars[_bucket(record.query)] += 1
                for document in (*record.positives, *record.negatives):
                    document_chars[_bucket(document.title + document.text)] += 1
                if number % PROGRESS_EVERY == 0:
                    bar.update(task, completed=number + 1, note=record.source)
            if writer is None:
                raise UserError("no records to write")
            shards.append(writer.close())
        finally:
            if writer is not None:
                writer.tar.close()
                writer.hashing.file.close()
        bar.update(task, completed=number + 1, total=number + 1, note=f"{len(shards)} shards")
    return Manifest(
        name=name,
        shards=tuple(shards),
        sources=dict(sorted(sources.items())),
        languages=dict(sorted(languages.items())),
        query_chars=dict(sorted(query_chars.items())),
        document_chars=dict(sorted(document_chars.items())),
    )


def _bucket(text: str) -> int:
    """The smallest power of two that is at least the number of characters."""
    return 1 << max(len(text) - 1, 0).bit_length()
