"""`linear_loss` on a GPU: chunks and products of `linear_loss_torch.py`, the rows in one kernel.

One program a row of V logits, twice over the row:

    1. online, in float32: top and sum of exp(z - top) of all columns but the target, with a teacher
       also top and sum of exp((y - top) / temperature) and, unless that is 1, the same of z
    2. the divergence's terms, and the gradient over the student's logits

With L the logsumexp of the other columns, ce = log(1 + exp(L - z_target)), and the target's
gradient is minus the others' share: both keep their digits where a token is all but certain. The
divergence is summed as in `linear_loss_torch.py`; expm1(d) - d is a series where |d| < 1/2.

The gradient takes the place of the logits. In 16 bits it fills the first half of each row: a
block is read whole before it is written (the barrier), and a block's place was read before by
then. Rows of the buffers are multiples of 16 elements, so that the products see aligned operands
for any V; what lies behind the last logit is loaded with it, left out, and written over.

Bytes a logit with 16-bit inputs: 4 written, 8 read, 2 written by the two passes, 4 read by the
products; a teacher's 4 written and 8 read. Work memory: `WORK_ELEMENTS` of float32, twice that
with a teacher. No atomics: the same bits when run again. A target that is out of range makes its
loss NaN.

C rows of a chunk, V vocabulary.
"""

# mypy: allow-untyped-defs
# the kernels' arguments have Triton's types

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drama.kernels.linear_loss_torch import (
    GPU_WORK_ELEMENTS,
    Evaluation,
    Problem,
    RowStep,
    evaluate_chunks,
)

WORK_ELEMENTS = GPU_WORK_ELEMENTS
BLOCK_V, NUM_WARPS = 4096, 8  # the tests compile it for every target
ROW_MULTIPLE = 16  # elements: cuBLAS wants rows that begin at multiples of 16 bytes


def evaluate(problem: Problem) -> Evaluation:
    """Losses of all rows, and the gradients that are wanted."""
    return evaluate_chunks(
        problem, rows, work_elements=WORK_ELEMENTS, halves=True, multiple=ROW_MULTIPLE
    )


