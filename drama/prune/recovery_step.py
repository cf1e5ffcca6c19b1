"""One optimiser step of a recovery over a global batch of texts, through a DeepSpeed engine.

Chunks of a token budget are backpropagated one after the other; each prediction weighs the same,
whichever chunk, rank or text it is in. Under ZeRO 3 every forward is a collective, so all ranks run
the same number of chunks.

P predictions of a chunk, S sources.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from drama.data.packing import count_chunks, even_chunks
from drama.data.texts import TextBatch
from drama.distributed import host_group
from drama.kernels.linear_loss import linear_loss
from drama.metrics import Stopwatch
from drama.optimizer import Reduction, step_engine
from drama.prune.parent import Parent
from drama.prune.predictions import Chunk, Objective
from drama.stability import sound_scale


@dataclass
class StepOutput:
    """What one step did; losses are means over the predictions of the global batch.

    lm: cross-entropy, nats. kl, hidden: as the recipe's parts, 0 where they are off. sums_S,
    counts_S: cross-entropy and predictions by source. seconds: per phase (pack, parent, forward,
    backward, step).
    """

    loss: float
    lm: float
    kl: float
    hidden: float
    sums_S: list[float]
    counts_S: list[int]
    num_chunks: int
    grad_norm: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


class RecoveryStep:
    """Runs steps on an engine that wraps a `Student`.

    num_sources: S. reduction: of gradients, settled (`drama.optimizer.settle_reduction`).
    """

    def __init__(
        self,
        engine: Any,
        objective: Objective,
        token_budget: int,
        *,
        reduction: Reduction,
        num_sources: int,
        parent: Parent | None = None,
    ) -> None:
        self.engine, self.objective, self.token_budget = engine, objective, token_budget
        self.reduction, self.num_sources = reduction, num_sources
        self.parent, self.alignment = parent, engine.module.alignment
        self.device, self.world_size = engine.device, engine.world_size
        self.loss = engine.module.loss
        self.imitates = bool(self.loss.kl or self.loss.hidden)

    def step(self, batch: TextBatch) -> StepOutput:
        """Backward, then the optimiser's and the schedule's step."""
        output = self.backward(batch)
        start = time.perf_counter()
        output.grad_norm = step_engine(self.engine)
        output.seconds["step"] = time.perf_counter() - start
        return output

    def backward(self, batch: TextBatch) -> StepOutput:
        """Leave the gradient of the global batch in the engine, reduced; does not step."""
        watch = Stopwatch(self.device)
        # by source: cross-entropy and predictions; then KL and states over all
        figures = torch.zeros(2 * self.num_sources + 2, dtype=torch.float64)
        at_once = self.reduction == "step"
        chunks = [(rows, self._pack(batch, rows)) for rows in self._plan(batch)]
        predictions = sum(len(chunk.row_P) for _, chunk in chunks)
        total = int(self._sum(torch.tensor(float(predictions), dtype=torch.float64)).item())
        watch.lap("pack")
        with self.engine.coalesce_grad_reduction() if at_once else nullcontext():
            for number, (rows, chunk) in enumerate(chunks):
                of_parent = None
                if self.parent is not None and self.imitates:
                    of_parent = self.parent(chunk, self.alignment)
                    watch.lap("parent")
                if not at_once:
                    last = number + 1 == len(chunks)
                    self.engine.set_gradient_accumulation_boundary(last)
                loss, ce_P, kl_P, apart = self.engine(chunk, of_parent)
                watch.lap("forward")
                # the engine averages over ranks; the objective is a sum of the ranks' shares
                scale = self.world_size / max(1, total)
                self.engine.backward(loss * sound_scale(loss, scale), scale_wrt_gas=False)
                watch.lap("backward")
                figures[:-2] += self._by_source(batch, rows, chunk, ce_P)
                figures[-2] += kl_P.double().sum().item()
                figures[-1] += apart.item()
        watch.lap("backward")  # the reduction
        *by_source, kl, apart_sum = self._sum(figures).tolist()
        sums_S, counts_S = by_source[: self.num_sources], by_source[self.num_sources :]
        lm, kl, hidden = (x / max(1, total) for x in (sum(sums_S), kl, apart_sum))
        parts = self.loss.lm * lm + self.loss.kl * kl + self.loss.hidden * hidden
        counts = [int(n) for n in counts_S]
        return StepOutput(parts, lm, kl, hidden, sums_S, counts, len(chunks), seconds=watch.seconds)

    @torch.no_grad()
    def evaluate(
        self, batch: TextBatch, num_sources: int, *, parent: bool = False
    ) -> tuple[list[float], list[int]]:
        """Sums of cross-entropy and predictions by source, over all ranks; a collective.

        parent: of it, not of the student.
        """
        self.engine.eval()
        figures = torch.zeros(2 * num_sources, dtype=torch.float64)
        for rows in self._plan(batch):
            chunk = self._pack(batch, rows)
            if parent:
                assert self.parent is not None
                states = self.parent(chunk)
                ce_P = linear_loss(states.final_PE, states.weight_VE, chunk.target_P).ce_T
            else:
                ce_P = self.engine(chunk)[1]
            figures += self._by_source(batch, rows, chunk, ce_P, num_sources)
        self.engine.train()
        found = self._sum(figures).tolist()
        return found[:num_sources], [int(n) for n in found[num_sources:]]

    # -- planning -----------------------------------------------------------------------------

    def _plan(self, batch: TextBatch) -> list[list[int]]:
        """Rows of each chunk, texts of like length together; as many chunks on every rank."""
        lengths = batch.rows.lengths
        order = sorted(range(len(lengths)), key=lambda i: int(lengths[i]))
        ordered = [int(lengths[i]) for i in order]
        # one at least: an optimizer's step without any gradient is an error to DeepSpeed
        count = torch.tensor(max(1, count_chunks(ordered, self.token_budget)))
        if self.world_size > 1:
            dist.all_reduce(count, op=dist.ReduceOp.MAX, group=host_group())
        if not order:
            return [[] for _ in range(int(count))]
        return [[order[i] for i in chunk] for chunk in even_chunks(ordered, int(count))]

    def _pack(self, batch: TextBatch, rows: list[int]) -> Chunk:
        if not rows:  # a rank with fewer texts still takes part: with a token that predicts nothing
            return self.objective.chunk([[0]], [(0, 0)]).to(self.device)
        texts = [batch.rows[i] for i in rows]
        return self.objective.chunk(texts, list(self._keys(batch, rows))).to(self.device)

    @staticmethod
    def _keys(batch: TextBatch, rows: Any) -> Iterator[tuple[int, int]]:
        for row in rows:
            yield int(batch.epoch_B[row]), int(batch.index_B[row])

    def _by_source(
        self,
        batch: TextBatch,
        rows: list[int],
        chunk: Chunk,
        ce_P: Tensor,
        num_sources: int | None = None,
    ) -> Tensor:
        """Sums of cross-entropy, then counts of predictions, float64 [2 S] on the host."""
        count = self.num_sources if num_sources is None else num_sources
        found = torch.zeros(2, count, dtype=torch.float64)
        if rows:
            source_P = batch.source_B[rows][chunk.text_P.cpu()]
            found[0].index_add_(0, source_P, ce_P.detach().double().cpu())
            found[1] += torch.bincount(source_P, minlength=count)
        return found.flatten()

    def _sum(self, x: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(x, group=host_group())
        return x
