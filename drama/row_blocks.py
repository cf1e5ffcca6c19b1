"""RMSNorm and the gated unit of a feed-forward network on a CPU, a cache's worth of rows at a time.

As transformers computes them, each is several passes over memory, and most of those leave a tensor
in the graph. Here a graph keeps what goes in, and of a norm one number a row. T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**19  # elements: 2 MiB in float32


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight x / sqrt(mean(x^2) + eps), each row normed in float32 and rounded before the weight,
    as Llama's norm is; x: [..., D]."""
    out: Tensor = _Norm.apply(x, weight_D, eps)
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, [..., F] as both are; the backward pass computes silu again."""
    out: Tensor = _Gated.apply(gate, up)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out = x.new_empty(x.shape)
        accumulated = torch.promote_types(x.dtype, torch.float32)
        scale_T1 = x.new_empty(x.numel() // x.shape[-1], 1, dtype=accumulated)
        for x_rD, scale_r1, out_rD in _rows(x.shape[-1], x, scale_T1, out):
            y_rD = x_rD.to(accumulated, copy=True)
            torch.linalg.vector_norm(y_rD, dim=1, keepdim=True, out=scale_r1)
            scale_r1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul(y_rD.mul_(scale_r1).to(x.dtype), weight_D, out=out_rD)
        ctx.save_for_backward(x, weight_D, scale_T1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, scale_T1 = ctx.saved_tensors
        width, accumulated = x.shape[-1], scale_T1.dtype
        dx = x.new_empty(x.shape)
        dweight_D = scale_T1.new_zeros(width)
        for x_rD, scale_r1, grad_rD, dx_rD in _rows(width, x, scale_T1, *grads, dx):
            y_rD = x_rD.to(accumulated, copy=True).mul_(scale_r1)
            dy_rD = grad_rD.to(accumulated, copy=True)
            dweight_D += (dy_rD * y_rD).sum(0)
            dy_rD.mul_(weight_D)
            pull_r1 = torch.linalg.vecdot(dy_rD, y_rD).unsqueeze(1).div_(-width)
            dx_rD.copy_(dy_rD.addcmul_(y_rD, pull_r1).mul_(scale_r1))
        return dx, dweight_D.to(weight_D.dtype), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = gate.new_empty(gate.shape)
        for gate_rF, up_rF, out_rF in _rows(gate.shape[-1], gate, up, out):
            torch.mul(F.silu(gate_rF), up_rF, out=out_rF)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = (x.new_empty(x.shape) for x in (gate, up))
        for gate_rF, up_rF, grad_rF, dgate_rF, dup_rF in _rows(
            gate.shape[-1], gate, up, *grads, dgate, dup
        ):
            torch.mul(grad_rF, F.silu(gate_rF), out=dup_rF)
            torch.ops.aten.silu_backward.grad_input(grad_rF * up_rF, gate_rF, grad_input=dgate_rF)
        return dgate, dup


def _rows(width: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all, a block of them at a time."""
    count = max(1, BLOCK // width)
    yield from zip(*(x.reshape(-1, x.shape[-1]).split(count) for x in tensors), strict=True)
