"""One optimiser step over a global batch of any size, through a DeepSpeed engine.

Pass 1 encodes the chunks without a graph; the loss is evaluated once on the cached vectors and
yields their gradient; pass 2 encodes each chunk again and backpropagates (vector * gradient).sum()
(Gao et al. 2021, arXiv 2101.06983). The gradient is exactly that of the whole batch.

DeepSpeed counts every `engine.backward` as a micro-step of its own. Without more, ZeRO 1 and 2 keep
only the last chunk's gradient and say nothing. Here all backwards of a step run inside
`coalesce_grad_reduction` (ZeRO 1, 2, 3) or, on ZeRO 0, inside `no_sync` but for the last one: one
reduction a step, at the price of one full local gradient a rank.

Under ZeRO 3 every forward is a collective, so all ranks run the same number of chunks: they agree
on the largest count that any rank needs, and each spreads its tokens evenly over that many.

B queries, N documents, D width.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from drama.data.batches import PackedBatch, RankBatch, pack
from drama.loss import ContrastiveLoss, LossOutput


@dataclass
class StepOutput:
    """What one step did. seconds: per phase (embed, loss, replay, step)."""

    loss: float
    loss_by_prefix: list[float]
    num_masked: int
    num_chunks: int
    grad_norm: float
    seconds: dict[str, float] = field(default_factory=dict)


class GradCache:
    """Runs gradient-cached steps on a DeepSpeed engine that wraps an `Encoder`.

    token_budget: tokens a chunk, which bounds the memory of a graph; a longer text is alone.
    """

    def __init__(self, engine: Any, loss: ContrastiveLoss, token_budget: int) -> None:
        self.engine, self.loss, self.token_budget = engine, loss, token_budget
        self.device = engine.device
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def backward(self, batch: RankBatch) -> StepOutput:
        """Leave the gradient of the global batch in the engine, reduced; does not step."""
        watch = _Stopwatch(self.device)
        chunks = batch.chunks(self._agree(batch.count_chunks(self.token_budget)))
        packed = [self._pack(batch, chunk) for chunk in chunks]

        vectors_XD: Tensor | None = None
        with torch.no_grad():
            for chunk, tokens in zip(chunks, packed, strict=True):
                out_BD = self.engine(tokens).float()
                if vectors_XD is None:
                    vectors_XD = out_BD.new_empty(len(batch.rows), out_BD.shape[1])
                vectors_XD[chunk] = out_BD[: len(chunk)]
        assert vectors_XD is not None
        watch.lap("embed")

        split = batch.num_queries
        result = self.loss(
            vectors_XD[:split], vectors_XD[split:], batch.document_ids.to(self.device)
        )
        # the engine averages over ranks; the objective is a sum of the ranks' shares
        gradient_XD = torch.cat([result.grad_q_BD, result.grad_k_ND]) * self.world_size
        watch.lap("loss")

        self._replay(chunks, packed, gradient_XD)
        watch.lap("replay")
        return _report(result, len(chunks), watch.seconds)

    def step(self, batch: RankBatch) -> StepOutput:
        """Backward, then the engine's optimiser and schedule step."""
        output = self.backward(batch)
        start = time.perf_counter()
        if self.engine.zero_optimization_stage():
            self.engine.step()
            output.grad_norm = float(self.engine.get_global_grad_norm())
        else:  # DeepSpeed measures it only where ZeRO does
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            output.grad_norm = float(torch.nn.utils.get_total_norm(gradients))
            self.engine.step()
        output.seconds["step"] = time.perf_counter() - start
        return output

    def _agree(self, num_chunks: int) -> int:
        if self.world_size == 1:
            return num_chunks
        count = torch.tensor(num_chunks, device=self.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        return int(count.item())

    def _pack(self, batch: RankBatch, chunk: list[int]) -> PackedBatch:
        # a rank with fewer texts than chunks still takes part in the forward: with a text of its
        # own whose gradient is zero
        rows = chunk or batch.order[:1]
        return pack([batch.rows[i] for i in rows]).to(self.device)

    def _replay(
        self, chunks: list[list[int]], packed: list[PackedBatch], gradient_XD: Tensor
    ) -> None:
        stage = self.engine.zero_optimization_stage()
        with self.engine.coalesce_grad_reduction() if stage else nullcontext():
            for number, (chunk, tokens) in enumerate(zip(chunks, packed, strict=True)):
                last = number + 1 == len(chunks)
                quiet: AbstractContextManager[None] = (
                    nullcontext() if stage or last else self.engine.no_sync()
                )
                with quiet:
                    out_BD = self.engine(tokens).float()
                    surrogate = (out_BD[: len(chunk)] * gradient_XD[chunk]).sum()
                    self.engine.backward(surrogate, scale_wrt_gas=False)


def _report(result: LossOutput, num_chunks: int, seconds: dict[str, float]) -> StepOutput:
    return StepOutput(
        loss=result.loss.item(),
        loss_by_prefix=result.loss_P.tolist(),
        num_masked=result.num_masked,
        num_chunks=num_chunks,
        grad_norm=0.0,
        seconds=seconds,
    )


class _Stopwatch:
    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = now - self.start
        self.start = now
