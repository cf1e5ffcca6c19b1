"""One optimiser step over a global batch of any size, through a DeepSpeed engine.

Pass 1 encodes the chunks; the loss is evaluated once on the cached vectors and yields their
gradient; pass 2 backpropagates (vector * gradient).sum() chunk by chunk (Gao et al. 2021, arXiv
2101.06983). The gradient is exactly that of the whole batch. Pass 1 keeps the graphs of its last
chunks, as many as fit; only the others are encoded again in pass 2, 4 units of work for those and 3
for the kept ones. Pass 2 goes from the last chunk to the first, kept or not, so the number of
graphs changes no bit of the result. Documents travel to the other ranks while the last chunk is
being encoded.

DeepSpeed counts every `engine.backward` as a micro-step of its own. Without more, ZeRO 1 and 2 keep
only the last chunk's gradient and say nothing. Two forms are right:

    step    all backwards inside `coalesce_grad_reduction`: one reduction a step, at the price of
            one full local gradient a rank (ZeRO 1, 2, 3)
    chunk   the boundary is set on the last chunk only: ZeRO 2 and 3 reduce and shard after each
            chunk (and ZeRO 3 keeps no graphs), ZeRO 0 and 1 add up locally

Under ZeRO 3 every forward is a collective, so all ranks run the same number of chunks: they agree
on the largest count that any rank needs, and each spreads its tokens evenly over that many.

B queries, N documents, X = B + N texts of this rank, M documents of all ranks, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from drama.balance import Share, share_out
from drama.data.batches import RankBatch
from drama.data.packing import PackedBatch, Row, count_chunks, even_chunks, pack
from drama.distributed import host_group
from drama.gather import Columns, all_gather
from drama.loss import ContrastiveLoss
from drama.memory import GraphBytes, PeakMemory, spare_bytes
from drama.metrics import Stopwatch
from drama.optimizer import Reduction, settle_reduction, step_engine

KeepGraphs = int | Literal["auto"]


@dataclass
class StepOutput:
    """What one step did. terms: what the loss has besides the contrastive one. watch: the phases
    share, embed, loss, replay, reduce and step."""

    loss: float
    loss_by_prefix: list[float]
    num_masked: int
    num_chunks: int
    num_kept: int
    terms: dict[str, float]
    grad_temperature: float
    watch: Stopwatch
    grad_norm: float = 0.0


class GradCache:
    """Runs gradient-cached steps on a DeepSpeed engine that wraps an `Encoder`.

    Args:
        token_budget: tokens a chunk, which bounds the memory of a graph; a longer text is alone.
        keep_graphs: chunks of pass 1 whose graph is kept, at most; "auto" measures in the first
            two steps what a graph takes, and keeps what fits in the memory that each step finds.
        reduction: see above; "auto" looks at the memory, see `settle_reduction`.
        balance: deal the texts out anew, so that every rank has the same number of tokens.
    """

    def __init__(
        self,
        engine: Any,
        loss: ContrastiveLoss,
        token_budget: int,
        *,
        keep_graphs: KeepGraphs = "auto",
        reduction: Reduction = "auto",
        balance: bool = True,
    ) -> None:
        self.engine, self.loss, self.token_budget = engine, loss, token_budget
        self.balance = balance
        self.device, self.stage = engine.device, engine.zero_optimization_stage()
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.group = host_group()
        self.reduction = settle_reduction(engine, reduction)
        if self.reduction == "chunk" and self.stage == 3:
            # DeepSpeed adds to the shards after the first forward that follows a backward; two
            # backwards in a row, as of kept graphs, would overwrite each other
            keep_graphs = 0
        self.room = _GraphRoom(self.device, keep_graphs)

    def backward(self, batch: RankBatch) -> StepOutput:
        """Leave the gradient of the global batch in the engine, reduced; does not step."""
        watch = Stopwatch(self.device)
        peak = PeakMemory(self.device) if self.room.measuring else None
        share = share_out(batch, balance=self.balance, group=self.group)
        num_chunks, num_kept = self._agree(share.lengths)
        chunks = share.chunks(num_chunks)
        parts = self._part_sizes(share, chunks)
        watch.lap("share")

        row_numbers, targets = self._row_numbers(chunks), share.targets(parts).to(self.device)
        vectors_XD, packed, graphs, columns = self._embed(
            share, chunks, parts, row_numbers, num_kept
        )
        watch.lap("embed")

        result = self.loss(vectors_XD[: share.num_queries], columns, targets)
        loss_by_prefix = result.loss_P.tolist()
        # the engine averages over ranks; the objective is a sum of the ranks' shares
        gradient_XD = torch.cat([result.grad_q_BD, result.grad_k_ND]) * self.world_size
        if not math.isfinite(result.loss + result.grad_temperature):
            gradient_XD.fill_(math.nan)  # so that the engine leaves the step out
        watch.lap("loss")
        loss_bytes = peak.taken() if peak is not None else 0

        self._replay(packed, graphs, row_numbers, gradient_XD, watch)
        watch.lap("reduce")
        if peak is not None:
            most = max(len(tokens.input_ids_T) for tokens in packed)
            self.room.learn(peak.taken(), loss_bytes, len(graphs), most)
        return StepOutput(
            loss=result.loss,
            loss_by_prefix=loss_by_prefix,
            terms=result.terms,
            grad_temperature=result.grad_temperature,
            num_masked=result.num_masked,
            num_chunks=num_chunks,
            num_kept=len(graphs),
            watch=watch,
        )

    def step(self, batch: RankBatch) -> StepOutput:
        """Backward, then the engine's optimiser and schedule step."""
        output = self.backward(batch)
        output.grad_norm = step_engine(self.engine)
        output.watch.lap("step")
        return output

    def evaluate(self, batch: RankBatch) -> float:
        """The contrastive loss of a global batch; leaves no gradient."""
        share = share_out(batch, balance=self.balance, group=self.group)
        chunks = share.chunks(self._agree(share.lengths)[0])
        parts = self._part_sizes(share, chunks)
        numbers = self._row_numbers(chunks)
        vectors_XD, _, _, columns = self._embed(share, chunks, parts, numbers, num_kept=0)
        targets = share.targets(parts).to(self.device)
        loss = replace(self.loss, scores=None, spread_weight=0.0, teacher=None)
        return loss(vectors_XD[: share.num_queries], columns, targets).loss

    @torch.no_grad()
    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Unnormalised vectors of this rank's texts, [texts, D]; every rank calls it, also one that
        has none."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        lengths = [len(rows[i]) for i in order]
        num_chunks = self._agree(lengths)[0]
        chunks = even_chunks(lengths, num_chunks) if rows else [[] for _ in range(num_chunks)]
        out_XD: Tensor | None = None
        for chunk in chunks:
            # a forward is a collective under ZeRO 3: a rank without texts runs one token
            texts = [rows[order[i]] for i in chunk] or [rows[order[0]] if rows else [0]]
            out_BD = self.engine(pack(texts).to(self.device))
            if out_XD is None:
                out_XD = out_BD.new_empty(len(rows), out_BD.shape[1])
            out_XD[[order[i] for i in chunk]] = out_BD[: len(chunk)]
        assert out_XD is not None
        return out_XD

    # -- planning -----------------------------------------------------------------------------

    def _agree(self, lengths: Sequence[int]) -> tuple[int, int]:
        """Chunks and kept graphs of this step, the same on every rank; lengths: of this rank's
        texts, sorted."""
        num_chunks = count_chunks(lengths, self.token_budget)
        # another rank may need more chunks; then this one's are smaller
        chunks = even_chunks(lengths, num_chunks) if num_chunks else []
        largest = max((sum(lengths[i] for i in chunk) for chunk in chunks), default=1)
        counts = torch.tensor([num_chunks, -self.room.count(largest)])
        if self.world_size > 1:
            dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=self.group)
        num_chunks, num_kept = counts.abs().tolist()
        return num_chunks, min(num_chunks, num_kept)

    def _part_sizes(self, share: Share, chunks: list[list[int]]) -> list[list[int]]:
        """By part and rank, how many documents are gathered: all chunks' but the last one's, then
        the last one's."""
        last = sum(row >= share.num_queries for row in chunks[-1])
        own = torch.tensor([len(share.rows) - share.num_queries - last, last])
        if self.world_size == 1:
            return [[n] for n in own.tolist()]
        everybody = own.new_empty(2 * self.world_size)
        all_gather(everybody, own, group=self.group)
        return everybody.view(-1, 2).T.tolist()

    def _pack(self, share: Share, chunk: list[int]) -> PackedBatch:
        # a rank with fewer texts than chunks still takes part in the forward: with a text of its
        # own whose gradient is zero
        rows = chunk or share.order[:1]
        return pack([share.rows[i] for i in rows]).to(self.device)

    def _row_numbers(self, chunks: list[list[int]]) -> Sequence[Tensor]:
        """Every chunk's row numbers on the device, all in one copy: a list as an index would be a
        copy for each chunk, for which the host waits until the GPU is idle."""
        numbers = torch.tensor([row for chunk in chunks for row in chunk], dtype=torch.int64)
        return numbers.to(self.device).split([len(chunk) for chunk in chunks])

    # -- the two passes -----------------------------------------------------------------------

    def _embed(
        self,
        share: Share,
        chunks: list[list[int]],
        part_sizes: list[list[int]],
        row_numbers: Sequence[Tensor],
        num_kept: int,
    ) -> tuple[Tensor, list[PackedBatch], dict[int, Tensor], Columns]:
        """Pass 1: all vectors, the chunks on the device, the outputs whose graph lives, and the
        documents on their way."""
        columns, split = Columns(part_sizes), share.num_queries
        vectors_XD: Tensor | None = None
        packed: list[PackedBatch] = []
        graphs: dict[int, Tensor] = {}
        own = columns.rank
        for number, chunk in enumerate(chunks):
            # packed one by one: a GPU computes meanwhile
            tokens = self._pack(share, chunk)
            packed.append(tokens)
            last, kept = number + 1 == len(chunks), number >= len(chunks) - num_kept
            if last and vectors_XD is not None:
                columns.send(vectors_XD[split : split + part_sizes[0][own]])
            with nullcontext() if kept else torch.no_grad():
                out_BD = self.engine(tokens)
            if vectors_XD is None:
                vectors_XD = out_BD.new_empty(len(share.rows), out_BD.shape[1])
                if last:  # the only chunk: nothing was there to be sent before it
                    columns.send(vectors_XD[:0])
            vectors_XD[row_numbers[number]] = out_BD.detach()[: len(chunk)]
            if kept:
                graphs[number] = out_BD
        assert vectors_XD is not None
        columns.send(vectors_XD[split + part_sizes[0][own] :])
        return vectors_XD, packed, graphs, columns

    def _replay(
        self,
        packed: list[PackedBatch],
        graphs: dict[int, Tensor],
        row_numbers: Sequence[Tensor],
        gradient_XD: Tensor,
        watch: Stopwatch,
    ) -> None:
        """Pass 2, from the last chunk to the first; "chunk" reduces within the replay."""
        at_once = self.reduction == "step"
        with self.engine.coalesce_grad_reduction() if at_once else nullcontext():
            for number in reversed(range(len(packed))):
                if not at_once:
                    self.engine.set_gradient_accumulation_boundary(number == 0)
                rows, out_BD = row_numbers[number], graphs.get(number)
                if out_BD is None:
                    out_BD = self._encode_again(packed[number])
                else:
                    graphs[number] = out_BD.detach()
                surrogate = (out_BD[: len(rows)].float() * gradient_XD[rows].float()).sum()
                self.engine.backward(surrogate, scale_wrt_gas=False)
            watch.lap("replay")

    def _encode_again(self, tokens: PackedBatch) -> Tensor:
        if not self.room.measuring:
            return self.engine(tokens)
        module = self.engine.module
        before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        counter = GraphBytes(module.parameters())
        with counter.watch():
            out_BD: Tensor = self.engine(tokens)
        if self.device.type == "cuda":
            counter.total = torch.cuda.memory_allocated() - before
        elif module.execution.recompute_blocks:  # blocks' inputs, which autograd does not list
            num_layers = module.backbone.config.num_hidden_layers
            counter.total += num_layers * len(tokens.input_ids_T) * module.dim * out_BD.itemsize
        self.room.count_graph(counter.total, len(tokens.input_ids_T))
        return out_BD


