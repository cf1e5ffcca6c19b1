"""Whole folders of shards: check, join, and turn back into JSON lines."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import lzma
import shutil
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast
from zlib import crc32

import numpy as np

from drama.console import progress
from drama.data.lines import parse_json
from drama.data.manifest import MANIFEST, Manifest, Shard, damaged, read_manifest
from drama.data.members import check_member
from drama.data.records import Record
from drama.data.stream import ShardSet
from drama.data.tokens import TokenRecord
from drama.data.writer import check_name, check_target, write_manifest
from drama.errors import UserError
from drama.files import replacing, replacing_folder


def verify(folder: str | Path) -> Manifest:
    """Read every record as a stranger's and compare every checksum with the manifest.

    Raises:
        UserError: names the shard, and where one record is at fault its number and byte offset.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if (folder / MANIFEST).read_bytes() != manifest.to_bytes():
        raise damaged(folder / MANIFEST, "its bytes are not those that were written")
    done = 0
    with progress() as bar:
        task = bar.add_task("verify", total=manifest.num_records, note="")
        for shard in manifest.shards:
            path = folder / shard.file
            index = path.with_suffix(".idx").read_bytes()
            if hashlib.sha256(index).hexdigest() != shard.idx_sha256:
                raise damaged(path.with_suffix(".idx"), "its SHA-256 differs from the manifest's")
            count = shard.records * manifest.members
            offsets = np.frombuffer(index, "<u8", count + 1).tolist()
            checksums = np.frombuffer(index, "<u4", count, 8 * (count + 1)).tolist()
            if offsets[0] or offsets[-1] > shard.bytes or sorted(offsets) != offsets:
                raise damaged(path.with_suffix(".idx"), "its places do not follow one another")
            with path.open("rb") as file:
                for row in range(shard.records):
                    places = range(row * manifest.members, (row + 1) * manifest.members)
                    try:
                        spans = [(offsets[i], offsets[i + 1], checksums[i]) for i in places]
                        _check(file, spans, shard)
                    except UserError as error:
                        where = f"{path}: record {row} at byte {offsets[places[0]]}"
                        raise damaged(where, str(error)) from None
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise damaged(path, "its SHA-256 differs from the manifest's")
            done += shard.records
            bar.update(task, completed=done, note=shard.file)
    return manifest


def _check(file: IO[bytes], spans: Sequence[tuple[int, int, int]], shard: Shard) -> None:
    record: Record | None = None
    for (start, end, checksum), suffix in zip(spans, (".json", ".tok"), strict=False):
        file.seek(start)
        member = file.read(end - start)
        payload = check_member(member, suffix)
        if record is None:
            record = Record.from_json(parse_json(payload))
            if (record.source, record.lang) != (shard.source, shard.lang):
                raise UserError("it is of another source or language than its shard")
        else:
            _check_tokens(record, payload)
        if crc32(member) != checksum:
            raise UserError("its checksum differs, these are not the bytes that were written")


def _check_tokens(record: Record, payload: bytes) -> None:
    try:
        tokens = TokenRecord.from_bytes(payload)
        rows = [row.tolist() for row in tokens.rows()]
        whole = TokenRecord.of(record, rows).to_bytes() == payload
    except (ValueError, OverflowError, MemoryError, struct.error):
        whole = False
    if not whole:
        raise UserError("its token ids do not belong to its texts")


def merge(folders: Sequence[str | Path], out: str | Path, name: str = "train") -> Manifest:
    """Copy the shards of several folders into one, and join their manifests.

    Raises:
        UserError: folders that are damaged or tokenised in different ways, or `out` is taken.
    """
    out = Path(out).resolve()
    check_target(out)
    check_name(name)
    manifests = [read_manifest(folder) for folder in folders]
    if out in {Path(folder).resolve() for folder in folders}:
        raise UserError(f"{out} is one of the folders to be merged; give another --out")
    if len({manifest.tokens for manifest in manifests}) > 1:
        raise UserError("the folders were tokenised in different ways; shard their sources again")
    weights: dict[str, float] = {}
    for manifest in manifests:
        for source, weight in manifest.weights.items():
            if weights.setdefault(source, weight) != weight:
                raise UserError(
                    f"source '{source}' has weight {weights[source]:g} and {weight:g}; shard it "
                    "without weights and set them in the recipe"
                )
    shards: list[Shard] = []
    with replacing_folder(out) as target, progress() as bar:
        task = bar.add_task("merge", total=sum(len(m.shards) for m in manifests), note="")
        for folder, manifest in zip(folders, manifests, strict=True):
            for shard in manifest.shards:
                copy = dataclasses.replace(shard, file=f"{name}-{len(shards):06d}.tar")
                shutil.copyfile(Path(folder) / shard.file, target / copy.file)
                shutil.copyfile(Path(folder) / shard.idx_file, target / copy.idx_file)
                shards.append(copy)
                bar.update(task, advance=1, note=copy.file)
        merged = Manifest(
            name=name,
            shards=tuple(shards),
            query_chars=_sum([manifest.query_chars for manifest in manifests]),
            document_chars=_sum([manifest.document_chars for manifest in manifests]),
            weights=weights,
            tokens=manifests[0].tokens,
            left_out=_sum([manifest.left_out for manifest in manifests]),
        )
        write_manifest(target, merged)
    return merged


def _sum(counts: Sequence[dict[Any, int]]) -> dict[Any, int]:
    total: Counter[Any] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def to_jsonl(folders: Sequence[str | Path], out: str | Path) -> int:
    """Write the records as JSON lines, packed as the name says (.gz, .xz, .zst); return how many.

    Raises:
        UserError: damaged shards, or `out` is no file.
    """
    records, out = ShardSet(folders), Path(out)
    check_file(out)
    with replacing(out) as temporary, progress() as bar:
        task = bar.add_task("convert", total=len(records), note=out.name)
        with packed(temporary, out.suffix) as file:
            for index in range(len(records)):
                value = records.read(index).to_json()
                file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
                if index % 500 == 0:
                    bar.update(task, completed=index)
        bar.update(task, completed=len(records))
    return len(records)


def check_file(out: Path) -> None:
    """Refuse what no file can take the place of.

    Raises:
        UserError: a folder or a device.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the name of a file, for example {out}/all.jsonl")
    if out.exists() and not out.is_file():  # a rename would replace a device
        raise UserError(f"{out} is no plain file; give the name of one")


def packed(path: Path, suffix: str) -> IO[bytes]:
    """Open a file for writing, packed as a suffix says: .gz, .xz or .zst; else plain."""
    if suffix == ".gz":
        # no name and no date inside: the same bytes for the same records
        return cast(IO[bytes], gzip.GzipFile("", "wb", fileobj=path.open("wb"), mtime=0))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(path, "wb"))
    if suffix == ".zst":
        import pyarrow

        return cast(IO[bytes], pyarrow.CompressedOutputStream(str(path), "zstd"))
    return path.open("wb")
