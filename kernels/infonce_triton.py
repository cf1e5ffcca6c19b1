"""InfoNCE on a GPU: matrix products of cuBLAS (or rocBLAS), and Triton kernels for the rest.

One prefix after the other, the widest first. A chunk of rows at a time:

    1. S = q k^T in float32, some rows of the chunk at a time
    2. `statistics_kernel`, `losses_kernel`: its rows' logsumexp and loss; masks are comparisons
    3. `gradient_kernel`: H = G ia ib in the vectors' dtype, G the gradient over the logits
    4. dq = H k and dk += H^T q for the whole chunk, in float32
    5. `tangent_kernel`: what normalising takes out of a gradient, the scale, and the final dtype

Three GEMMs. Besides them a logit costs, in bf16, 4 bytes written and 8 read, which the L2 serves,
and 2 written and 4 read of H. Rounding to bf16 happens to H alone; logits, exponents, sums, norms
and everything about the loss are float32. Work memory: `GRADIENT_BYTES` of H (or as much as a bf16
gradient of k, if that is more), `SCORE_BYTES` of S, and the float32 gradient of k.

cuBLAS takes 10 ms for B = N = 65,536, D = 768 on an H200, and steps 2 and 3 a few more; a Triton
kernel whose tiles of the product end in the exponentials took 23 ms.

fp16 has no range for H, a product of inverse norms: its vectors are scaled by powers of two first,
which is exact, and its gradients come out in float32.

The positive is in no sum: with L the logsumexp of the negatives, loss = log(1 + exp(L - z_pos)).
A solved row keeps its digits, and one without negatives has exactly 0.

`symmetric` needs the columns' logsumexp before the first gradient: a fourth product.

Deterministic: no atomics, partial sums are written out and summed in order.

B queries, C rows of a chunk, N documents, D width, P prefixes, T column tiles, R row tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from drama.kernels.infonce_kernels import (
    BLOCK_C,
    BLOCK_D,
    BLOCK_N,
    BLOCK_R,
    BLOCK_T,
    NUM_WARPS,
    gradient_kernel,
    inverse_norms_kernel,
    losses_kernel,
    positives_kernel,
    statistics_kernel,
    tangent_kernel,
)
from drama.kernels.infonce_problem import EPS, Evaluation, Problem, column_targets

GRADIENT_BYTES = 2**29  # of H
SCORE_BYTES = 2**28  # of S; less would stay in the L2 cache, but launching would take longer
FEWEST_ROWS = 128  # of S: fewer, and the product does not fill the GPU
FP16_UNIT = 1 / 32  # a norm near 1 counts as 32: H up to 2^12, and small entries keep their digits
FP16_MOST = 255.0  # of a factor, so that two of them stay finite: a vector of next to no length
LOG2E, LN2 = math.log2(math.e), math.log(2.0)


def evaluate(problem: Problem, *, with_gradient: bool) -> Evaluation:
    """Loss and statistics of all rows, and the gradients where asked for."""
    problem = problem._replace(
        positive_B=problem.positive_B.contiguous(),
        k_ids_N=None if problem.k_ids_N is None else problem.k_ids_N.contiguous(),
        owner_N=None if problem.owner_N is None else problem.owner_N.contiguous(),
    )
    with torch.cuda.device_of(problem.q_BD):
        parts, gradients = [], None
        for width, weight in reversed(list(zip(problem.widths, problem.weights, strict=True))):
            prefix = _Prefix(problem, width, weight)
            if with_gradient and gradients is None:
                gradients = _Gradients(prefix, whole=len(problem.widths) == 1)
            parts.append(prefix.evaluate(gradients))
    loss_PB, lse_PB, score_PB = (
        torch.stack([part[i] for part in reversed(parts)]) if parts[1:] else parts[0][i][None]
        for i in range(3)
    )
    done = Evaluation(loss_PB, lse_PB, score_PB, parts[0][3])
    if gradients is None:
        return done
    assert gradients.dk_ND is not None
    dtemperature = torch.stack(gradients.dtemperatures).sum()
    return done._replace(
        dq_BD=problem.at_full_width(gradients.dq_BD),
        dk_ND=problem.at_full_width(gradients.dk_ND),
        dtemperature=dtemperature / -problem.temperature,
    )


class _Gradients:
    """Of the widest prefix, to which the others add theirs; in float32 where there are others.

    dk_ND: None until it is written, where that is not float32: at the end, when H is gone.
    """

    def __init__(self, widest: _Prefix, *, whole: bool) -> None:
        dtype = widest.gradient_dtype if whole else torch.float32
        self.dq_BD = widest.q_BD.new_empty(widest.num_rows, widest.width, dtype=dtype)
        self.dk_ND: Tensor | None = None
        if dtype == torch.float32:
            self.dk_ND = self.dq_BD.new_empty(widest.num_columns, widest.width)
        self.dtemperatures: list[Tensor] = []


class _Prefix:
    """InfoNCE of the first `width` dimensions."""

    def __init__(self, problem: Problem, width: int, weight: float) -> None:
        self.problem, self.width = problem, width
        q_BD, k_ND = (
            x[:, :width] if x.stride(1) == 1 else x[:, :width].contiguous()
            for x in (problem.q_BD, problem.k_ND)
        )
        self.num_rows, self.num_columns = len(q_BD), len(k_ND)
        ia_B, ib_N = _inverse_norms(q_BD), _inverse_norms(k_ND)
        self.powers: tuple[Tensor | None, Tensor | None] = (None, None)
        self.gradient_dtype, unit = q_BD.dtype, 1.0
        self.row_factor_B, self.column_factor_N = ia_B, ib_N
        if q_BD.dtype == torch.float16:
            self.gradient_dtype, unit = torch.float32, FP16_UNIT
            q_BD, ia_B, power_B = _near_one(q_BD, ia_B)
            k_ND, ib_N, power_N = _near_one(k_ND, ib_N)
            self.powers = power_B, power_N
            self.row_factor_B, self.column_factor_N = (
                (x / unit).clamp_max(FP16_MOST) for x in (ia_B, ib_N)
            )
        self.q_BD, self.k_ND, self.ia_B, self.ib_N = q_BD, k_ND, ia_B, ib_N
        self.to_base2 = LOG2E / problem.temperature
        self.ia2_B = ia_B * self.to_base2
        self.scale = unit**2 * weight / self.num_rows / problem.temperature
        self.z_B = _positive_logits(q_BD, k_ND, problem.positive_B, self.ia2_B, ib_N)
        self.limit_B = None
        if problem.margin is not None:
            self.limit_B = self.z_B + problem.margin * self.to_base2
        self.ids_B = None if problem.k_ids_N is None else problem.k_ids_N[problem.positive_B]
        self.masks = {
            "HAS_IDS": problem.k_ids_N is not None,
            "HAS_OWNERS": problem.owner_N is not None,
            "HAS_MARGIN": problem.margin is not None,
        }
        self.stride = triton.cdiv(self.num_columns, 16) * 16
        self.num_tiles = triton.cdiv(self.num_columns, BLOCK_N)
        most = max(GRADIENT_BYTES, 2 * self.num_columns * width)
        self.chunk_size = self._rows_in(most, q_BD.element_size(), fewest=1)
        self.score_rows = min(self.chunk_size, self._rows_in(SCORE_BYTES, 4, fewest=FEWEST_ROWS))
        self.s_CN = ia_B.new_empty(self.score_rows, self.stride)
        self.partials = [ia_B.new_empty(self.score_rows, self.num_tiles) for _ in range(2)]
        self.masked_CT = None
        if any(self.masks.values()):
            self.masked_CT = torch.empty_like(self.partials[0], dtype=torch.int32)
        self.loss_B, self.lse2_B, self.positive_g_B = (torch.empty_like(ia_B) for _ in range(3))
        self.num_masked_B = torch.empty_like(problem.positive_B)

    def evaluate(self, gradients: _Gradients | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, logsumexp, positive's cosine and number of masked columns, each [B]."""
        loss_B, column_lse2_N = self.loss_B, None
        if self.problem.symmetric:
            loss_B, column_lse2_N = self._columns()
        if gradients is not None:
            self._gradients(gradients, column_lse2_N)
        elif column_lse2_N is None:
            for rows in self._parts(slice(0, self.num_rows)):
                self._statistics(self._scores(rows), rows)
        return loss_B, self.lse2_B * LN2, self.z_B / self.to_base2, self.num_masked_B

    def _columns(self) -> tuple[Tensor, Tensor]:
        """The mean loss of both directions, and what to take from a logit for the columns'."""
        negatives_lse_N = torch.full_like(self.ib_N, -torch.inf)
        by_column = [
            self.ib_N.new_empty(triton.cdiv(self.score_rows, BLOCK_C), self.num_columns)
            for _ in range(2)
        ]
        for rows in self._parts(slice(0, self.num_rows)):
            self._statistics(self._scores(rows), rows, by_column)
            top_RN, sum_RN = (x[: triton.cdiv(rows.stop - rows.start, BLOCK_C)] for x in by_column)
            part_N = torch.logsumexp(top_RN * LN2 + sum_RN.log(), 0)
            negatives_lse_N = torch.logaddexp(negatives_lse_N, part_N)
        loss_PB, v_PN = column_targets(
            negatives_lse_N[None], self.z_B[None] * LN2, self.problem.positive_B
        )
        self.positive_g_B = (self.positive_g_B + torch.expm1(-loss_PB[0])) / 2
        return (self.loss_B + loss_PB[0]) / 2, v_PN[0] * LOG2E

    def _gradients(self, gradients: _Gradients, column_lse2_N: Tensor | None) -> None:
        """Fill or add to both gradients; the rows' statistics too, where no column's are known."""
        alone = not gradients.dtemperatures
        h_CN = self.q_BD.new_empty(self.chunk_size, self.stride)
        dq_CD = self.ia_B.new_empty(self.chunk_size, self.width)
        dk_ND = gradients.dk_ND if alone else None
        if dk_ND is None:
            dk_ND = self.ib_N.new_empty(self.k_ND.shape)
        along_B = torch.empty_like(self.ia_B)
        for first in range(0, self.num_rows, self.chunk_size):
            chunk = slice(first, min(first + self.chunk_size, self.num_rows))
            for rows in self._parts(chunk):
                s_CN = self._scores(rows)
                if column_lse2_N is None:
                    self._statistics(s_CN, rows)
                self._gradient(s_CN, h_CN[rows.start - first :], rows, column_lse2_N)
            num_rows, q_CD = chunk.stop - first, self.q_BD[chunk]
            used_CN = h_CN[:num_rows, : self.num_columns]
            _product(dq_CD[:num_rows], used_CN, self.k_ND)
            _product(dk_ND, used_CN.T, q_CD, add=first > 0)
            self._tangent(
                dq_CD[:num_rows], q_CD, self.ia_B[chunk], self.powers[0], chunk,
                gradients.dq_BD[chunk], along_B[chunk], add=not alone,
            )  # fmt: skip
        del h_CN, used_CN
        if gradients.dk_ND is None:
            gradients.dk_ND = torch.empty_like(dk_ND, dtype=self.gradient_dtype)
        everything = slice(0, self.num_columns)
        self._tangent(
            dk_ND, self.k_ND, self.ib_N, self.powers[1], everything,
            gradients.dk_ND, torch.empty_like(self.ib_N), add=not alone,
        )  # fmt: skip
        gradients.dtemperatures.append(along_B.sum() * self.scale)

    # -- one launch each ----------------------------------------------------------------------

    def _rows_in(self, num_bytes: int, element_size: int, fewest: int) -> int:
        rows = num_bytes // (element_size * self.stride)
        return min(self.num_rows, max(fewest, rows - rows % 128 if rows > 128 else rows))

    def _parts(self, chunk: slice) -> Iterator[slice]:
        for first in range(chunk.start, chunk.stop, self.score_rows):
            yield slice(first, min(first + self.score_rows, chunk.stop))

    def _scores(self, rows: slice) -> Tensor:
        s_CN = self.s_CN[: rows.stop - rows.start]
        _product(s_CN[:, : self.num_columns], self.q_BD[rows], self.k_ND.T)
        return s_CN

    def _statistics(self, s_CN: Tensor, rows: slice, by_column: list[Tensor] | None = None) -> None:
        problem, num_rows = self.problem, len(s_CN)
        grid = (triton.cdiv(num_rows, BLOCK_C) * self.num_tiles,)
        statistics_kernel[grid](
            s_CN, self.ia2_B[rows], self.ib_N, problem.positive_B[rows],
            None if self.ids_B is None else self.ids_B[rows], problem.k_ids_N, problem.owner_N,
            None if self.limit_B is None else self.limit_B[rows],
            *self.partials, self.masked_CT, *(by_column or (None, None)),
            num_rows, self.num_columns, rows.start, self.stride, **self.masks,
            HAS_COLUMNS=by_column is not None, BLOCK_C=BLOCK_C, BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )  # fmt: skip
        losses_kernel[(num_rows,)](
            *self.partials, self.masked_CT, self.z_B[rows], self.loss_B[rows], self.lse2_B[rows],
            self.positive_g_B[rows], self.num_masked_B[rows], self.num_tiles,
            HAS_MASKED=self.masked_CT is not None, num_warps=4,
            BLOCK_T=min(BLOCK_T, triton.next_power_of_2(self.num_tiles)),
        )  # fmt: skip

    def _gradient(
        self, s_CN: Tensor, h_CN: Tensor, rows: slice, column_lse2_N: Tensor | None
    ) -> None:
        problem, num_rows = self.problem, len(s_CN)
        grid = (triton.cdiv(num_rows, BLOCK_C) * self.num_tiles,)
        gradient_kernel[grid](
            s_CN, h_CN, self.ia2_B[rows], self.ib_N, problem.positive_B[rows],
            None if self.ids_B is None else self.ids_B[rows], problem.k_ids_N, problem.owner_N,
            None if self.limit_B is None else self.limit_B[rows],
            self.lse2_B[rows], column_lse2_N, self.positive_g_B[rows],
            self.row_factor_B[rows], self.column_factor_N,
            num_rows, self.num_columns, rows.start, self.stride, **self.masks,
            HAS_COLUMNS=column_lse2_N is not None, BLOCK_C=BLOCK_C, BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )  # fmt: skip

    def _tangent(
        self,
        raw_RD: Tensor,
        x_RD: Tensor,
        inverse_R: Tensor,
        powers: Tensor | None,
        rows: slice,
        out_RD: Tensor,
        along_R: Tensor,
        *,
        add: bool,
    ) -> None:
        tangent_kernel[(triton.cdiv(len(raw_RD), BLOCK_R),)](
            raw_RD, x_RD, inverse_R, None if powers is None else powers[rows], self.scale,
            out_RD, along_R, len(raw_RD), self.width,
            raw_RD.stride(0), x_RD.stride(0), out_RD.stride(0),
            HAS_FACTOR=powers is not None, ADD=add,
            EPS=EPS, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=4,
        )  # fmt: skip


