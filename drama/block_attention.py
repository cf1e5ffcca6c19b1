"""Attention over packed bf16 texts on a CPU, a cache's worth of scores at a time.

All products run at the rate of the machine's bf16 instructions; torch's own kernel runs at
float32's, a quarter of it. The roundings are FlashAttention's on a GPU (Dao 2023, arXiv
2307.08691): scores and their gradient are float32 from the accumulator on, probabilities and the
gradient of the scores are rounded where they become factors. The backward pass computes the scores
again, so what a graph keeps are queries, keys and values. Where one head's queries are cut, a key's
gradient is a sum of rounded parts.

T packed tokens, H query heads, G key/value heads, R = H / G queries of a key head, E head width;
a run of C texts of L tokens has M = C G matrices of L keys and S = R L queries. A block takes n of
the M, s of the S and K of the L.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**21  # scores: 20 MiB with their gradient and what is rounded

_LOCK = threading.Lock()

Runs = Sequence[tuple[int, int]]


@functools.cache
def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16 faster than float32. oneDNN alone is no sign: it imitates
    these instructions where AVX-512 is all there is."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def block_attention(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, runs: Runs, *, causal: bool, scale: float
) -> Tensor:
    """Attention of every text over itself alone: [T, H, E], all in bf16; H is a multiple of G.

    runs: lengths, and how many neighbours have each, in the order of the tokens.
    """
    out_THE: Tensor = _BlockAttention.apply(q_THE, k_TGE, v_TGE, runs, causal, scale)
    return out_THE


@contextmanager
def _bf16_instructions() -> Iterator[None]:
    """Products of float32 matrices by bf16 instructions: exact where the factors were bf16, and
    float32 from the accumulator on. The setting is the process's: one thread is here at a time, and
    another's float32 products would be rounded too."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _LOCK:
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THE: Tensor,
        k_TGE: Tensor,
        v_TGE: Tensor,
        runs: Runs,
        causal: bool,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q_THE, k_TGE, v_TGE)
        ctx.runs, ctx.causal, ctx.scale = runs, causal, scale
        groups = k_TGE.shape[1]
        out_THE = q_THE.new_empty(q_THE.shape)
        scores = _Scores(runs, causal, scale)
        with _bf16_instructions():
            for tokens, count in _each_run(runs):
                q, k, v = (_matrices(x[tokens], groups, count) for x in (q_THE, k_TGE, v_TGE))
                out, q32, k32 = torch.empty_like(q), q.float(), k.float()
                for at, rows, keys in scores.blocks(q, k):
                    p = scores.probabilities(q32[at, rows], k32[at, keys])
                    torch.bmm(p, v[at, keys], out=out[at, rows])
                _write(out, out_THE[tokens], groups, count)
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, scale = ctx.saved_tensors, ctx.scale  # which may run a whole block again
        groups = inputs[1].shape[1]
        results = tuple(x.new_empty(x.shape) for x in inputs)
        scores = _Scores(ctx.runs, ctx.causal, scale)
        with _bf16_instructions():
            for tokens, count in _each_run(ctx.runs):
                q, k, v, do = (_matrices(x[tokens], groups, count) for x in (*inputs, *grads))
                dq, q32, k32, v32, do32 = torch.empty_like(q), *(x.float() for x in (q, k, v, do))
                # several blocks of queries add to the same keys
                dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
                for at, rows, keys in scores.blocks(q, k):
                    p = scores.probabilities(q32[at, rows], k32[at, keys])
                    dv[at, keys] += torch.bmm(p.mT, do[at, rows])
                    ds = scores.gradient(do32[at, rows], v32[at, keys])
                    out = dq[at, rows]
                    torch.baddbmm(out, ds, k[at, keys], beta=0, alpha=scale, out=out)
                    dk[at, keys].add_(torch.bmm(ds.mT, q[at, rows]), alpha=scale)
                for result, part in zip(results, (dq, dk, dv), strict=True):
                    _write(part, result[tokens], groups, count)
        return *results, None, None, None


class _Scores:
    """The scores of a block, in memory that the blocks of a call take in turn."""

    def __init__(self, runs: Runs, causal: bool, scale: float) -> None:
        self.causal, self.scale = causal, scale
        most = max(BLOCK, max(length for length, _ in runs))
        self.p, self.ds = (torch.empty(most, dtype=torch.float32) for _ in range(2))
        self.rounded = torch.empty(most, dtype=torch.bfloat16)
        self.shape: tuple[int, int, int] = (0, 0, 0)

    def blocks(self, q_MSE: Tensor, k_MLE: Tensor) -> Iterator[tuple[slice, slice, slice]]:
        """Matrices, queries and keys of each: matrices as a whole where one fits, else one head's
        queries in pieces."""
        matrices, queries, _ = q_MSE.shape
        length = k_MLE.shape[1]
        if queries * length <= BLOCK:
            depth = BLOCK // (queries * length)
            for first in range(0, matrices, depth):
                yield slice(first, first + depth), slice(0, queries), slice(0, length)
            return
        height = max(1, BLOCK // length)
        for matrix, head in itertools.product(range(matrices), range(0, queries, length)):
            for first in range(0, length, height):
                end = min(first + height, length)
                keys = slice(0, end if self.causal else length)
                yield slice(matrix, matrix + 1), slice(head + first, head + end), keys

    def probabilities(self, q_nsE: Tensor, k_nKE: Tensor) -> Tensor:
        """Softmax of the block's scores, rounded: [n, s, K]."""
        self.shape = (*q_nsE.shape[:2], k_nKE.shape[1])
        p = self._taken(self.p)
        torch.baddbmm(p, q_nsE, k_nKE.mT, beta=0, alpha=self.scale, out=p)
        if self.causal:  # the last query sees all keys
            height = min(self.shape[1:])
            ahead = torch.full((height, height), -math.inf).triu(1)
            p.unflatten(1, (-1, height))[..., -height:].add_(ahead)
        torch.softmax(p, -1, out=p)
        return self._taken(self.rounded).copy_(p)

    def gradient(self, do_nsE: Tensor, v_nKE: Tensor) -> Tensor:
        """Gradient of the scores whose probabilities were the last, rounded in their place."""
        p, ds = self._taken(self.p), self._taken(self.ds)
        torch.bmm(do_nsE, v_nKE.mT, out=ds)
        torch._softmax_backward_data(ds, p, -1, torch.float32, grad_input=ds)
        return self._taken(self.rounded).copy_(ds)

    def _taken(self, memory: Tensor) -> Tensor:
        return memory[: math.prod(self.shape)].view(self.shape)


def _each_run(runs: Runs) -> Iterator[tuple[slice, int]]:
    """Where the tokens of every run lie, and its number of texts."""
    start = 0
    for length, count in runs:
        yield slice(start, start + length * count), count
        start += length * count


def _by_key_head(x_XHE: Tensor, groups: int, count: int) -> Tensor:
    """A run's tokens as a view [C, G, R, L, E]."""
    x_CLGRE = x_XHE.unflatten(0, (count, -1)).unflatten(2, (groups, -1))
    return x_CLGRE.permute(0, 2, 3, 1, 4)


def _matrices(x_XHE: Tensor, groups: int, count: int) -> Tensor:
    """A run's tokens: [M, S, E] or [M, L, E]."""
    return _by_key_head(x_XHE, groups, count).reshape(count * groups, -1, x_XHE.shape[-1])


def _write(x_MSE: Tensor, target_XHE: Tensor, groups: int, count: int) -> None:
    """Such matrices to their tokens."""
    target = _by_key_head(target_XHE, groups, count)
    target.copy_(x_MSE.view(target.shape))
