"""Row chunks of `linear_loss`: the matrix products of all back ends, and the rows in plain torch.

A chunk of C rows goes through

    z = hidden_C weight^T          y = teacher_hidden_C teacher_weight^T, where there is a teacher
    rows                           losses; z becomes the gradient g [C, V]
    dhidden_C = g weight           dweight += g^T hidden_C

2 T V D FLOP for each of the student's three products and 2 T V E for the teacher's. z and y are
written once to one buffer each of `work_elements` of the accumulation dtype (at least one row),
whatever T and V; the step on the rows works in place, here on blocks of `BLOCK_ELEMENTS` that a
CPU's cache holds from the first operator to the last, with `SPARES` blocks beside them for a
teacher. Beside that stand dweight in the accumulation dtype, V*D, dhidden, T*D, and in bf16 a
chunk's dhidden in float32.

z, exponents and sums are float32 (float64 for float64 inputs). On a GPU 16-bit factors are
multiplied as they are, with float32 results, and g is rounded to 16 bits for the two products
after it; fp16's g is scaled by a power of two, since most of a softmax is below its range. A CPU
has no such product: there 16-bit weights are copied to float32 once a call, V*D (and V*E)
elements, and nothing is rounded.

Moved a logit in float32, while blocks stay in the cache: z 4 bytes written, 8 read and written by
the rows, 8 read by the products; a teacher's y 4 written, 4 read. Nothing is saved here: see
`linear_loss.py`.

The divergence is summed term by term, with d = log s - log q of student s and teacher q, as

    q (expm1(d) - d)        or, where d > 1, (s - q) - q d

The sum over all columns of s - q is 0, so this is the divergence, but no term is negative, and an
error that all d share cancels to first order: a student close to its teacher keeps the digits
that the plain sum of -q d loses.

T tokens, C rows of a chunk or of a block of it, V vocabulary, D student width, E teacher width.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

WORK_ELEMENTS = 2**24  # of a chunk's logits: 64 MiB in float32
GPU_WORK_ELEMENTS = 2**27  # a chunk reads and writes dweight whole: few rows would wait for that
BLOCK_ELEMENTS = 2**19  # of a block's logits: 2 MiB in float32
GPU_BLOCK_ELEMENTS = 2**24  # a launch costs more than a cache saves
SPARES = 4  # blocks beside a teacher's
HALVES = (torch.float16, torch.bfloat16)


class Problem(NamedTuple):
    """Checked arguments of one evaluation, and the gradients that are wanted."""

    hidden_TD: Tensor
    weight_VD: Tensor
    target_T: Tensor
    teacher_hidden_TE: Tensor | None
    teacher_weight_VE: Tensor | None
    temperature: float
    ce_weight: float
    kl_weight: float
    wants_hidden: bool
    wants_weight: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of accumulation and softmax."""
        return torch.float64 if self.hidden_TD.dtype == torch.float64 else torch.float32

    @property
    def wants_gradient(self) -> bool:
        return self.wants_hidden or self.wants_weight


class Evaluation(NamedTuple):
    """Losses a token and the gradients of their weighted sum, all in the accumulation dtype but
    dhidden, which is in that of its input (float32 for fp16)."""

    ce_T: Tensor
    kl_T: Tensor | None
    dhidden_TD: Tensor | None
    dweight_VD: Tensor | None


class RowStep(NamedTuple):
    """What is done to the rows of every chunk.

    The gradient is ce_scale (softmax(z) - onehot) + kl_scale (s - q), in `dtype`.
    """

    temperature: float
    ce_scale: float
    kl_scale: float
    dtype: torch.dtype
    with_gradient: bool


