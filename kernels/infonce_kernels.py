"""The Triton kernels of InfoNCE: what is done to a chunk's scores, and to rows of vectors.

`infonce_triton.py` says in which order. A tile is BLOCK_C rows by BLOCK_N columns of scores
s = q . k; logits z are in units of log 2, so that exp2 serves. Rows of scores and of H lie
`stride` apart, a multiple of 16: only then can a thread load or store more than one at a time.
Numbers come in float32 tensors: as arguments a compiler might widen them.

C rows of a chunk, N documents, D width, T column tiles, R row tiles.
"""

# mypy: allow-untyped-defs
# the kernels' arguments have Triton's types

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_C, BLOCK_N, NUM_WARPS = 16, 256, 4  # of a tile of scores
BLOCK_R, BLOCK_D = 8, 128  # of a block of vectors
BLOCK_T = 1024  # of a row's partial sums


@triton.jit
def _left_out(
    z, row, column, row_id_ptr, column_id_ptr, owner_ptr, limit_ptr, first_row,
    row_in, column_in,
    HAS_IDS: tl.constexpr, HAS_OWNERS: tl.constexpr, HAS_MARGIN: tl.constexpr,
):  # fmt: skip
    """Columns of a tile that are no negatives: masked ones, and the positive."""
    out = (row_in[:, None] & column_in[None, :]) == 0
    if HAS_IDS:
        row_id = tl.load(row_id_ptr + row, row_in, other=0)
        column_id = tl.load(column_id_ptr + column, column_in, other=0)
        out = out | (row_id[:, None] == column_id[None, :])
    if HAS_OWNERS:
        owner = tl.load(owner_ptr + column, column_in, other=-1)
        theirs = owner[None, :] != (row.to(tl.int64) + first_row)[:, None]
        out = out | (theirs & (owner != -1)[None, :])
    if HAS_MARGIN:
        limit = tl.load(limit_ptr + row, row_in, other=0.0)
        out = out | (z > limit[:, None])
    return out


@triton.jit
def statistics_kernel(
    s_ptr, ia_ptr, ib_ptr, positive_ptr, row_id_ptr, column_id_ptr, owner_ptr, limit_ptr,
    top_ptr, sum_ptr, masked_ptr, column_top_ptr, column_sum_ptr,
    num_rows, num_columns, first_row, stride,
    HAS_IDS: tl.constexpr, HAS_OWNERS: tl.constexpr, HAS_MARGIN: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile's top logit and sum of 2^(z - top) by row, [C, T], and by column, [R, N].

    Over the negatives alone. masked: how many columns a mask leaves out, [C, T].
    """
    num_tiles = tl.cdiv(num_columns, BLOCK_N)
    row_tile, column_tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    row = row_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, column_in = row < num_rows, column < num_columns
    inside = row_in[:, None] & (column < stride)[None, :]
    s = tl.load(s_ptr + row.to(tl.int64)[:, None] * stride + column[None, :], inside, other=0.0)
    ia = tl.load(ia_ptr + row, row_in, other=0.0)
    ib = tl.load(ib_ptr + column, column_in, other=0.0)
    z = s * ia[:, None] * ib[None, :]
    positive = tl.load(positive_ptr + row, row_in, other=-1).to(tl.int32)
    at_positive = positive[:, None] == column[None, :]
    out = _left_out(
        z, row, column, row_id_ptr, column_id_ptr, owner_ptr, limit_ptr, first_row,
        row_in, column_in, HAS_IDS, HAS_OWNERS, HAS_MARGIN,
    )  # fmt: skip
    partial = row.to(tl.int64) * num_tiles + column_tile
    if HAS_IDS or HAS_OWNERS or HAS_MARGIN:
        counted = out & row_in[:, None] & column_in[None, :] & (at_positive == 0)
        tl.store(masked_ptr + partial, tl.sum(counted.to(tl.int32), 1), row_in)
    z = tl.where(out | at_positive, float("-inf"), z)
    top = tl.max(z, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    tl.store(top_ptr + partial, top, row_in)
    tl.store(sum_ptr + partial, tl.sum(tl.exp2(z - shift[:, None]), 1), row_in)
    if HAS_COLUMNS:
        top = tl.max(z, 0)
        shift = tl.where(top == float("-inf"), 0.0, top)
        partial = row_tile.to(tl.int64) * num_columns + column
        tl.store(column_top_ptr + partial, top, column_in)
        tl.store(column_sum_ptr + partial, tl.sum(tl.exp2(z - shift[None, :]), 0), column_in)


@triton.jit
def losses_kernel(
    top_ptr, sum_ptr, masked_ptr, positive_z_ptr, loss_ptr, lse_ptr, g_ptr, num_masked_ptr,
    num_tiles, HAS_MASKED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One row's loss, logsumexp (in base 2), gradient at the positive and number of masked columns.

    With L the logsumexp of the negatives, loss = log(1 + exp(L - z)) and the gradient is minus the
    negatives' share: both keep their digits where the row is solved.
    """
    row = tl.program_id(0)
    partial = row.to(tl.int64) * num_tiles
    tops = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_T,), tl.float32)
    masked = tl.zeros((BLOCK_T,), tl.int32)
    for first in range(0, num_tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        tile_top = tl.load(top_ptr + partial + tile, tile < num_tiles, other=float("-inf"))
        tile_sum = tl.load(sum_ptr + partial + tile, tile < num_tiles, other=0.0)
        new = tl.maximum(tops, tile_top)
        shift = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp2(tops - shift) + tile_sum * tl.exp2(tile_top - shift)
        tops = new
        if HAS_MASKED:
            masked += tl.load(masked_ptr + partial + tile, tile < num_tiles, other=0)
    top = tl.max(tops, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(sums * tl.exp2(tops - shift), 0)
    positive_z = tl.load(positive_z_ptr + row)
    above = 0.6931471805599453 * ((shift - positive_z) + tl.log2(total))
    t = tl.exp(-tl.abs(above))
    u = 1.0 + t
    # log1p: what rounding 1 + t loses is in u - 1 too
    log1p = tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))
    loss = tl.maximum(above, 0.0) + log1p
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, positive_z + 1.4426950408889634 * loss)
    tl.store(g_ptr + row, -tl.where(above > 0, 1.0, t) / u)
    tl.store(num_masked_ptr + row, tl.sum(masked, 0).to(tl.int64))


