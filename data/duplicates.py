"""How many queries of a corpus come twice, exactly or nearly.

Near is a Jaccard similarity of at least 0.8 between the sets of 5-character shingles. Candidates
come from MinHash signatures cut into bands (Broder 1997; Leskovec et al., "Mining of Massive
Datasets", 3.4): 16 minima in 4 bands of 4, in which two queries of similarity 0.8 meet with
probability 0.88 and of 0.9 with 0.99; the first of those that meet is compared in full with the
others, so a chain of queries may be counted too low, and none too high. 48 bytes a record on disk.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drama.data.records import query_hash64

SHINGLE, BANDS, ROWS = 5, 4, 4
THRESHOLD = 0.8
SHOWN = 5
FINGERPRINTED_CHARS = 2**16  # of a longer query the beginning: 128 bytes a character are needed

FINGERPRINT = np.dtype(
    [("exact", "<i8"), ("bands", "<u8", (BANDS,)), ("shard", "<u4"), ("row", "<u4")]
)
_RANDOM = np.random.Philox(0).random_raw(2 * BANDS * ROWS + ROWS + SHINGLE) | np.uint64(1)
_MULTIPLY, _ADD = _RANDOM[: BANDS * ROWS, None], _RANDOM[BANDS * ROWS : 2 * BANDS * ROWS, None]
_MIX, _POWERS = _RANDOM[2 * BANDS * ROWS :][:ROWS], _RANDOM[2 * BANDS * ROWS + ROWS :]


@dataclass(frozen=True)
class Duplicates:
    """Queries that came before, exactly or nearly, and a few of the near ones with their twin."""

    exact: int
    near: int
    examples: list[tuple[str, str]]


def _folded(query: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", query).casefold().split())


def fingerprint(query: str) -> bytes:
    """The query's entry for `count_duplicates`, its place not yet filled in."""
    text = _folded(query)[:FINGERPRINTED_CHARS]
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint64)
    if len(codes) < SHINGLE:
        codes = np.pad(codes, (0, SHINGLE - len(codes)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, SHINGLE)
    shingles = (windows * _POWERS).sum(axis=1, dtype=np.uint64)
    minima = ((shingles * _MULTIPLY + _ADD) >> np.uint64(32)).min(axis=1)
    entry = np.zeros(1, FINGERPRINT)
    entry["exact"] = query_hash64(query)
    entry["bands"] = (minima.reshape(BANDS, ROWS) * _MIX).sum(axis=1, dtype=np.uint64)
    return entry.tobytes()


def place(entry: bytes, shard: int, row: int) -> bytes:
    """The entry with the place of its record."""
    return entry[:-8] + shard.to_bytes(4, "little") + row.to_bytes(4, "little")


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of two queries' shingles."""
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


def _place(entry: np.void) -> tuple[int, int]:
    return int(entry["shard"]), int(entry["row"])
