"""Documents of all ranks beside each other, and their gradient back where it belongs.

N documents of one rank, M of all ranks, D width, W ranks, L the largest part of any rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed them and warns under the old names; 2.11 and 2.12 know only those
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Columns:
    """The ranks' rows gathered part by part: a part travels while the next one is computed.

    part_sizes: per part, the number of rows that each rank gives. Column order: the first part of
    rank 0, of rank 1, ..., then the second part.
    """

    def __init__(self, part_sizes: Sequence[Sequence[int]]) -> None:
        self.part_sizes = part_sizes
        self.world = len(part_sizes[0])
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.parts: list[list[Tensor]] = []
        self.running: list[Any] = []

    def send(self, x_ND: Tensor) -> None:
        """Start to gather this rank's next part; returns before it has arrived."""
        x_ND = x_ND.detach()
        sizes = self.part_sizes[len(self.parts)]
        if self.world == 1:
            self.parts.append([x_ND])
            return
        padded_LD = x_ND.new_zeros(max(sizes), *x_ND.shape[1:])
        padded_LD[: len(x_ND)] = x_ND
        all_XD = x_ND.new_empty(self.world * max(sizes), *x_ND.shape[1:])
        if max(sizes):
            self.running.append(all_gather(all_XD, padded_LD, async_op=True))
        by_rank = all_XD.unflatten(0, (self.world, max(sizes)))
        self.parts.append([rows[:n] for rows, n in zip(by_rank, sizes, strict=True)])

    def receive(self) -> Tensor:
        """Wait for all parts; return the columns, [M, D]."""
        assert len(self.parts) == len(self.part_sizes)
        for work in self.running:
            work.wait()
        return torch.cat([rows for part in self.parts for rows in part])

    def scatter_sum(self, grad_MD: Tensor) -> Tensor:
        """Add up every rank's gradient of the columns; return this rank's rows, as they were sent.

        Summed in float32 at least.
        """
        if self.world == 1:
            return grad_MD
        totals = [sum(sizes) for sizes in zip(*self.part_sizes, strict=True)]
        dtype = torch.promote_types(grad_MD.dtype, torch.float32)
        padded_WLD = grad_MD.new_zeros(self.world, max(totals), grad_MD.shape[1], dtype=dtype)
        starts = accumulate((n for sizes in self.part_sizes for n in sizes), initial=0)
        filled = [0] * self.world
        for sizes in self.part_sizes:
            for rank, n in enumerate(sizes):
                start = next(starts)
                padded_WLD[rank, filled[rank] : filled[rank] + n] = grad_MD[start : start + n]
                filled[rank] += n
        own_LD = padded_WLD.new_empty(padded_WLD.shape[1:])
        _reduce_scatter(own_LD, padded_WLD.flatten(0, 1))
        return own_LD[: totals[self.rank]].to(grad_MD.dtype)
