"""The torch back end of `pool.py`: any device, any float dtype, float64 in float64.

"last" touches B rows. "mean" visits at most PIECE tokens of one sequence at a time, so its work
memory is a few PIECE x D matrices, and no normed T x D tensor is made or kept. Sums run in torch's
own order, without atomics: the same bits when run again.

T packed tokens, L tokens of a piece, B sequences, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

NORM_FLOOR = 1e-12  # of the L2 norm, as in F.normalize
PIECE = 1024  # tokens


def forward(
    h_TD: Tensor, cu: Tensor, w_D: Tensor | None, pooling: str, eps: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, rstd, inverse norms and means; empty where there are none."""
    wide = accumulation_dtype(h_TD)
    rstd, inverse_B, mean_BD = (h_TD.new_empty(0, dtype=wide) for _ in range(3))
    if pooling == "last":
        y_BD = h_TD.index_select(0, cu[1:].long() - 1).to(wide)
        if w_D is not None:
            rstd = _rstd(y_BD, eps)
            y_BD = (y_BD * rstd[:, None]).to(h_TD.dtype).to(wide)
    else:
        rstd = h_TD.new_empty(len(h_TD) if w_D is not None else 0, dtype=wide)
        y_BD = h_TD.new_zeros((len(cu) - 1, h_TD.shape[1]), dtype=wide)
        for b, piece in _pieces(cu):
            x_LD = h_TD[piece].to(wide)
            if w_D is not None:
                rstd[piece] = _rstd(x_LD, eps)
                x_LD = x_LD * rstd[piece, None]
            y_BD[b] += x_LD.sum(0)
        y_BD /= cu.diff()[:, None]
        if w_D is not None or normalize:
            mean_BD = y_BD
    if w_D is not None:
        y_BD = y_BD * w_D.to(wide)
    if normalize:
        inverse_B = 1 / torch.linalg.vector_norm(y_BD, dim=1).clamp_min(NORM_FLOOR)
        y_BD = y_BD * inverse_B[:, None]
    return y_BD.to(h_TD.dtype), rstd, inverse_B, mean_BD


def backward(
    dz_BD: Tensor,
    h_TD: Tensor,
    cu: Tensor,
    w_D: Tensor | None,
    rstd: Tensor,
    inverse_B: Tensor,
    mean_BD: Tensor,
    pooling: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; the latter is empty where there is no weight."""
    wide = accumulation_dtype(h_TD)
    x_BD = m_BD = mean_BD
    last_B = cu[1:].long() - 1
    if pooling == "last":
        x_BD = m_BD = h_TD.index_select(0, last_B).to(wide)
        if w_D is not None:
            m_BD = (x_BD * rstd[:, None]).to(h_TD.dtype).to(wide)
    dm_BD = dz_BD.to(wide)
    if len(inverse_B):
        z_BD = (m_BD if w_D is None else m_BD * w_D.to(wide)) * inverse_B[:, None]
        pull_B1 = (z_BD * dm_BD).sum(1, keepdim=True)
        pull_B1 *= inverse_B[:, None] < 0.99 / NORM_FLOOR  # else the norm is a constant
        dm_BD = inverse_B[:, None] * (dm_BD - z_BD * pull_B1)
    dw_D = h_TD.new_empty(0)
    if w_D is not None:
        dw_D = (dm_BD * m_BD).sum(0).to(w_D.dtype)
        dm_BD = dm_BD * w_D.to(wide)
    if pooling == "last":
        dh_TD = torch.zeros_like(h_TD, memory_format=torch.contiguous_format)
        if w_D is not None:
            dm_BD = _norm_backward(dm_BD, x_BD, rstd)
        return dh_TD.index_copy_(0, last_B, dm_BD.to(h_TD.dtype)), dw_D
    dh_TD = torch.empty_like(h_TD, memory_format=torch.contiguous_format)
    dm_BD = dm_BD / cu.diff()[:, None]
    for b, piece in _pieces(cu):
        g_D = dm_BD[b]
        dh_TD[piece] = (
            g_D if w_D is None else _norm_backward(g_D, h_TD[piece].to(wide), rstd[piece])
        )
    return dh_TD, dw_D


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Of everything between the load and the store."""
    return torch.promote_types(x.dtype, torch.float32)


def _rstd(x_LD: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x_LD.square().mean(1) + eps)


def _norm_backward(g: Tensor, x_LD: Tensor, rstd_L: Tensor) -> Tensor:
    """Gradient of x from that of x * rstd, [L, D] or one [D] for all."""
    unit_LD = x_LD * rstd_L[:, None]
    return rstd_L[:, None] * (g - unit_LD * (g * unit_LD).mean(1, keepdim=True))


def _pieces(cu: Tensor) -> Iterator[tuple[int, slice]]:
    """Number of a sequence and at most PIECE of its tokens, in order."""
    bounds = cu.tolist()
    for b, (start, stop) in enumerate(pairwise(bounds)):
        for first in range(start, stop, PIECE):
            yield b, slice(first, min(first + PIECE, stop))
