"""The two Triton kernels of InfoNCE and the block configurations that fit each target.

`infonce_triton.py` says what they are for. A tile is BLOCK_C rows by BLOCK_N columns; logits z are
in units of log 2, so that exp2 serves. Numbers come in float32 tensors: as arguments a compiler
might widen them.

C rows of a chunk, N documents, D width, P prefixes, T column tiles, R row tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

EXP, STATISTICS, GRADIENT = 0, 1, 2  # what the scores kernel writes
FINISH_ROWS = 32
WIDEST = 64  # of all blocks' widths


class Config(NamedTuple):
    """Blocks of the scores kernel: rows, columns, width; warps and pipeline stages."""

    rows: int
    columns: int
    width: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        return {"BLOCK_C": self.rows, "BLOCK_N": self.columns, "BLOCK_D": self.width}


# What compiles without a spill and within the shared memory, in every mode, with ids and margin
# (tests/kernels/test_infonce_aot.py compiles each). With several prefixes the accumulator lives on
# through the epilogue, so tiles are smaller; masks of ragged widths and owners take registers too.
# By bytes of an element.
_Lists = dict[int, tuple[Config, ...]]
_SAFE: _Lists = {2: (Config(32, 32, 32, 4, 2),), 4: (Config(32, 32, 32, 4, 2),)}
_PLAIN_ONE = {
    2: (Config(128, 64, 64, 8, 3), Config(64, 128, 64, 8, 3), Config(64, 64, 64, 8, 3)),
    4: (Config(64, 64, 32, 8, 2), Config(64, 32, 32, 4, 2)),
}
_ANY_ONE = {2: (Config(64, 64, 64, 8, 3), Config(128, 32, 64, 8, 3)), 4: _PLAIN_ONE[4]}
_PLAIN_MORE: dict[str, _Lists] = {
    "sm_80": {
        2: (Config(128, 32, 64, 8, 3), Config(64, 64, 32, 8, 2)),
        4: (Config(64, 32, 32, 8, 2),),
    },
    "sm_90": {
        2: (Config(64, 64, 64, 8, 3), Config(128, 32, 64, 8, 3), Config(64, 64, 32, 8, 2)),
        4: (Config(64, 64, 32, 8, 2), Config(64, 32, 32, 8, 2)),
    },
    "sm_100": {
        2: (Config(128, 32, 64, 8, 3), Config(64, 64, 32, 8, 2)),
        4: (Config(64, 64, 32, 8, 2),),
    },
    "gfx942": {
        2: (Config(64, 64, 64, 8, 3), Config(64, 64, 32, 8, 2)),
        4: (Config(64, 64, 32, 8, 2),),
    },
}
_NARROW = (Config(64, 32, 64, 8, 2), Config(64, 32, 32, 8, 2))
_ANY_MORE: dict[str, _Lists] = {
    "sm_80": {2: _NARROW, 4: (Config(64, 32, 32, 8, 2),)},
    "sm_90": {2: _NARROW, 4: (Config(64, 32, 32, 8, 2),)},
    "sm_100": {2: _NARROW, 4: (Config(32, 32, 32, 8, 2),)},
    "gfx942": {2: _SAFE[2], 4: (Config(64, 32, 32, 4, 2),)},
}


def candidates(
    target: str, element_size: int, num_prefixes: int, *, plain: bool
) -> tuple[Config, ...]:
    """Configurations to choose from by measuring; for a GPU that is not listed the smallest.

    plain: no owners, and prefixes that are multiples of `WIDEST`; anything else takes more
    registers.
    """
    if target not in _PLAIN_MORE:
        return _SAFE[element_size]
    if num_prefixes == 1:
        return (_PLAIN_ONE if plain else _ANY_ONE)[element_size]
    return (_PLAIN_MORE if plain else _ANY_MORE)[target][element_size]


@triton.jit
def scores_kernel(
    widths_ptr, q_ptr, k_ptr, e_ptr, ia_ptr, ib_ptr, positive_z_ptr, limit_ptr, positive_ptr,
    row_id_ptr, column_id_ptr, owner_ptr,
    top_ptr, sum_ptr, pull_ptr, masked_ptr,
    column_top_ptr, column_sum_ptr, column_pull_ptr,
    row_lse_ptr, column_lse_ptr, positive_g_ptr, row_factor_ptr, column_factor_ptr,
    num_prefixes, num_rows, num_columns, first_row, q_stride, k_stride,
    EVEN: tl.constexpr, MODE: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_MARGIN: tl.constexpr, HAS_OWNERS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of scores, all prefixes; widths_ptr: 0, then the prefixes, int32 [P + 1].

    EXP: E = 2^(z - top) [P, C, N], its tile's top and sum [P, C, T], sum of E z [P - 1, C, T].
    STATISTICS: top and sum, and the same over the tile's rows, column_top and column_sum [P, R, N].
    GRADIENT: Gs [P, C, N] instead of E, sums of G z over columns [P, C, T] and rows [P, R, N].
    The positive is in none of the sums, but in those over rows.
    """
    num_row_tiles = tl.cdiv(num_rows, BLOCK_C)
    num_column_tiles = tl.cdiv(num_columns, BLOCK_N)
    # bands of 8 row tiles, so that the tiles running at a time share their operands in the L2
    pid = tl.program_id(0)
    band = pid // (8 * num_column_tiles)
    band_rows = tl.minimum(num_row_tiles - band * 8, 8)
    in_band = pid % (8 * num_column_tiles)
    row_tile = band * 8 + in_band % band_rows
    column_tile = in_band // band_rows

    row = row_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, column_in = row < num_rows, column < num_columns
    row64 = row.to(tl.int64)
    q_row = q_ptr + row64[:, None] * q_stride
    k_row = k_ptr + column.to(tl.int64)[:, None] * k_stride

    acc = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    last = num_prefixes - 1
    # no static_range: unrolled, the masks of all prefixes would be computed first and spill
    for p in range(num_prefixes):
        start, end = tl.load(widths_ptr + p), tl.load(widths_ptr + p + 1)
        if EVEN:  # widths are multiples of BLOCK_D: loads are aligned, and can be pipelined
            start = tl.multiple_of(start, 16)
        for d in range(start, end, BLOCK_D):
            dim = d + tl.arange(0, BLOCK_D)
            q_in, k_in = row_in[:, None], column_in[:, None]
            if not EVEN:
                q_in, k_in = q_in & (dim < end)[None, :], k_in & (dim < end)[None, :]
            q = tl.load(q_row + dim[None, :], q_in, other=0.0)
            k = tl.load(k_row + dim[None, :], k_in, other=0.0)
            acc = tl.dot(q, tl.trans(k), acc, input_precision=PRECISION)
        # what follows must not be invariant in p: the compiler would lift the masks out of the
        # loop, where they hold registers through the products and spill. Hence volatile loads.
        at_row, at_column = p * num_rows + row, p * num_columns + column
        ia = tl.load(ia_ptr + at_row, row_in, other=-1.0)
        ib = tl.load(ib_ptr + at_column, column_in, other=-1.0)
        inside = (ia >= 0)[:, None] & (ib >= 0)[None, :]
        z = acc * ia[:, None] * ib[None, :]
        positive = tl.load(positive_ptr + row, row_in, other=-1, volatile=True).to(tl.int32)
        at_positive = positive[:, None] == column[None, :]
        out = inside == 0
        if HAS_IDS:
            row_id = tl.load(row_id_ptr + row, row_in, other=0, volatile=True)
            column_id = tl.load(column_id_ptr + column, column_in, other=0, volatile=True)
            out = out | (row_id[:, None] == column_id[None, :])
        if HAS_OWNERS:
            owner = tl.load(owner_ptr + column, column_in, other=-1, volatile=True)
            theirs = (owner[None, :] != -1) & (owner[None, :] != (row64 + first_row)[:, None])
            out = out | theirs
        if HAS_MARGIN:
            limit = tl.load(limit_ptr + at_row, row_in, other=0.0)
            out = out | (z > limit[:, None])
        if MODE != 2:  # the widest prefix, the last to come, stands in the end
            counted = out & inside & (at_positive == 0)
            masked = tl.sum(counted.to(tl.int32), 1)
            tl.store(masked_ptr + row64 * num_column_tiles + column_tile, masked, row_in)
        z = tl.where(out | at_positive, float("-inf"), z)

        e_at = e_ptr + (at_row.to(tl.int64) * num_columns)[:, None] + column[None, :]
        row_partial = at_row.to(tl.int64) * num_column_tiles + column_tile
        column_partial = (p * num_row_tiles + row_tile).to(tl.int64) * num_columns + column
        if MODE == 2:
            row_lse = tl.load(row_lse_ptr + at_row, row_in, other=0.0)
            column_lse = tl.load(column_lse_ptr + at_column, column_in, other=float("inf"))
            # -inf minus +inf is -inf: exp2 gives 0
            g = 0.5 * (tl.exp2(z - row_lse[:, None]) + tl.exp2(z - column_lse[None, :]))
            positive_g = tl.load(positive_g_ptr + at_row, row_in, other=0.0)
            if p < last:
                gz = tl.where(g > 0, g * z, 0.0)
                tl.store(pull_ptr + row_partial, tl.sum(gz, 1), row_in)
                positive_z = tl.load(positive_z_ptr + at_row, row_in, other=0.0)
                gz = tl.where(at_positive, (positive_g * positive_z)[:, None], gz)
                tl.store(column_pull_ptr + column_partial, tl.sum(gz, 0), column_in)
            g = tl.where(at_positive, positive_g[:, None], g)
            row_factor = tl.load(row_factor_ptr + at_row, row_in, other=0.0)
            column_factor = tl.load(column_factor_ptr + at_column, column_in, other=0.0)
            g = g * row_factor[:, None] * column_factor[None, :]
            tl.store(e_at, g.to(e_ptr.dtype.element_ty), inside)
        else:
            top = tl.max(z, 1)
            top = tl.where(top == float("-inf"), 0.0, top)
            e = tl.exp2(z - top[:, None])
            tl.store(top_ptr + row_partial, top, row_in)
            tl.store(sum_ptr + row_partial, tl.sum(e, 1), row_in)
            if MODE == 1:
                column_top = tl.max(z, 0)
                column_top = tl.where(column_top == float("-inf"), 0.0, column_top)
                column_sum = tl.sum(tl.exp2(z - column_top[None, :]), 0)
                tl.store(column_top_ptr + column_partial, column_top, column_in)
                tl.store(column_sum_ptr + column_partial, column_sum, column_in)
            else:
                if p < last:
                    ez = tl.where(e > 0, e * z, 0.0)
                    tl.store(pull_ptr + row_partial, tl.sum(ez, 1), row_in)
                tl.store(e_at, e.to(e_ptr.dtype.element_ty), inside)