class Rows(Protocol):
    """Losses of a chunk and, where asked for, its gradient, which takes the place of z."""

    def __call__(
        self, z_CV: Tensor, y_CV: Tensor | None, target_C: Tensor, step: RowStep
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...


def evaluate(problem: Problem) -> Evaluation:
    """Losses of all rows, and the gradients that are wanted."""
    on_gpu = problem.hidden_TD.is_cuda
    return evaluate_chunks(
        problem,
        rows,
        work_elements=GPU_WORK_ELEMENTS if on_gpu else WORK_ELEMENTS,
        halves=on_gpu,
    )


def evaluate_chunks(
    problem: Problem, rows: Rows, *, work_elements: int, halves: bool, multiple: int = 1
) -> Evaluation:
    """Run `rows` on chunk after chunk.

    Args:
        halves: multiply 16-bit factors as they are; else they are copied to float32.
        multiple: of elements from one row of a buffer to the next.
    """
    dtype, target_T = problem.dtype, problem.target_T
    hidden_TD, weight_VD = problem.hidden_TD, _factor(problem.weight_VD, dtype, halves)
    factor_dtype = weight_VD.dtype  # of what is multiplied
    num_tokens, num_columns = len(hidden_TD), len(weight_VD)
    unit = _unit(problem, factor_dtype)
    step = RowStep(
        problem.temperature,
        problem.ce_weight * unit,
        problem.kl_weight * problem.temperature * unit,
        factor_dtype,
        problem.wants_gradient,
    )
    row_elements = -(-num_columns // multiple) * multiple
    chunk = max(1, work_elements // row_elements)
    if chunk > 64:
        chunk -= chunk % 64  # matrix products run slower on ragged edges
    chunk = max(1, min(num_tokens, chunk))
    teacher_weight_VE = problem.teacher_weight_VE
    if teacher_weight_VE is not None:
        teacher_weight_VE = _factor(teacher_weight_VE, dtype, halves)
    shape = (1 if teacher_weight_VE is None else 2, chunk, row_elements)
    work = torch.empty(shape, dtype=dtype, device=hidden_TD.device)[..., :num_columns]

    ce_T = torch.empty(num_tokens, dtype=dtype, device=hidden_TD.device)
    kl_T = None if teacher_weight_VE is None else torch.empty_like(ce_T)
    dhidden_TD = dweight_VD = product_CD = None
    if problem.wants_hidden:
        saved = torch.float32 if hidden_TD.dtype == torch.float16 else hidden_TD.dtype
        dhidden_TD = torch.empty(hidden_TD.shape, dtype=saved, device=hidden_TD.device)
        if saved != dtype:
            product_CD = ce_T.new_empty(chunk, hidden_TD.shape[1])
    if problem.wants_weight:
        dweight_VD = ce_T.new_zeros(weight_VD.shape)
    for first in range(0, num_tokens, chunk):
        at = slice(first, min(first + chunk, num_tokens))
        hidden_CD, z_CV, y_CV = hidden_TD[at].to(factor_dtype), work[0, : at.stop - first], None
        _multiply(z_CV, hidden_CD, weight_VD.T)
        if teacher_weight_VE is not None and problem.teacher_hidden_TE is not None:
            teacher_CE = problem.teacher_hidden_TE[at].to(teacher_weight_VE.dtype)
            y_CV = work[1, : len(z_CV)]
            _multiply(y_CV, teacher_CE, teacher_weight_VE.T)
        ce_T[at], kl_C, g_CV = rows(z_CV, y_CV, target_T[at], step)
        if kl_T is not None and kl_C is not None:
            kl_T[at] = kl_C
        if g_CV is None:
            continue
        if dhidden_TD is not None:
            wide_CD = dhidden_TD[at] if product_CD is None else product_CD[: len(z_CV)]
            _multiply(wide_CD, g_CV, weight_VD)
            if unit != 1:
                wide_CD *= 1 / unit
            if product_CD is not None:
                dhidden_TD[at] = wide_CD
        if dweight_VD is not None:
            _multiply(dweight_VD, g_CV.T, hidden_CD, add=True)
    if dweight_VD is not None and unit != 1:
        dweight_VD *= 1 / unit
    return Evaluation(ce_T, kl_T, dhidden_TD, dweight_VD)


def rows(
    z_CV: Tensor, y_CV: Tensor | None, target_C: Tensor, step: RowStep
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows of a chunk in blocks, as `Rows` says; a teacher's logits are overwritten too."""
    num_columns = z_CV.shape[1]
    block = (GPU_BLOCK_ELEMENTS if z_CV.is_cuda else BLOCK_ELEMENTS) // num_columns
    block = min(len(z_CV), max(1, block))
    ce, kl = [], []
    spare = z_CV.new_empty(SPARES, 0 if y_CV is None else block, num_columns)
    for first in range(0, len(z_CV), block):
        at = slice(first, min(first + block, len(z_CV)))
        y = None if y_CV is None else y_CV[at]
        ce_C1, kl_C1 = _block(z_CV[at], y, target_C[at, None], step, spare[:, : at.stop - first])
        ce.append(ce_C1[:, 0])
        if kl_C1 is not None:
            kl.append(kl_C1[:, 0])
    g_CV = z_CV.to(step.dtype) if step.with_gradient else None
    return torch.cat(ce), torch.cat(kl) if kl else None, g_CV


def _block(
    z_CV: Tensor, y_CV: Tensor | None, target_C1: Tensor, step: RowStep, spare_SCV: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Losses of a few rows; z becomes the gradient, y the teacher's softmax."""
    top_z_C1, target_z_C1 = z_CV.amax(1, keepdim=True), z_CV.gather(1, target_C1)
    d_CV, s_CV, g_CV, term_CV = spare_SCV.unbind()
    kl_C1 = None
    tempered, inverse = step.temperature != 1, 1 / step.temperature
    if y_CV is not None:
        torch.sub(z_CV, y_CV, out=d_CV)
        shift_C1 = top_z_C1 - y_CV.amax(1, keepdim=True)
        if tempered:
            torch.softmax(torch.mul(z_CV, inverse, out=s_CV), 1, out=s_CV)
            y_CV.mul_(inverse)
            d_CV.mul_(inverse)
            shift_C1.mul_(inverse)
        torch.softmax(y_CV, 1, out=y_CV)
    p_CV = torch.softmax(z_CV, 1, out=z_CV)
    top_p_C1 = p_CV.amax(1, keepdim=True)
    if y_CV is not None:
        if not tempered:
            s_CV = p_CV
        # both logsumexps from the largest entries: lse = top - log softmax(top)
        shift_C1 -= s_CV.amax(1, keepdim=True).log() - y_CV.amax(1, keepdim=True).log()
        d_CV.sub_(shift_C1)
        torch.sub(s_CV, y_CV, out=g_CV)
        # where d > 1, as numbers: on a CPU bools and torch.where take twice the time of all this
        far_CV = torch.gt(d_CV, 1, out=spare_SCV[1])
        torch.clamp_max(d_CV, 1, out=term_CV).expm1_().mul_(y_CV)
        torch.lerp(term_CV, g_CV, far_CV, out=term_CV)
        term_CV.addcmul_(y_CV, d_CV, value=-1).clamp_min_(0)
        kl_C1 = term_CV.sum(1, keepdim=True).mul_(step.temperature**2)
    others_C1 = p_CV.scatter_(1, target_C1, 0.0).sum(1, keepdim=True)
    # a solved row by what the others have, which 1 - p would round away; else by the logsumexp
    ce_C1 = torch.where(
        others_C1 < 0.5, -torch.log1p(-others_C1), top_z_C1 - target_z_C1 - top_p_C1.log()
    )
    if step.with_gradient:
        p_CV.scatter_(1, target_C1, -others_C1)
        if step.ce_scale != 1:
            p_CV.mul_(step.ce_scale)
        if y_CV is not None and step.kl_scale:
            p_CV.add_(g_CV, alpha=step.kl_scale)
    return ce_C1, kl_C1


def _factor(x: Tensor, dtype: torch.dtype, halves: bool) -> Tensor:
    """As it enters a product whose result is of `dtype`."""
    return x if halves and dtype == torch.float32 and x.dtype in HALVES else x.to(dtype)


def _unit(problem: Problem, factor_dtype: torch.dtype) -> float:
    """Power of two that fp16's gradient is stored in: its largest entry then is at most 2^14."""
    most = problem.ce_weight + problem.kl_weight * problem.temperature
    if factor_dtype != torch.float16 or most == 0:
        return 1.0
    return 2.0 ** (14 - math.frexp(most)[1])


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, never rounded to the factors' type in between."""
    if a.dtype != out.dtype and not a.is_cuda:  # the interpreter's
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    else:
        torch.addmm(out, a, b, beta=int(add), out_dtype=out.dtype, out=out)
