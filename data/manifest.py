"""manifest.json: what a folder of shards holds. Written last, so a folder that has one is whole.

    {"format": "drama-shards", "schema_version": 2, "name": "train",
     "shards": [{"file", "bytes", "sha256", "idx_sha256", "records", "source", "lang"}, ...],
     "weights": {source: share in a mixture},
     "tokens": null | {"tokenizer_sha256", "query_prefix", "document_prefix", "max_tokens"},
     "query_chars": {bound: texts}, "document_chars": {bound: texts},
     "left_out": {reason: rows of the sources},
     "duplicate_queries": null | {"exact": records, "near": records},
     "manifest_sha256": of all the rest, as JSON with sorted keys and without spaces}

A shard holds records of one source and one language. Every record with a query is counted in
`query_chars`, the others are texts without one; of these, `duplicate_queries` counts the texts. A
text of n characters is counted under the smallest power of two that is at least n. The index of
`NAME-000000.tar` is `NAME-000000.idx`, for M members: M + 1 little-endian uint64 byte offsets, of
each member's header and of the end of the last one, then M uint32 CRC-32 of the members' bytes,
then the tar's SHA-256: a reader knows by it that index and manifest belong together, without
reading all of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drama.data.lines import parse_json
from drama.errors import UserError, nearest

FORMAT = "drama-shards"
SCHEMA_VERSION = 2
SHA256_BYTES = 32
DAMAGED = "damaged shard"
MANIFEST = "manifest.json"
CHECKSUM = "manifest_sha256"
NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
MEND = "write the shards again with `drama shard`"


def damaged(where: str | Path, fault: str) -> UserError:
    """The error for shards whose bytes are not what was written."""
    return UserError(f"{where}: {fault}; {MEND}", DAMAGED)


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar: file name inside the folder, size in bytes, SHA-256 of tar and index, records."""

    file: str
    bytes: int
    sha256: str
    idx_sha256: str
    records: int
    source: str = ""
    lang: str = ""

    @property
    def idx_file(self) -> str:
        """The name of the index beside the tar."""
        return self.file.removesuffix(".tar") + ".idx"


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """How the token ids of a folder were made."""

    tokenizer_sha256: str
    query_prefix: str
    document_prefix: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder of shards holds. Histograms map the upper bound in characters to texts."""

    name: str
    shards: tuple[Shard, ...]
    query_chars: dict[int, int]
    document_chars: dict[int, int]
    weights: dict[str, float] = field(default_factory=dict)
    tokens: TokenSettings | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    duplicate_queries: dict[str, int] | None = None

    @property
    def num_records(self) -> int:
        """Records in all shards."""
        return sum(shard.records for shard in self.shards)

    @property
    def num_pairs(self) -> int:
        """Records with a query; the others are texts."""
        return sum(self.query_chars.values())

    @property
    def own_texts(self) -> str:
        """What is looked at when records are searched for those that come twice."""
        if self.num_pairs == self.num_records:
            return "queries"
        return "queries and texts" if self.num_pairs else "texts"

    @property
    def members(self) -> int:
        """Tar members of a record: its JSON, and its token ids where the folder has them."""
        return 2 if self.tokens else 1

    def counts(self, key: str) -> dict[str, int]:
        """Records by `source` or by `lang`, by name."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts[getattr(shard, key)] += shard.records
        return dict(sorted(counts.items()))

    def idx_bytes(self, shard: Shard) -> int:
        """The size of a shard's index."""
        return 12 * shard.records * self.members + 8 + SHA256_BYTES

    def to_json(self) -> dict[str, Any]:
        """The JSON object of manifest.json."""
        value = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(self)}
        for key in ("query_chars", "document_chars"):
            value[key] = {str(bound): count for bound, count in value[key].items()}
        return {**value, CHECKSUM: _checksum(value)}

    def to_bytes(self) -> bytes:
        """The contents of manifest.json."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes, where: str | Path) -> Manifest:
        """Parse and check the contents of a manifest.json.

        Raises:
            UserError: unknown version, or a key that is missing or of the wrong type.
        """
        try:
            return _parse(parse_json(content))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


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
    manifest = Manifest.from_json(path.read_bytes(), path)
    for shard in manifest.shards:
        _check_size(folder / shard.file, shard.bytes)
        _check_size(folder / shard.idx_file, manifest.idx_bytes(shard))
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
    known = ("format", "schema_version", *Manifest.__dataclass_fields__, CHECKSUM)
    for key in value:
        if key not in known:
            raise UserError(f"has the unknown key '{key}'{nearest(key, known)}")
    shards = tuple(_shard(item, i) for i, item in enumerate(_get(value, "shards", list)))
    if not shards:
        raise UserError("names no shards")
    weights = _get(value, "weights", dict)
    for source, weight in weights.items():
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"weights: '{source}' must map to a positive number")
    duplicates = value.get("duplicate_queries")
    manifest = Manifest(
        name=_get(value, "name", str),
        shards=shards,
        query_chars={int(k): n for k, n in _counts(value, "query_chars", r"\d{1,18}").items()},
        document_chars={
            int(k): n for k, n in _counts(value, "document_chars", r"\d{1,18}").items()
        },
        weights=weights,
        tokens=_tokens(value.get("tokens")),
        left_out=_counts(value, "left_out"),
        duplicate_queries=None if duplicates is None else _counts(value, "duplicate_queries"),
    )
    if _get(value, CHECKSUM, str) != _checksum({k: v for k, v in value.items() if k != CHECKSUM}):
        raise UserError(f"was changed since it was written ({CHECKSUM} differs); {MEND}")
    return manifest


def _checksum(value: dict[str, Any]) -> str:
    try:
        content = json.dumps(value, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise UserError("is nested too deeply") from None
    return hashlib.sha256(content.encode()).hexdigest()


def _tokens(value: Any) -> TokenSettings | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise UserError("tokens must be an object or null")
    keys = ("tokenizer_sha256", "query_prefix", "document_prefix")
    texts = {key: _get(value, key, str, "tokens.") for key in keys}
    return TokenSettings(**texts, max_tokens=_get(value, "max_tokens", int, "tokens."))


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
        source=_get(value, "source", str, where),
        lang=_get(value, "lang", str, where),
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
