"""manifest.json: what a folder of shards holds. Written last, so a folder that has one is whole.

    {"format": "drama-shards", "schema_version": 1, "name": "train",
     "shards": [{"file", "bytes", "sha256", "idx_sha256", "records"}, ...],
     "sources": {name: records}, "languages": {code: records},
     "query_chars": {bound: texts}, "document_chars": {bound: texts}}

A text of n characters is counted under the smallest power of two that is at least n. The index of
`NAME-000000.tar` is `NAME-000000.idx`: records + 1 little-endian uint64 byte offsets, of each
member's header and of the end of the last member.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drama.data.lines import parse_json
from drama.errors import UserError

FORMAT = "drama-shards"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
MEND = "write the shards again with `drama shard`"


def damaged(where: str | Path, fault: str) -> UserError:
    """The error for shards whose bytes are not what was written."""
    return UserError(f"{where}: {fault}; {MEND}")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar: file name inside the folder, size in bytes, SHA-256 of tar and index, records."""

    file: str
    bytes: int
    sha256: str
    idx_sha256: str
    records: int

    @property
    def idx_file(self) -> str:
        """The name of the index beside the tar."""
        return self.file.removesuffix(".tar") + ".idx"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder of shards holds. Histograms map the upper bound in characters to texts."""

    name: str
    shards: tuple[Shard, ...]
    sources: dict[str, int]
    languages: dict[str, int]
    query_chars: dict[int, int]
    document_chars: dict[int, int]

    @property
    def num_records(self) -> int:
        """Records in all shards."""
        return sum(shard.records for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of manifest.json."""
        return {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(self)}


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a folder's manifest and the presence and size of every file it names.

    Raises:
        UserError: no folder or manifest, unknown version, wrong type, missing or truncated file.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of shards: there is no such folder")
    if not path.is_file():
        raise UserError(
            f"{folder} has no {MANIFEST}: it is no folder of shards, or its writing did not end; "
            f"{MEND}"
        )
    try:
        value = parse_json(path.read_bytes())
        manifest = _parse(value)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for shard in manifest.shards:
        _check_size(folder / shard.file, shard.bytes)
        _check_size(folder / shard.idx_file, 8 * (shard.records + 1))
    return manifest


def is_ours(folder: Path) -> bool:
    """Whether the folder holds a manifest of ours, of whatever version."""
    try:
        value = parse_json((folder / MANIFEST).read_bytes())
    except (OSError, UserError):
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


def _parse(value: Any) -> Manifest:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"is no manifest of shards (its 'format' is not '{FORMAT}')")
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"has schema version {version}; this program reads version {SCHEMA_VERSION}; {MEND}"
        )
    shards = tuple(_shard(item, i) for i, item in enumerate(_get(value, "shards", list)))
    if not shards:
        raise UserError("names no shards")
    return Manifest(
        name=_get(value, "name", str),
        shards=shards,
        sources=_counts(value, "sources"),
        languages=_counts(value, "languages"),
        query_chars={int(k): n for k, n in _counts(value, "query_chars", r"\d+").items()},
        document_chars={int(k): n for k, n in _counts(value, "document_chars", r"\d+").items()},
    )


def _shard(value: Any, number: int) -> Shard:
    where = f"shards[{number}]."
    if not isinstance(value, dict):
        raise UserError(f"shards[{number}] must be an object")
    file = _get(value, "file", str, where)
    if not re.fullmatch(NAME_PATTERN + r"-\d{6,}\.tar", file):
        raise UserError(f"{where}file '{file}' is no shard name")
    records = _get(value, "records", int, where)
    if records < 1:
        raise UserError(f"{where}records is {records}")
    return Shard(
        file=file,
        bytes=_get(value, "bytes", int, where),
        sha256=_get(value, "sha256", str, where),
        idx_sha256=_get(value, "idx_sha256", str, where),
        records=records,
    )


def _get(value: dict[str, Any], key: str, kind: type, where: str = "") -> Any:
    item = value.get(key)
    if not isinstance(item, kind) or isinstance(item, bool):
        raise UserError(f"{where}{key} is missing or of the wrong type (expected {kind.__name__})")
    return item


def _counts(value: dict[str, Any], key: str, pattern: str = "(?s).*") -> dict[str, int]:
    counts = _get(value, key, dict)
    for name, count in counts.items():
        if not re.fullmatch(pattern, name) or type(count) is not int:
            raise UserError(f"{key}: '{name}' must map to a number of texts")
    return counts


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise damaged(path, "missing, but the manifest names it")
    actual = path.stat().st_size
    if actual != size:
        fault = "truncated" if actual < size else "too long"
        raise UserError(f"{fault}: {path} has {actual} bytes, manifest says {size}; {MEND}")
