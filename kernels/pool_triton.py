"""Pooling of `pool.py` in Triton: one kernel each way, for the last token and for the mean.

    _last_forward     one program a sequence: read the last row, norm, weight, L2, write
    _last_backward    PROGRAMS programs share the sequences: dm from dz, then one row of dh each
    _mean_forward     one program a sequence: read its tokens tile by tile, once; the mean of the
                      normed rows is summed in registers, compensated (Kahan), so that its error
                      does not grow with the length
    _mean_backward    programs (b, s): dm from dz and the saved mean, then every num_splits-th
                      tile of b's tokens from number s on

Formulas, and what is saved, are in `pool.py`. Values are float32 from the load to the store. Row
offsets are int64. The weight's gradient is summed per program, then over programs by torch: no
atomics, the same bits when run again. A sequence's forward runs on one multiprocessor; with fewer
sequences than those a GPU is not filled.

T packed tokens, L tokens of a tile, B sequences, D width. Bytes moved, e a hidden element's:

    last    forward 2 e B D                   backward e T D for the zeros, 3 e B D
    mean    forward e T D + (4 + e) B D       backward 2 e T D + (8 + e) B D
"""

# mypy: allow-untyped-defs
# the kernels' arguments have Triton's types

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # of _last_backward, at most
TILES = 8  # of tokens a program of _mean_backward, on average
MAX_SPLITS = 65535  # CUDA's limit on a grid's second dimension
NORM_FLOOR = tl.constexpr(1e-12)  # of the L2 norm, as in F.normalize
INVERSE_CLAMPED = tl.constexpr(0.99e12)  # from here on the L2 norm was below the floor


class Blocks(NamedTuple):
    """How a width is cut; a program holds whole rows."""

    block_d: int
    row_warps: int  # of the kernels for the last token
    block_l: int
    tile_warps: int  # of the kernels for the mean


def blocks(width: int) -> Blocks:
    """Block sizes for a width up to 4096: a thread holds 8 elements of a row, 16 or 32 of a tile.

    With more, ptxas spills for one target or another; the tests compile each for all of them.
    """
    block_d = max(512, triton.next_power_of_2(width))
    row_warps = block_d // 256
    return Blocks(block_d, row_warps, 4096 // block_d, max(4, row_warps))


@triton.jit
def _finish(m_D, w_D, HAS_WEIGHT: tl.constexpr, NORMALIZE: tl.constexpr):
    """Output row and inverse L2 norm (1 without) from the pooled row."""
    z_D = m_D * w_D if HAS_WEIGHT else m_D
    inverse = 1.0
    if NORMALIZE:
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(z_D * z_D, 0)), NORM_FLOOR)
        z_D = z_D * inverse
    return z_D, inverse


@triton.jit
def _finish_backward(
    dz_D, m_D, w_D, inverse_ptr, b, HAS_WEIGHT: tl.constexpr, NORMALIZE: tl.constexpr
):
    """Gradient of the output row before the weight, y = m w."""
    dy_D = dz_D
    if NORMALIZE:
        inverse = tl.load(inverse_ptr + b)
        z_D = m_D * inverse
        if HAS_WEIGHT:
            z_D = z_D * w_D
        pull = tl.sum(z_D * dz_D, 0)
        pull = tl.where(inverse < INVERSE_CLAMPED, pull, 0.0)
        dy_D = inverse * (dz_D - z_D * pull)
    return dy_D


@triton.jit
def _last_forward(
    h_ptr, cu_ptr, w_ptr, out_ptr, rstd_ptr, inverse_ptr, stride, width, eps,
    HAS_WEIGHT: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, BLOCK_D)
    inside_D = d_D < width
    row = tl.load(cu_ptr + b + 1).to(tl.int64) - 1
    m_D = tl.load(h_ptr + row * stride + d_D, mask=inside_D, other=0.0).to(tl.float32)
    w_D = m_D
    if HAS_WEIGHT:
        w_D = tl.load(w_ptr + d_D, mask=inside_D, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(m_D * m_D, 0) / width + eps)
        tl.store(rstd_ptr + b, rstd)
        m_D = (m_D * rstd).to(h_ptr.dtype.element_ty).to(tl.float32)
    z_D, inverse = _finish(m_D, w_D, HAS_WEIGHT, NORMALIZE)
    if NORMALIZE:
        tl.store(inverse_ptr + b, inverse)
    tl.store(out_ptr + b * width + d_D, z_D.to(out_ptr.dtype.element_ty), mask=inside_D)