def rows(
    z_CV: Tensor, y_CV: Tensor | None, target_C: Tensor, step: RowStep
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows of a chunk, as `linear_loss_torch.Rows` says."""
    num_rows, num_columns = z_CV.shape
    ce_C = z_CV.new_empty(num_rows)
    kl_C = None if y_CV is None else torch.empty_like(ce_C)
    g_CV = z_CV if step.dtype == z_CV.dtype else z_CV.view(step.dtype)[:, :num_columns]
    with torch.cuda.device_of(z_CV):
        rows_kernel[(num_rows,)](
            z_CV, z_CV if y_CV is None else y_CV, g_CV, target_C.contiguous(),
            ce_C, ce_C if kl_C is None else kl_C,
            z_CV.stride(0), 0 if y_CV is None else y_CV.stride(0), g_CV.stride(0),
            num_columns, triton.cdiv(num_columns, ROW_MULTIPLE) * ROW_MULTIPLE,
            1 / step.temperature, step.temperature**2, step.ce_scale, step.kl_scale,
            HAS_TEACHER=y_CV is not None, TEMPERED=step.temperature != 1,
            WITH_GRADIENT=step.with_gradient, IN_HALVES=step.dtype != z_CV.dtype,
            BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
        )  # fmt: skip
    return ce_C, kl_C, g_CV if step.with_gradient else None


@triton.jit
def _add_block(top, total, x_V, scale):
    """Running maximum and sum of exp(scale (x - maximum)), one block further."""
    new = tl.maximum(top, tl.max(x_V, 0))
    total = total * tl.exp((top - new) * scale) + tl.sum(tl.exp((x_V - new) * scale), 0)
    return new, total


@triton.jit
def _log1p(u):
    """For u in [0, 1]; what rounding 1 + u lost is put back as a factor."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _divergence(q_V, s_V, d_V):
    """Terms whose sum is KL(q || s), d = log s - log q; see linear_loss_torch.py."""
    # expm1(d) - d = d^2 (1/2 + d/6 + d^2/24 + ...), to float32's precision where |d| < 1/2
    series_V = 1.0 / 5040 + d_V * (1.0 / 40320 + d_V * (1.0 / 362880))
    series_V = 1.0 / 24 + d_V * (1.0 / 120 + d_V * (1.0 / 720 + d_V * series_V))
    near_V = d_V * d_V * (0.5 + d_V * (1.0 / 6 + d_V * series_V))
    term_V = tl.where(tl.abs(d_V) < 0.5, q_V * near_V, (s_V - q_V) - q_V * d_V)
    return tl.where(term_V < 0, 0.0, term_V)  # not a maximum, which may drop a NaN


@triton.jit
def rows_kernel(
    z_ptr, y_ptr, g_ptr, target_ptr, ce_ptr, kl_ptr, z_stride, y_stride, g_stride,
    num_columns, row_elements,
    inverse_temperature, squared_temperature, ce_scale, kl_scale,
    HAS_TEACHER: tl.constexpr, TEMPERED: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    IN_HALVES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row: its losses, and its gradient over its logits.

    Loads and stores go on to row_elements, a multiple of 16, so that each is of several elements.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    y_ptr += row * y_stride
    g_ptr += row * g_stride
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < num_columns)
    target = tl.where(known, target, -1).to(tl.int32)
    target_z = 0.0
    # a top below every logit, but finite: a difference of two is a number
    top, total = -1e38, 0.0  # of the columns that are not the target
    s_top, s_total = -1e38, 0.0
    q_top, q_total = -1e38, 0.0
    for first in range(0, num_columns, BLOCK_V):
        v_V = first + tl.arange(0, BLOCK_V)
        inside_V, loaded_V = v_V < num_columns, v_V < row_elements
        z_V = tl.load(z_ptr + v_V, mask=loaded_V, other=0.0)
        z_V = tl.where(inside_V, z_V, -float("inf"))
        target_z += tl.sum(tl.where(v_V == target, z_V, 0.0), 0)
        top, total = _add_block(top, total, tl.where(v_V == target, -float("inf"), z_V), 1.0)
        if HAS_TEACHER:
            y_V = tl.load(y_ptr + v_V, mask=loaded_V, other=0.0)
            y_V = tl.where(inside_V, y_V, -float("inf"))
            q_top, q_total = _add_block(q_top, q_total, y_V, inverse_temperature)
            if TEMPERED:
                s_top, s_total = _add_block(s_top, s_total, z_V, inverse_temperature)

    above = (top - target_z) + tl.log(total)
    u = tl.exp(-tl.abs(above))
    ce = tl.maximum(above, 0.0) + _log1p(u)
    others = tl.where(above > 0, 1.0, u) / (1.0 + u)
    tl.store(ce_ptr + row, tl.where(known, ce, float("nan")))
    if HAS_TEACHER or WITH_GRADIENT:
        # not exp(z - logsumexp): rounding that would scale a whole row
        p_top = tl.maximum(top, target_z)
        p_total = total * tl.exp(top - p_top) + tl.exp(target_z - p_top)
        p_share = 1.0 / p_total
        if HAS_TEACHER:
            if not TEMPERED:
                s_top, s_total = p_top, p_total
            s_share, q_share = 1.0 / s_total, 1.0 / q_total
            shift = (s_top - q_top) * inverse_temperature + (tl.log(s_total) - tl.log(q_total))
        kl_V = tl.full([BLOCK_V], 0.0, tl.float32)
        for first in range(0, num_columns, BLOCK_V):
            v_V = first + tl.arange(0, BLOCK_V)
            inside_V, loaded_V = v_V < num_columns, v_V < row_elements
            z_V = tl.load(z_ptr + v_V, mask=loaded_V, other=0.0)
            g_V = kl_V
            if WITH_GRADIENT:
                g_V = ce_scale * tl.where(v_V == target, -others, tl.exp(z_V - p_top) * p_share)
            if HAS_TEACHER:
                y_V = tl.load(y_ptr + v_V, mask=loaded_V, other=0.0)
                q_V = tl.exp((y_V - q_top) * inverse_temperature) * q_share
                s_V = tl.exp((z_V - s_top) * inverse_temperature) * s_share
                d_V = (z_V - y_V) * inverse_temperature - shift
                kl_V += tl.where(inside_V, _divergence(q_V, s_V, d_V), 0.0)
                if WITH_GRADIENT:
                    g_V += kl_scale * (s_V - q_V)
            if WITH_GRADIENT:
                if IN_HALVES:
                    tl.debug_barrier()
                tl.store(g_ptr + v_V, g_V.to(g_ptr.dtype.element_ty), mask=loaded_V)
        if HAS_TEACHER:
            tl.store(kl_ptr + row, tl.sum(kl_V, 0) * squared_temperature)
