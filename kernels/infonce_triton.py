"""InfoNCE on a GPU: two Triton kernels around cuBLAS (or rocBLAS) products.

Per chunk of rows, with the whole row of N columns in reach:

    1. `scores_kernel`    S = q k^T tile by tile on the tensor cores. At each prefix boundary the
       accumulator is scaled to base-2 logits z, masked by comparisons in the tile, and stored as
       E = 2^(z - m) in the inputs' dtype, m the tile's row maximum; with it m and sum(E).
    2. the rows' logsumexp from m and sum(E), a few numbers a tile.
    3. `finish_kernel`    E becomes, in place, H_j = sum_{p >= j} w_p G_p ia_p ib_p.
    4. dq = H_j k_segment, dk += H_j^T q_segment, float32 accumulation and output.

Three GEMMs and 10 bytes of traffic a logit and prefix in bf16 (write, read, write, read, read);
work memory `WORK_BYTES`. Rounding to bf16 happens to E, which is relative to its tile, and to H;
exponents, sums, norms, the positive's logit and everything about the loss are float32.

fp16 has no range for H, products of inverse norms: its vectors are scaled by powers of two first,
which is exact, and its gradients come out in float32.

The positive is left out of E and of the sums: with L the logsumexp of the negatives,
loss = log(1 + exp(L - z_pos)), and its gradient is expm1(-loss). Both keep their digits where a row
is solved, and a row without negatives has exactly 0.

`symmetric` needs the columns' logsumexp before the first gradient: a pass for the statistics alone
and a second product whose epilogue writes the gradient itself; four GEMMs.

Deterministic: no atomics, partial sums are written out and summed by torch.

B queries, C rows of a chunk, N documents, D width, P prefixes, T column tiles, R row tiles.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from drama.kernels.infonce_kernels import (
    EXP,
    FINISH_ROWS,
    GRADIENT,
    STATISTICS,
    WIDEST,
    Config,
    candidates,
    finish_kernel,
    scores_kernel,
)
from drama.kernels.infonce_problem import (
    Evaluation,
    Problem,
    column_targets,
    inverse_norms,
    is_normed,
    remove_pull,
)

WORK_BYTES = 2**29  # of E, all prefixes
FP16_UNIT = 1 / 32  # a norm near 1 counts as 32: H up to 2^12, and small entries keep their digits
FP16_MOST = 255.0  # of a factor, so that two of them stay finite: a prefix of next to no length
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
_fastest: dict[tuple[Any, ...], Config] = {}


def evaluate(problem: Problem, *, with_gradient: bool) -> Evaluation:
    """Loss and statistics of all rows, and the gradients where asked for."""
    return _Evaluator(problem).evaluate(with_gradient)


class _Evaluator:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.q_BD, self.k_ND = (
            x if x.stride(1) == 1 else x.contiguous() for x in (problem.q_BD, problem.k_ND)
        )
        widths, device = problem.widths, self.q_BD.device
        self.num_rows, self.num_columns = len(self.q_BD), len(self.k_ND)
        self.widths = torch.tensor((0, *widths), dtype=torch.int32).to(device, non_blocking=True)
        self.weights_P1 = torch.tensor(problem.weights).to(device, non_blocking=True)[:, None]
        self.ia_PB, self.ib_PN = inverse_norms(self.q_BD, widths), inverse_norms(self.k_ND, widths)
        self.normed_PB, self.normed_PN = is_normed(self.ia_PB), is_normed(self.ib_PN)
        self.q_scale_B1 = self.k_scale_N1 = None
        self.gradient_dtype = self.q_BD.dtype
        # H is stored as if the vectors' mean norm were 1 and the largest weight too
        unit_q, unit_k = (1 / (1 / x[-1]).mean() for x in (self.ia_PB, self.ib_PN))
        most = math.inf
        if self.q_BD.dtype == torch.float16:
            self.q_BD, self.ia_PB, self.q_scale_B1 = _near_one(self.q_BD, self.ia_PB)
            self.k_ND, self.ib_PN, self.k_scale_N1 = _near_one(self.k_ND, self.ib_PN)
            self.gradient_dtype = torch.float32
            unit_q = unit_k = torch.full_like(unit_q, FP16_UNIT)
            most = FP16_MOST
        largest = max(map(abs, problem.weights)) or 1.0
        self.to_base2 = LOG2E / problem.temperature
        self.row_factor_PB = (self.ia_PB / unit_q).clamp_max(most) * (self.weights_P1 / largest)
        self.column_factor_PN = (self.ib_PN / unit_k).clamp_max(most)
        # what turns sums over real gradients into sums over stored ones, and back
        self.unit = 1 / (unit_q * unit_k * largest)
        self.scale = 1 / (self.unit * problem.temperature * self.num_rows)
        self.ids_B = None if problem.k_ids_N is None else problem.k_ids_N[problem.positive_B]
        per_row = self.q_BD.element_size() * self.num_columns * len(widths)
        chunk = max(1, WORK_BYTES // per_row)
        self.chunk_size = min(self.num_rows, chunk - chunk % 128 if chunk > 128 else chunk)

    def evaluate(self, with_gradient: bool) -> Evaluation:
        problem, num_prefixes = self.problem, len(self.problem.widths)
        shape = num_prefixes, self.num_rows
        self.z_PB, self.loss_PB = (self.ia_PB.new_empty(shape) for _ in range(2))
        self.num_masked_B = torch.empty_like(problem.positive_B)
        if with_gradient:
            self.dq_BD = self.q_BD.new_empty(
                self.num_rows, problem.widths[-1], dtype=self.gradient_dtype
            )
            self.dk_ND = self.ib_PN.new_zeros(self.num_columns, problem.widths[-1])
            self.total = self.ia_PB.new_zeros(())
            self.c_PN = self.ib_PN.new_zeros(num_prefixes - 1, self.num_columns)
        chunks = [
            slice(first, min(first + self.chunk_size, self.num_rows))
            for first in range(0, self.num_rows, self.chunk_size)
        ]
        if not problem.symmetric:
            for rows in chunks:
                self._one_direction(rows, with_gradient)
            loss_PB = self.loss_PB
        else:
            negatives_lse_PN = torch.full_like(self.ib_PN, -torch.inf)
            for rows in chunks:
                part_PN = self._statistics(rows)
                negatives_lse_PN = torch.logaddexp(negatives_lse_PN, part_PN)
            targets = column_targets(negatives_lse_PN, self.z_PB * LN2, problem.positive_B)
            for rows in chunks if with_gradient else ():
                self._both_directions(rows, *targets)
            loss_PB = (self.loss_PB + targets[0]) / 2
        done = Evaluation(
            loss_PB,
            self.z_PB * LN2 + self.loss_PB,
            self.z_PB / self.to_base2,
            self.num_masked_B,
        )
        return self._with_gradients(done) if with_gradient else done

    # -- one chunk ----------------------------------------------------------------------------

    def _one_direction(self, rows: slice, with_gradient: bool) -> None:
        mode = EXP if with_gradient else STATISTICS
        config, out = self._scores(rows, mode)
        lse2_PC = self._row_statistics(rows, out)
        if not with_gradient:
            return
        last, num_tiles = (
            len(self.problem.widths) - 1,
            triton.cdiv(self.num_columns, config.columns),
        )
        positive_g_PC = torch.expm1(-self.loss_PB[:, rows])
        gz_PC = (positive_g_PC * self.z_PB[:, rows])[:last]
        if last:
            scale_PCT = torch.exp2(out["top"] - lse2_PC[..., None])[:last]
            gz_PC += (scale_PCT * out["pull"][:last]).sum(2)
        num_rows = rows.stop - rows.start
        grid = (num_tiles, triton.cdiv(num_rows, FINISH_ROWS))
        column_pull_PRN = self.ib_PN.new_empty(last, grid[1], self.num_columns)
        finish_kernel[grid](
            out["e"], out["top"], lse2_PC, self.problem.positive_B[rows], positive_g_PC,
            self.z_PB[:, rows].contiguous(), self.row_factor_PB[:, rows].contiguous(),
            self.column_factor_PN, column_pull_PRN, num_rows, self.num_columns,
            P=last + 1, BLOCK_C=FINISH_ROWS, BLOCK_N=config.columns, num_warps=8,
        )  # fmt: skip
        self._add_column_pull(column_pull_PRN)
        self._add_products(rows, out["e"], gz_PC)

    def _statistics(self, rows: slice) -> Tensor:
        """Row statistics of a chunk; returns the columns' logsumexp over its negatives."""
        _, out = self._scores(rows, STATISTICS)
        self._row_statistics(rows, out)
        lse2_PN = torch.logsumexp((out["column_top"] * LN2) + out["column_sum"].log(), 1)
        return lse2_PN

    def _both_directions(self, rows: slice, column_loss_PB: Tensor, v_PN: Tensor) -> None:
        loss_PC, num_prefixes = self.loss_PB[:, rows], len(self.problem.widths)
        positive_g_PC = (torch.expm1(-loss_PC) + torch.expm1(-column_loss_PB[:, rows])) / 2
        lse2_PC = self.z_PB[:, rows] + loss_PC * LOG2E
        _, out = self._scores(
            rows, GRADIENT, row_lse=lse2_PC, column_lse=v_PN * LOG2E, positive_g=positive_g_PC
        )
        gz_PC = (positive_g_PC * self.z_PB[:, rows])[:-1]
        if num_prefixes > 1:
            gz_PC += out["pull"][:-1].sum(2)
            self._add_column_pull(out["column_pull"][:-1])
            for p in reversed(range(num_prefixes - 1)):
                out["e"][p] += out["e"][p + 1]
        self._add_products(rows, out["e"], gz_PC)

    def _scores(self, rows: slice, mode: int, **known: Tensor) -> tuple[Config, dict[str, Tensor]]:
        """Run the scores kernel on a chunk with the fastest configuration that fits."""
        problem, q_CD = self.problem, self.q_BD[rows]
        positive_C = problem.positive_B[rows]
        ia2_PC = self.ia_PB[:, rows] * self.to_base2
        self.z_PB[:, rows] = z_PC = self._positive_logits(q_CD, positive_C, ia2_PC)
        limit_PC = z_PC + (problem.margin or 0.0) * self.to_base2
        num_rows, num_prefixes = len(q_CD), len(problem.widths)
        shape = (num_prefixes, num_rows, self.num_columns if mode != STATISTICS else 0)
        e_PCN = q_CD.new_empty(shape)
        factors = (self.row_factor_PB[:, rows].contiguous(), self.column_factor_PN)
        chunk_ids = None if self.ids_B is None else self.ids_B[rows]

        def run(config: Config) -> dict[str, Tensor]:
            tiles = (
                triton.cdiv(num_rows, config.rows),
                triton.cdiv(self.num_columns, config.columns),
            )
            by_row = [ia2_PC.new_empty(num_prefixes, num_rows, tiles[1]) for _ in range(3)]
            by_column = [
                ia2_PC.new_empty(num_prefixes, tiles[0], 0 if mode == EXP else self.num_columns)
                for _ in range(3)
            ]
            masked_CT = torch.zeros(num_rows, tiles[1], dtype=torch.int32, device=q_CD.device)
            scores_kernel[(tiles[0] * tiles[1],)](
                self.widths, q_CD, self.k_ND, e_PCN, ia2_PC, self.ib_PN, z_PC, limit_PC, positive_C,
                chunk_ids, problem.k_ids_N, problem.owner_N, *by_row, masked_CT, *by_column,
                known.get("row_lse"), known.get("column_lse"), known.get("positive_g"), *factors,
                num_prefixes, num_rows, self.num_columns, rows.start,
                q_CD.stride(0), self.k_ND.stride(0),
                EVEN=all(w % config.width == 0 for w in problem.widths), MODE=mode,
                HAS_IDS=problem.k_ids_N is not None, HAS_MARGIN=problem.margin is not None,
                HAS_OWNERS=problem.owner_N is not None, PRECISION=_precision(q_CD.dtype),
                num_warps=config.num_warps, num_stages=config.num_stages, **config.constants(),
            )  # fmt: skip
            names = "top", "sum", "pull", "column_top", "column_sum", "column_pull"
            return dict(zip(names, by_row + by_column, strict=True), e=e_PCN, masked=masked_CT)

        config = self._config(mode, run)
        return config, run(config)

    def _config(self, mode: int, run: Any) -> Config:
        """The fastest of the configurations that fit this GPU, measured once for a kind of call."""
        has_owners = self.problem.owner_N is not None
        options = candidates(
            _target(self.q_BD.device),
            self.q_BD.element_size(),
            len(self.problem.widths),
            plain=not has_owners and all(w % WIDEST == 0 for w in self.problem.widths),
        )
        width = triton.next_power_of_2(self.problem.widths[-1])
        key = (self.q_BD.device, self.q_BD.dtype, mode, width, has_owners, options)
        if key not in _fastest:
            times = (
                [triton.testing.do_bench(lambda c=c: run(c), warmup=5, rep=20) for c in options]
                if len(options) > 1
                else [0.0]
            )
            _fastest[key] = options[times.index(min(times))]
        return _fastest[key]

    def _positive_logits(self, q_CD: Tensor, positive_C: Tensor, ia2_PC: Tensor) -> Tensor:
        product_CD = q_CD.float() * self.k_ND[positive_C].float()
        widths = self.problem.widths
        parts = [product_CD[:, a:b].sum(1) for a, b in zip((0, *widths[:-1]), widths, strict=True)]
        return torch.stack(parts).cumsum(0) * ia2_PC * self.ib_PN[:, positive_C]

    def _row_statistics(self, rows: slice, out: dict[str, Tensor]) -> Tensor:
        """Keep the chunk's losses and counts; returns the rows' logsumexp in base 2, [P, C]."""
        negatives_PC = torch.logsumexp(out["top"] * LN2 + out["sum"].log(), 2)
        z_PC = self.z_PB[:, rows]
        above_PC = negatives_PC - z_PC * LN2
        self.loss_PB[:, rows] = loss_PC = torch.logaddexp(above_PC, torch.zeros_like(above_PC))
        self.num_masked_B[rows] = out["masked"].sum(1)
        return z_PC + loss_PC * LOG2E

    # -- gradients ----------------------------------------------------------------------------

    def _add_column_pull(self, gz_PRN: Tensor) -> None:
        self.c_PN += gz_PRN.sum(1) * self.weights_P1[:-1]

    def _add_products(self, rows: slice, h_PCN: Tensor, gz_PC: Tensor) -> None:
        """The chunk's gradient of q, whole, and its part of k's."""
        widths, q_CD = self.problem.widths, self.q_BD[rows]
        dq_CD = self.ia_PB.new_zeros(len(q_CD), widths[-1])
        for h_CN, a, b in zip(h_PCN, (0, *widths[:-1]), widths, strict=True):
            _add_product(dq_CD[:, a:b], h_CN, self.k_ND[:, a:b])
            _add_product(self.dk_ND[:, a:b], h_CN.T, q_CD[:, a:b])
        c_PC = gz_PC * self.weights_P1[:-1] * (self.unit / self.to_base2)
        squares_PC = self.ia_PB[:, rows] ** 2 * self.normed_PB[:, rows]
        self.total += remove_pull(dq_CD, q_CD, c_PC, squares_PC, widths).sum()
        dq_CD *= self.scale
        if self.q_scale_B1 is not None:
            dq_CD *= self.q_scale_B1[rows]
        self.dq_BD[rows] = dq_CD

    def _with_gradients(self, done: Evaluation) -> Evaluation:
        problem, c_PN = self.problem, self.c_PN * (self.unit / self.to_base2)
        squares_PN = self.ib_PN**2 * self.normed_PN
        remove_pull(self.dk_ND, self.k_ND, c_PN, squares_PN, problem.widths)
        if self.k_scale_N1 is not None:
            self.dk_ND *= self.k_scale_N1
        return done._replace(
            dq_BD=problem.at_full_width(self.dq_BD),
            dk_ND=problem.at_full_width(self.dk_ND.mul_(self.scale)),
            dtemperature=-self.total * self.scale / problem.temperature,
        )


def _near_one(x_RD: Tensor, inverse_PR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows times a power of two that brings the narrowest prefix's norm between 1/2 and 1, and the
    widest's to 2^12 at most; their inverse norms; the powers, [R, 1]."""
    narrow_R, wide_R = (torch.frexp(1 / x).exponent for x in (inverse_PR[0], inverse_PR[-1]))
    exponent_R = torch.maximum(narrow_R, wide_R - 12)
    scale_R1 = torch.ldexp(torch.ones_like(inverse_PR[0]), -exponent_R)[:, None]
    return (x_RD.float() * scale_R1).half(), inverse_PR / scale_R1.T, scale_R1


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in place, out float32: never rounded to the factors' type in between."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.device.type == "cpu":  # the interpreter's
        out.addmm_(a.float(), b.float())
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def _precision(dtype: torch.dtype) -> str:
    # three TF32 products are as exact as float32; AMD's matrix cores multiply float32 themselves
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def _target(device: torch.device) -> str:
    """The nearest of `aot.TARGETS`, or "other": a GPU whose limits were not checked."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "gfx942" if device.type == "cuda" else "other"
    return f"sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}"