@triton.jit
def _last_backward(
    dz_ptr, h_ptr, cu_ptr, w_ptr, rstd_ptr, inverse_ptr, dh_ptr, dw_ptr, stride, width, num_rows,
    HAS_WEIGHT: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dh holds zeros; dw [programs, D] float32."""
    first = tl.program_id(0)
    d_D = tl.arange(0, BLOCK_D)
    inside_D = d_D < width
    w_D = tl.full([BLOCK_D], 0.0, tl.float32)
    dw_D = tl.full([BLOCK_D], 0.0, tl.float32)
    if HAS_WEIGHT:
        w_D = tl.load(w_ptr + d_D, mask=inside_D, other=0.0).to(tl.float32)
    for number in range(first, num_rows, tl.num_programs(0)):
        b = tl.cast(number, tl.int64)
        row = tl.load(cu_ptr + b + 1).to(tl.int64) - 1
        x_D = tl.load(h_ptr + row * stride + d_D, mask=inside_D, other=0.0).to(tl.float32)
        dx_D = tl.load(dz_ptr + b * width + d_D, mask=inside_D, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            rstd = tl.load(rstd_ptr + b)
            x_D = x_D * rstd
            m_D = x_D.to(h_ptr.dtype.element_ty).to(tl.float32)
            dx_D = _finish_backward(dx_D, m_D, w_D, inverse_ptr, b, HAS_WEIGHT, NORMALIZE)
            dw_D += dx_D * m_D
            dx_D = dx_D * w_D
            dx_D = rstd * (dx_D - x_D * (tl.sum(dx_D * x_D, 0) / width))
        else:
            dx_D = _finish_backward(dx_D, x_D, w_D, inverse_ptr, b, HAS_WEIGHT, NORMALIZE)
        tl.store(dh_ptr + row * width + d_D, dx_D.to(dh_ptr.dtype.element_ty), mask=inside_D)
    if HAS_WEIGHT:
        tl.store(dw_ptr + first.to(tl.int64) * width + d_D, dw_D, mask=inside_D)


@triton.jit
def _mean_forward(
    h_ptr, cu_ptr, w_ptr, out_ptr, rstd_ptr, inverse_ptr, mean_ptr, stride, width, eps,
    HAS_WEIGHT: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, BLOCK_D)
    inside_D = d_D < width
    start = tl.load(cu_ptr + b).to(tl.int64)
    length = (tl.load(cu_ptr + b + 1).to(tl.int64) - start).to(tl.int32)
    sum_LD = tl.full([BLOCK_L, BLOCK_D], 0.0, tl.float32)
    lost_LD = tl.full([BLOCK_L, BLOCK_D], 0.0, tl.float32)  # Kahan: what sum_LD has too much
    for first in range(0, length, BLOCK_L):
        t_L = first + tl.arange(0, BLOCK_L)
        row_L = start + t_L
        x_LD = tl.load(
            h_ptr + row_L[:, None] * stride + d_D[None, :],
            mask=(t_L < length)[:, None] & inside_D[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if HAS_WEIGHT:
            rstd_L = tl.rsqrt(tl.sum(x_LD * x_LD, 1) / width + eps)
            tl.store(rstd_ptr + row_L, rstd_L, mask=t_L < length)
            x_LD = x_LD * rstd_L[:, None]
        x_LD -= lost_LD
        next_LD = sum_LD + x_LD
        lost_LD = (next_LD - sum_LD) - x_LD
        sum_LD = next_LD
    m_D = tl.sum(sum_LD - lost_LD, 0) / length.to(tl.float32)
    w_D = m_D
    if HAS_WEIGHT:
        w_D = tl.load(w_ptr + d_D, mask=inside_D, other=0.0).to(tl.float32)
    if HAS_WEIGHT or NORMALIZE:
        tl.store(mean_ptr + b * width + d_D, m_D, mask=inside_D)
    z_D, inverse = _finish(m_D, w_D, HAS_WEIGHT, NORMALIZE)
    if NORMALIZE:
        tl.store(inverse_ptr + b, inverse)
    tl.store(out_ptr + b * width + d_D, z_D.to(out_ptr.dtype.element_ty), mask=inside_D)


@triton.jit
def _mean_backward(
    dz_ptr, h_ptr, cu_ptr, w_ptr, rstd_ptr, inverse_ptr, mean_ptr, dh_ptr, dw_ptr, stride, width,
    HAS_WEIGHT: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dw [B, D] float32, written by the programs of split 0."""
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d_D = tl.arange(0, BLOCK_D)
    inside_D = d_D < width
    start = tl.load(cu_ptr + b).to(tl.int64)
    length = (tl.load(cu_ptr + b + 1).to(tl.int64) - start).to(tl.int32)
    g_D = tl.load(dz_ptr + b * width + d_D, mask=inside_D, other=0.0).to(tl.float32)
    m_D = g_D
    w_D = g_D
    if HAS_WEIGHT or NORMALIZE:
        m_D = tl.load(mean_ptr + b * width + d_D, mask=inside_D, other=0.0)
    if HAS_WEIGHT:
        w_D = tl.load(w_ptr + d_D, mask=inside_D, other=0.0).to(tl.float32)
    g_D = _finish_backward(g_D, m_D, w_D, inverse_ptr, b, HAS_WEIGHT, NORMALIZE)
    if HAS_WEIGHT:
        if split == 0:
            tl.store(dw_ptr + b * width + d_D, g_D * m_D, mask=inside_D)
        g_D = g_D * w_D
    g_D = g_D / length.to(tl.float32)
    for first in range(split * BLOCK_L, length, tl.num_programs(1) * BLOCK_L):
        t_L = first + tl.arange(0, BLOCK_L)
        row_L = start + t_L
        inside_LD = (t_L < length)[:, None] & inside_D[None, :]
        dx_LD = tl.broadcast_to(g_D[None, :], [BLOCK_L, BLOCK_D])
        if HAS_WEIGHT:
            rstd_L = tl.load(rstd_ptr + row_L, mask=t_L < length, other=0.0)
            x_LD = tl.load(
                h_ptr + row_L[:, None] * stride + d_D[None, :], mask=inside_LD, other=0.0
            ).to(tl.float32)
            x_LD = x_LD * rstd_L[:, None]
            pull_L = tl.sum(x_LD * g_D[None, :], 1) / width
            dx_LD = rstd_L[:, None] * (dx_LD - x_LD * pull_L[:, None])
        tl.store(
            dh_ptr + row_L[:, None] * width + d_D[None, :],
            dx_LD.to(dh_ptr.dtype.element_ty), mask=inside_LD,
        )  # fmt: skip


def forward(
    h_TD: Tensor, cu: Tensor, w_D: Tensor | None, pooling: str, eps: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, rstd, inverse norms and means; empty where there are none."""
    h_TD, cu = _rows(h_TD), cu.contiguous()
    num_rows, width, block = len(cu) - 1, h_TD.shape[1], blocks(h_TD.shape[1])
    has_weight, mean = w_D is not None, pooling == "mean"
    out_BD = h_TD.new_empty((num_rows, width))
    num_normed = (len(h_TD) if mean else num_rows) if has_weight else 0
    rstd = h_TD.new_empty(num_normed, dtype=torch.float32)
    inverse_B = h_TD.new_empty(num_rows if normalize else 0, dtype=torch.float32)
    mean_shape = out_BD.shape if mean and (has_weight or normalize) else (0,)
    mean_BD = h_TD.new_empty(mean_shape, dtype=torch.float32)
    pointers = (h_TD, cu, h_TD if w_D is None else w_D.contiguous(), out_BD, rstd, inverse_B)
    scalars, flags = (h_TD.stride(0), width, eps), (has_weight, normalize, block.block_d)
    with torch.cuda.device_of(h_TD):
        if not num_rows:
            pass
        elif mean:
            _mean_forward[(num_rows,)](
                *pointers, mean_BD, *scalars, *flags, block.block_l, num_warps=block.tile_warps
            )
        else:
            _last_forward[(num_rows,)](*pointers, *scalars, *flags, num_warps=block.row_warps)
    return out_BD, rstd, inverse_B, mean_BD


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
    dz_BD, h_TD, cu = dz_BD.contiguous(), _rows(h_TD), cu.contiguous()
    (num_rows, width), block = dz_BD.shape, blocks(h_TD.shape[1])
    mean = pooling == "mean"
    dh_TD = (torch.empty if mean else torch.zeros)(h_TD.shape, dtype=h_TD.dtype, device=h_TD.device)
    num_programs = num_rows if mean else min(PROGRAMS, num_rows)
    dw = rstd.new_empty((num_programs, width) if w_D is not None else (0,))
    weight = h_TD if w_D is None else w_D.contiguous()
    saved = (rstd, inverse_B, mean_BD) if mean else (rstd, inverse_B)
    pointers = (dz_BD, h_TD, cu, weight, *saved, dh_TD, dw)
    flags = (w_D is not None, inverse_B.numel() > 0, block.block_d)
    with torch.cuda.device_of(h_TD):
        if not num_rows:
            pass
        elif mean:
            splits = triton.cdiv(len(h_TD), num_rows * block.block_l * TILES)
            _mean_backward[(num_rows, min(splits, MAX_SPLITS))](
                *pointers, h_TD.stride(0), width, *flags, block.block_l, num_warps=block.tile_warps
            )
        else:
            _last_backward[(num_programs,)](
                *pointers, h_TD.stride(0), width, num_rows, *flags, num_warps=block.row_warps
            )
    return dh_TD, dw if w_D is None else dw.sum(0).to(w_D.dtype)


def _rows(h_TD: Tensor) -> Tensor:
    """Rows at any stride, elements side by side."""
    return h_TD if h_TD.stride(1) == 1 else h_TD.contiguous()
