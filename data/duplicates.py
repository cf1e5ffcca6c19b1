"""How many queries of a corpus come twice, exactly or nearly; of texts without a query, the texts.

Near is a Jaccard similarity of at least 0.8 between the sets of 5-character shingles. Candidates
come from MinHash signatures cut into bands (Broder 1997; Leskovec et al., "Mining of Massive
Datasets", 3.4): 16 minima in 4 bands of 4, in which two queries of similarity 0.8 meet with
probability 0.88 and of 0.9 with 0.99; the first of those that meet is compared with the shingles of
the others, so a chain of queries may be counted too low, and none too high. A query is never
compared with a text. 48 bytes a record on disk.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from drama.data.lines import parse_json
from drama.data.manifest import Manifest
from drama.data.members import payload_of
from drama.data.records import Record, content_id, document_hash64, query_hash64
from drama.data.writer import shard_number

SHINGLE, BANDS, ROWS = 5, 4, 4
THRESHOLD = 0.8
SHOWN = 5
COMPARED_CHARS = 2**16  # of a longer one the beginning: 128 bytes a character are needed

FINGERPRINT = np.dtype(
    [("exact", "<i8"), ("bands", "<u8", (BANDS,)), ("shard", "<u4"), ("row", "<u4")]
)
_RANDOM = np.random.Philox(0).random_raw(2 * BANDS * ROWS + ROWS + SHINGLE) | np.uint64(1)
_MULTIPLY, _ADD = _RANDOM[: BANDS * ROWS, None], _RANDOM[BANDS * ROWS : 2 * BANDS * ROWS, None]
_OF_TEXTS = np.uint64(0x9E3779B97F4A7C15)  # keeps them out of the bands of queries
_MIX, _POWERS = _RANDOM[2 * BANDS * ROWS :][:ROWS], _RANDOM[2 * BANDS * ROWS + ROWS :]


@dataclass(frozen=True)
class Duplicates:
    """Queries that came before, exactly or nearly, and a few of the near ones with their twin."""

    exact: int
    near: int
    examples: list[tuple[str, str]]


def _folded(query: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", query).casefold().split())[:COMPARED_CHARS]


def fingerprint(record: Record) -> bytes:
    """The record's entry for `count_duplicates`, its place not yet filled in."""
    text = _folded(record.own_text)
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint64)
    if len(codes) < SHINGLE:
        codes = np.pad(codes, (0, SHINGLE - len(codes)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, SHINGLE)
    shingles = (windows * _POWERS).sum(axis=1, dtype=np.uint64)
    minima = ((shingles * _MULTIPLY + _ADD) >> np.uint64(32)).min(axis=1)
    entry = np.zeros(1, FINGERPRINT)
    entry["bands"] = (minima.reshape(BANDS, ROWS) * _MIX).sum(axis=1, dtype=np.uint64)
    if record.is_text:
        entry["exact"] = document_hash64(content_id("", record.own_text))
        entry["bands"] ^= _OF_TEXTS
    else:
        entry["exact"] = query_hash64(record.query)
    return entry.tobytes()


def place(entry: bytes, shard: int, row: int) -> bytes:
    """The entry with the place of its record."""
    return entry[:-8] + shard.to_bytes(4, "little") + row.to_bytes(4, "little")


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the shingles of two queries or texts."""
    sets = []
    for text in (_folded(a), _folded(b)):
        count = max(1, len(text) - SHINGLE + 1)
        sets.append({text[i : i + SHINGLE] for i in range(count)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def count_duplicates(path: Path, query_at: Callable[[int, int], str]) -> Duplicates:
    """Count from a file of entries; `query_at(shard, row)` reads a query for the comparison.

    A query counts once, however many queries before it are like it.
    """
    if not path.stat().st_size:
        return Duplicates(0, 0, [])
    entries = np.memmap(path, FINGERPRINT, "r")
    exact = entries["exact"]
    _, first = np.unique(exact, return_index=True)
    is_first = np.zeros(len(exact), bool)
    is_first[first] = True
    near = np.zeros(len(exact), bool)
    examples: list[tuple[str, str]] = []
    for band in range(BANDS):
        numbers = np.flatnonzero(is_first & ~near)  # an exact copy is no near one
        values = entries["bands"][numbers, band]
        order = np.argsort(values, kind="stable")
        numbers, values = numbers[order], values[order]
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
        ends = np.r_[starts[1:], len(values)]
        for start, end in zip(starts, ends, strict=True):
            if end - start == 1:
                continue
            twin = query_at(*_place(entries[numbers[start]]))
            for number in numbers[start + 1 : end]:
                query = query_at(*_place(entries[number]))
                if similarity(twin, query) >= THRESHOLD:
                    near[number] = True
                    if len(examples) < SHOWN:
                        examples.append((twin, query))
    return Duplicates(len(exact) - len(first), int(near.sum()), examples)


class OwnTexts:
    """Reads the query, or the text without one, at a place of shards that were just written."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.members = folder, manifest.members
        self.files = {shard_number(shard.file): shard for shard in manifest.shards}
        self._open = lru_cache(maxsize=64)(self._open_shard)

    def __call__(self, shard: int, row: int) -> str:
        tar, offsets = self._open(shard)
        start, end = offsets[row * self.members : row * self.members + 2]
        member = memoryview(os.pread(tar.fileno(), int(end - start), int(start)))
        return Record.trusted(parse_json(bytes(payload_of(member)))).own_text

    def _open_shard(self, number: int) -> tuple[IO[bytes], np.ndarray]:
        shard = self.files[number]
        tar = (self.folder / shard.file).open("rb", buffering=0)
        count = shard.records * self.members + 1
        return tar, np.memmap(self.folder / shard.idx_file, "<u8", "r", shape=count)


def _place(entry: np.void) -> tuple[int, int]:
    return int(entry["shard"]), int(entry["row"])
