"""The pooling of `pool.py` as plain autograd, one sequence after the other: slow, plainly right.

In float64 it is the oracle. In a narrower type it does what a Hugging Face model followed by a
pooling layer does, every rounding included, and is what the kernels' errors are compared with.

T packed tokens, L tokens of one sequence, B sequences, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Llama's RMSNorm over the last dimension, any shape.

    As `LlamaRMSNorm` of transformers: normalised in float32, rounded to the input's dtype,
    multiplied by the weight in that dtype; float64 stays float64.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D * (wide * rstd).to(hidden.dtype)


def pool_reference(
    hidden_TD: Tensor,
    cu_seqlens: Tensor,
    weight_D: Tensor | None = None,
    *,
    pooling: str,
    eps: float = 1e-6,
    normalize: bool = False,
) -> Tensor:
    """Norm every token, pool every sequence ("last" or "mean"), normalise: [B, D]."""
    rows = []
    for states_LD in hidden_TD.split(cu_seqlens.diff().tolist()):
        if weight_D is not None:
            states_LD = rms_norm(states_LD, weight_D, eps)
        pooled_D = states_LD[-1] if pooling == "last" else states_LD.mean(0)
        rows.append(F.normalize(pooled_D, dim=0) if normalize else pooled_D)
    return torch.stack(rows).to(hidden_TD.dtype)