@triton.jit
def finish_kernel(
    e_ptr, top_ptr, row_lse_ptr, positive_ptr, positive_g_ptr, positive_z_ptr,
    row_factor_ptr, column_factor_ptr, column_pull_ptr, num_rows, num_columns,
    P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """E to H in place, widest prefix first; columns' sums of G z per row tile."""
    row_tile, column_tile = tl.program_id(1), tl.program_id(0)
    num_column_tiles = tl.num_programs(0)
    row = row_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, column_in = row < num_rows, column < num_columns
    row64, column64 = row.to(tl.int64), column.to(tl.int64)
    inside = row_in[:, None] & column_in[None, :]
    positive = tl.load(positive_ptr + row, row_in, other=-1).to(tl.int32)
    at_positive = positive[:, None] == column[None, :]
    h = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for p in tl.static_range(P - 1, -1, -1):
        at_row, at_column = p * num_rows + row, p * num_columns + column
        e_at = e_ptr + p * num_rows.to(tl.int64) * num_columns
        e_at += row64[:, None] * num_columns + column64[None, :]
        e = tl.load(e_at, inside, other=0.0).to(tl.float32)
        top = tl.load(top_ptr + at_row.to(tl.int64) * num_column_tiles + column_tile, row_in, 0.0)
        row_lse = tl.load(row_lse_ptr + at_row, row_in, other=0.0)
        g = e * tl.exp2(top - row_lse)[:, None]
        positive_g = tl.load(positive_g_ptr + at_row, row_in, other=0.0)
        if p < P - 1:
            positive_z = tl.load(positive_z_ptr + at_row, row_in, other=0.0)
            z = top[:, None] + tl.log2(tl.where(e > 0, e, 1.0))
            gz = tl.where(at_positive, (positive_g * positive_z)[:, None], g * z)
            column_partial = (p * tl.num_programs(1) + row_tile).to(tl.int64) * num_columns
            tl.store(column_pull_ptr + column_partial + column64, tl.sum(gz, 0), column_in)
        g = tl.where(at_positive, positive_g[:, None], g)
        row_factor = tl.load(row_factor_ptr + at_row, row_in, other=0.0)
        column_factor = tl.load(column_factor_ptr + at_column, column_in, other=0.0)
        h += g * row_factor[:, None] * column_factor[None, :]
        tl.store(e_at, h.to(e_ptr.dtype.element_ty), inside)
