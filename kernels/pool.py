"""Pooling of packed token states to one row per sequence.

T packed tokens, B sequences, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool_last(hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the last token's state of every sequence, [B, D].

    cu_seqlens: int [B + 1], cumulative lengths, every length at least 1.
    """
    return hidden_TD.index_select(0, cu_seqlens[1:].long() - 1)


def pool_mean(hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the mean state of every sequence, [B, D], summed in float32 or wider."""
    lengths_B = cu_seqlens.diff().long()
    segment_T = torch.repeat_interleave(lengths_B)
    wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    sum_BD = torch.zeros(
        len(lengths_B), hidden_TD.shape[1], dtype=wide, device=hidden_TD.device
    ).index_add(0, segment_T, hidden_TD.to(wide))
    return (sum_BD / lengths_B[:, None]).to(hidden_TD.dtype)