@triton.jit
def gradient_kernel(
    s_ptr, h_ptr, ia_ptr, ib_ptr, positive_ptr, row_id_ptr, column_id_ptr, owner_ptr, limit_ptr,
    lse_ptr, column_lse_ptr, positive_g_ptr, row_factor_ptr, column_factor_ptr,
    num_rows, num_columns, first_row, stride,
    HAS_IDS: tl.constexpr, HAS_OWNERS: tl.constexpr, HAS_MARGIN: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of H: the loss's gradient over the logits times a factor of the row and the column.

    With columns it is the mean of both directions'. Beyond N it is 0.
    """
    num_tiles = tl.cdiv(num_columns, BLOCK_N)
    row_tile, column_tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    row = row_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, column_in = row < num_rows, column < num_columns
    inside = row_in[:, None] & (column < stride)[None, :]
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    s = tl.load(s_ptr + at, inside, other=0.0)
    ia = tl.load(ia_ptr + row, row_in, other=0.0)
    ib = tl.load(ib_ptr + column, column_in, other=0.0)
    z = s * ia[:, None] * ib[None, :]
    positive = tl.load(positive_ptr + row, row_in, other=-1).to(tl.int32)
    at_positive = positive[:, None] == column[None, :]
    out = _left_out(
        z, row, column, row_id_ptr, column_id_ptr, owner_ptr, limit_ptr, first_row,
        row_in, column_in, HAS_IDS, HAS_OWNERS, HAS_MARGIN,
    )  # fmt: skip
    z = tl.where(out, float("-inf"), z)
    lse = tl.load(lse_ptr + row, row_in, other=0.0)
    g = tl.exp2(z - lse[:, None])
    if HAS_COLUMNS:
        # -inf minus +inf is -inf: exp2 gives 0
        column_lse = tl.load(column_lse_ptr + column, column_in, other=float("inf"))
        g = 0.5 * (g + tl.exp2(z - column_lse[None, :]))
    positive_g = tl.load(positive_g_ptr + row, row_in, other=0.0)
    g = tl.where(at_positive, positive_g[:, None], g)
    row_factor = tl.load(row_factor_ptr + row, row_in, other=0.0)
    column_factor = tl.load(column_factor_ptr + column, column_in, other=0.0)
    h = g * row_factor[:, None] * column_factor[None, :]
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), inside)


@triton.jit
def inverse_norms_kernel(
    x_ptr, inverse_ptr, num_rows, width, stride,
    EPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / max(|x|, EPS) of each row."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_in, row64 = row < num_rows, row.to(tl.int64)
    squares = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in range(0, width, BLOCK_D):
        dim = first + tl.arange(0, BLOCK_D)
        inside = row_in[:, None] & (dim < width)[None, :]
        x = tl.load(x_ptr + row64[:, None] * stride + dim[None, :], inside, other=0.0)
        x = x.to(tl.float32)
        squares += x * x
    norm = tl.maximum(tl.sqrt(tl.sum(squares, 1)), EPS)
    tl.store(inverse_ptr + row, 1.0 / norm, row_in)


@triton.jit
def positives_kernel(
    q_ptr, k_ptr, positive_ptr, ia_ptr, ib_ptr, z_ptr, num_rows, width, q_stride, k_stride,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The positive's logit of each row; ia has the temperature in it."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_in, row64 = row < num_rows, row.to(tl.int64)
    positive = tl.load(positive_ptr + row, row_in, other=0)
    products = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in range(0, width, BLOCK_D):
        dim = first + tl.arange(0, BLOCK_D)
        inside = row_in[:, None] & (dim < width)[None, :]
        q = tl.load(q_ptr + row64[:, None] * q_stride + dim[None, :], inside, other=0.0)
        k = tl.load(k_ptr + positive[:, None] * k_stride + dim[None, :], inside, other=0.0)
        products += q.to(tl.float32) * k.to(tl.float32)
    ia = tl.load(ia_ptr + row, row_in, other=0.0)
    ib = tl.load(ib_ptr + positive, row_in, other=0.0)
    tl.store(z_ptr + row, tl.sum(products, 1) * ia * ib, row_in)


@triton.jit
def tangent_kernel(
    raw_ptr, x_ptr, inverse_ptr, factor_ptr, scale_ptr, out_ptr, along_ptr,
    num_rows, width, raw_stride, x_stride, out_stride,
    HAS_FACTOR: tl.constexpr, ADD: tl.constexpr,
    EPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient without what normalising takes out of it, raw - (x . raw) x / |x|^2, times scale
    and a row's factor; along: x . raw. A norm that was too short to be one took nothing out."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_in, row64 = row < num_rows, row.to(tl.int64)
    products = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in range(0, width, BLOCK_D):
        dim = first + tl.arange(0, BLOCK_D)
        inside = row_in[:, None] & (dim < width)[None, :]
        raw = tl.load(raw_ptr + row64[:, None] * raw_stride + dim[None, :], inside, other=0.0)
        x = tl.load(x_ptr + row64[:, None] * x_stride + dim[None, :], inside, other=0.0)
        products += raw * x.to(tl.float32)
    along = tl.sum(products, 1)
    tl.store(along_ptr + row, along, row_in)
    inverse = tl.load(inverse_ptr + row, row_in, other=0.0)
    pull = tl.where(inverse < 0.99 / EPS, along * inverse * inverse, 0.0)
    factor = tl.full((BLOCK_R,), 1.0, tl.float32) * tl.load(scale_ptr)
    if HAS_FACTOR:
        factor *= tl.load(factor_ptr + row, row_in, other=0.0)
    for first in range(0, width, BLOCK_D):
        dim = first + tl.arange(0, BLOCK_D)
        inside = row_in[:, None] & (dim < width)[None, :]
        raw = tl.load(raw_ptr + row64[:, None] * raw_stride + dim[None, :], inside, other=0.0)
        x = tl.load(x_ptr + row64[:, None] * x_stride + dim[None, :], inside, other=0.0)
        out = (raw - pull[:, None] * x.to(tl.float32)) * factor[:, None]
        out_at = out_ptr + row64[:, None] * out_stride + dim[None, :]
        if ADD:
            out += tl.load(out_at, inside, other=0.0)
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), inside)