class _GraphRoom:
    """How many graphs fit beside everything else.

    The first step keeps none and counts what a graph takes and what a step needs besides: its
    replay holds one graph. The second keeps half of what should fit, and its peak corrects the
    count. From then on every step asks what the device has left. Kept graphs are gone before a
    chunk is encoded again.
    """

    def __init__(self, device: torch.device, wanted: KeepGraphs) -> None:
        self.device, self.wanted = device, wanted
        self.bytes_per_token = 0.0  # of a graph
        self.base_bytes = 0.0  # of a step without any graph
        self.steps_measured = 0

    @property
    def measuring(self) -> bool:
        return self.wanted == "auto" and self.steps_measured < 2

    def count_graph(self, num_bytes: int, num_tokens: int) -> None:
        """A graph of so many tokens takes so many bytes."""
        self.bytes_per_token = max(self.bytes_per_token, num_bytes / num_tokens)

    def learn(self, peak_bytes: int, loss_bytes: int, num_kept: int, num_tokens: int) -> None:
        """A step that kept so many graphs, of so many tokens the largest, took so much at its
        highest, and so much up to the end of the loss."""
        self.steps_measured += 1
        if num_kept:
            real = (peak_bytes - self.base_bytes) / num_kept / num_tokens
            self.bytes_per_token = max(self.bytes_per_token, real)
        else:
            # up to the loss no graph was alive, from then on one
            replay_bytes = peak_bytes - self.bytes_per_token * num_tokens
            self.base_bytes = max(self.base_bytes, loss_bytes, replay_bytes)

    def count(self, num_tokens: float) -> int:
        """Graphs of so many tokens that this rank may keep in the step that begins."""
        if isinstance(self.wanted, int):
            return self.wanted
        if not self.steps_measured or not self.bytes_per_token:
            return 0
        spare = spare_bytes(self.device) - self.base_bytes
        count = max(0, int(spare // (self.bytes_per_token * num_tokens)))
        return count // 2 if self.measuring else count