def _inverse_norms(x_RD: Tensor) -> Tensor:
    inverse_R = x_RD.new_empty(len(x_RD), dtype=torch.float32)
    inverse_norms_kernel[(triton.cdiv(len(x_RD), BLOCK_R),)](
        x_RD, inverse_R, *x_RD.shape, x_RD.stride(0),
        EPS=EPS, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return inverse_R


def _positive_logits(
    q_BD: Tensor, k_ND: Tensor, positive_B: Tensor, ia2_B: Tensor, ib_N: Tensor
) -> Tensor:
    z_B = torch.empty_like(ia2_B)
    positives_kernel[(triton.cdiv(len(q_BD), BLOCK_R),)](
        q_BD, k_ND, positive_B, ia2_B, ib_N, z_B, *q_BD.shape,
        q_BD.stride(0), k_ND.stride(0), BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return z_B


def _near_one(x_RD: Tensor, inverse_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows times a power of two that brings the norm between 1/2 and 1; their inverse norms; the
    powers, [R]."""
    power_R = torch.ldexp(torch.ones_like(inverse_R), -torch.frexp(1 / inverse_R).exponent)
    return (x_RD.float() * power_R[:, None]).half(), inverse_R / power_R, power_R


def _product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in float32: never rounded to the factors' type in between."""
    if a.device.type == "cpu":  # the interpreter's
        a, b = a.float(), b.float()
    wide: Any = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    if add:
        torch.addmm(out, a, b, **wide, out=out)
    else:
        torch.mm(a, b, **wide, out=out)
