"""Token rows side by side, no padding, cut into chunks by a token budget.

T packed tokens, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor


@dataclass
class PackedBatch:
    """Sequences laid side by side.

    input_ids_T, position_ids_T: int64. cu_seqlens: int32 [B + 1]. lengths: the same on the host.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device | str) -> PackedBatch:
        tensors = [self.input_ids_T, self.position_ids_T, self.cu_seqlens]
        if torch.device(device).type == "cuda":  # a copy from pinned memory waits for nothing
            tensors = [x.pin_memory() for x in tensors]
        ids, positions, cu = (x.to(device, non_blocking=True) for x in tensors)
        return PackedBatch(ids, positions, cu, self.lengths)


Row = Sequence[int] | np.ndarray


def pack(rows: Sequence[Row]) -> PackedBatch:
    """Lay token rows (each at least one token) side by side, in the order given."""
    lengths = tuple(len(row) for row in rows)
    assert min(lengths, default=0) > 0, "packing needs rows with at least one token"
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    return PackedBatch(
        torch.from_numpy(np.concatenate(rows, dtype=np.int64, casting="unsafe")),
        torch.from_numpy(positions),
        torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
        lengths,
    )


class TokenRows(Sequence[np.ndarray]):
    """Many token rows in one array; as tensors they pass between processes in shared memory.

    tokens: int32, all rows side by side. lengths: int64, of each row.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self.tokens, self.lengths = tokens, lengths
        self._ends = np.cumsum(lengths)

    @classmethod
    def of(cls, rows: Sequence[Row]) -> TokenRows:
        """The same rows, laid side by side."""
        arrays = [np.asarray(row, np.int32) for row in rows]
        lengths = np.array([len(row) for row in arrays], np.int64)
        return cls(np.concatenate([np.empty(0, np.int32), *arrays]), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = self._ends[index]
        return self.tokens[end - self.lengths[index] : end]

    def tolist(self) -> list[list[int]]:
        """The rows as lists."""
        return [row.tolist() for row in self]

    def __getstate__(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.tokens), torch.from_numpy(self.lengths)

    def __setstate__(self, state: tuple[Tensor, Tensor]) -> None:
        self.__init__(*(part.numpy() for part in state))  # type: ignore[misc]


def count_chunks(lengths: Sequence[int], token_budget: int) -> int:
    """How many chunks `lengths` (sorted) need when none may exceed the budget."""
    return len(_greedy(np.cumsum(lengths), token_budget))


def _greedy(ends: np.ndarray, capacity: int) -> list[range]:
    """Cut sequences, given by the running sum of their lengths, into runs of at most `capacity`
    tokens; a longer one is alone."""
    chunks: list[range] = []
    first, before = 0, 0
    while first < len(ends):
        end = max(first + 1, int(np.searchsorted(ends, before + capacity, side="right")))
        chunks.append(range(first, end))
        first, before = end, ends[end - 1]
    return chunks


def even_chunks(lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Cut `lengths` into exactly `num_chunks` consecutive runs, the largest as small as possible.

    Runs hold indices into `lengths`. Fewer sequences than chunks give empty runs at the end.
    """
    ends = np.cumsum(lengths)
    low, high = max(lengths), int(ends[-1])
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if len(_greedy(ends, middle)) <= num_chunks else (middle + 1, high)
        )
    chunks = [list(chunk) for chunk in _greedy(ends, low)]
    while len(chunks) < num_chunks and len(chunks) < len(lengths):
        widest = max((c for c in chunks if len(c) > 1), key=lambda c: sum(lengths[i] for i in c))
        at, half = chunks.index(widest), len(widest) // 2
        chunks[at : at + 1] = [widest[:half], widest[half:]]
    return chunks + [[] for _ in range(num_chunks - len(chunks))]
