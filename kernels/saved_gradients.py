"""Gradients that are formed in the forward pass: how they are kept, and scaled in the backward.

A loss that knows its gradient when it knows its value saves the gradient itself, for an upstream
gradient of 1; the backward pass multiplies it with the real one.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALED_AT_ONCE = 2**22  # elements of a gradient that are float32 at a time in the backward pass


def saved_dtype(x: Tensor) -> torch.dtype:
    """What the gradient of `x` is kept in: not fp16, whose range it leaves before it is scaled."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def scaled(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * grad_loss in `dtype`, rounded once: a factor in fp16 may be infinite, in bf16
    every entry would be off by its rounding."""
    if gradient.dtype == grad_loss.dtype == dtype:
        return gradient * grad_loss
    out = torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)
    piece = max(1, SCALED_AT_ONCE // max(1, gradient.shape[-1] if gradient.ndim else 1))
    flat, flat_out = torch.atleast_1d(gradient), torch.atleast_1d(out)
    for at in range(0, len(flat), piece):
        flat_out[at : at + piece] = flat[at : at + piece].to(grad_loss.dtype) * grad_loss
    return out
