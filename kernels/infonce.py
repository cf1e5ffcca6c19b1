"""InfoNCE without the matrix: exact loss and gradients in row chunks, all prefixes at once.

For prefix p of width d_p, with row norms a = |q[:d_p]| and column norms b = |k[:d_p]|:

    z_ij = q_i[:d_p] . k_j[:d_p] / (a_i b_j temperature)
    loss = mean_i sum_p w_p (logsumexp_j z_ij - z_i,pos(i))
    G    = w_p / B (softmax(z) - onehot)                          masked columns have G = 0

The chunk's product is accumulated segment by segment, so prefix p is read when the first p segments
are in. With Gs_p = G_p / (a_p b_p temperature) and H_j = sum_{p >= j} Gs_p, segment j of the
gradient is

    dq = H_j  k_segment - q_segment sum_{p >= j} rowsum(G_p z_p) / a_p^2      (and the same for dk)

All prefixes therefore cost the three GEMMs of the widest one (2*B*N*D FLOP each). The gradient is
formed in the forward pass and only scaled in the backward pass. Work buffers are (P + 2) * chunk
* N elements of the accumulation dtype; nothing of size B * N is ever made. Accumulation and softmax
are float32 (float64 for float64 inputs): logits are never rounded to a narrower type before exp.

B queries, C rows of one chunk, N documents (columns), D width, P prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

WORK_ELEMENTS = 2**25  # of the work buffers together: 128 MiB in float32


class InfoNCEOutput(NamedTuple):
    """What `infonce` returns; only `loss` carries a gradient.

    loss: 0-dim. loss_P: unweighted mean cross-entropy per prefix. lse_PB: logsumexp per row.
    positive_score_PB: cosine of the positive. num_masked_B: columns left out at the widest prefix.
    """

    loss: Tensor
    loss_P: Tensor
    lse_PB: Tensor
    positive_score_PB: Tensor
    num_masked_B: Tensor


def infonce(
    q_BD: Tensor,
    k_ND: Tensor,
    positive_B: Tensor,
    *,
    temperature: float,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    k_ids_N: Tensor | None = None,
    margin: float | None = None,
) -> InfoNCEOutput:
    """Contrastive loss of B queries against N documents, cosine similarity.

    Args:
        q_BD, k_ND: unnormalised, any float dtype, same device.
        positive_B: int64, the column of each row's positive.
        temperature: logits are cosine / temperature.
        prefixes: Matryoshka widths, ascending, at most D; default (D,).
        prefix_weights: one factor per prefix; default 1.
        k_ids_N: int64 document ids; columns other than the positive that carry the positive's id
            are no negatives.
        margin: in cosine; columns scoring above positive + margin are no negatives.

    Raises:
        ValueError: shapes or prefixes that do not fit.
    """
    widths = _checked_prefixes(q_BD, k_ND, positive_B, prefixes)
    weights = tuple(prefix_weights or [1.0] * len(widths))
    if len(weights) != len(widths):
        raise ValueError(f"{len(weights)} prefix weights for {len(widths)} prefixes")
    return InfoNCEOutput(
        *_InfoNCE.apply(q_BD, k_ND, positive_B, temperature, widths, weights, k_ids_N, margin)
    )


def _checked_prefixes(
    q_BD: Tensor, k_ND: Tensor, positive_B: Tensor, prefixes: Sequence[int] | None
) -> tuple[int, ...]:
    if q_BD.ndim != 2 or k_ND.ndim != 2 or q_BD.shape[1] != k_ND.shape[1]:
        raise ValueError(f"q {tuple(q_BD.shape)} and k {tuple(k_ND.shape)} must be [B, D], [N, D]")
    if positive_B.shape != q_BD.shape[:1]:
        raise ValueError(f"positive has shape {tuple(positive_B.shape)}, expected [{len(q_BD)}]")
    widths = tuple(prefixes or [q_BD.shape[1]])
    if list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] > q_BD.shape[1]:
        raise ValueError(f"prefixes {widths} must ascend within 1..{q_BD.shape[1]}")
    return widths


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BD: Tensor,
        k_ND: Tensor,
        positive_B: Tensor,
        temperature: float,
        widths: tuple[int, ...],
        weights: tuple[float, ...],
        k_ids_N: Tensor | None,
        margin: float | None,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(q_BD.device.type, enabled=False):
            output, dq_BD, dk_ND = _chunked(
                q_BD,
                k_ND,
                positive_B,
                temperature,
                widths,
                weights,
                k_ids_N,
                margin,
                with_gradient=any(ctx.needs_input_grad[:2]),
            )
        if dq_BD is not None and dk_ND is not None:
            ctx.save_for_backward(dq_BD.to(q_BD.dtype), dk_ND.to(k_ND.dtype))
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dq_BD, dk_ND = ctx.saved_tensors
        return (dq_BD * grad_loss, dk_ND * grad_loss, *[None] * 6)


def _chunked(
    q_BD: Tensor,
    k_ND: Tensor,
    positive_B: Tensor,
    temperature: float,
    widths: tuple[int, ...],
    weights: tuple[float, ...],
    k_ids_N: Tensor | None,
    margin: float | None,
    *,
    with_gradient: bool,
) -> tuple[InfoNCEOutput, Tensor | None, Tensor | None]:
    dtype = torch.float64 if q_BD.dtype == torch.float64 else torch.float32
    q_BD, k_ND = q_BD.detach().to(dtype), k_ND.detach().to(dtype)
    num_rows, num_columns, num_prefixes = len(q_BD), len(k_ND), len(widths)
    starts = (0, *widths[:-1])
    tiny = torch.finfo(dtype).tiny
    # inverse norms; a zero vector has cosine 0 with everything
    ia_PB, ib_PN = (
        torch.stack([1 / x[:, :d].norm(dim=1).clamp_min(tiny**0.5) for d in widths])
        for x in (q_BD, k_ND)
    )

    lse_PB, score_PB, loss_PB = q_BD.new_empty(3, num_prefixes, num_rows)
    num_masked_B = torch.zeros(num_rows, dtype=torch.int64, device=q_BD.device)
    dq_BD = torch.zeros_like(q_BD) if with_gradient else None
    dk_ND = torch.zeros_like(k_ND) if with_gradient else None
    column_PN = q_BD.new_zeros(num_prefixes, num_columns)

    chunk = max(1, min(num_rows, WORK_ELEMENTS // ((num_prefixes + 2) * num_columns)))
    acc_buffer, exp_buffer = q_BD.new_empty(2, chunk, num_columns)
    grad_buffer = q_BD.new_empty(num_prefixes if with_gradient else 1, chunk, num_columns)
    for first in range(0, num_rows, chunk):
        rows = slice(first, min(first + chunk, num_rows))
        q_CD, positive_C = q_BD[rows], positive_B[rows]
        size = len(q_CD)
        index_C1 = positive_C[:, None]
        acc_CN, exp_CN = acc_buffer[:size].zero_(), exp_buffer[:size]
        same_CN = None if k_ids_N is None else k_ids_N[None, :] == k_ids_N[index_C1]
        row_PC = q_BD.new_zeros(num_prefixes, size)
        for p, (start, end) in enumerate(zip(starts, widths, strict=True)):
            acc_CN.addmm_(q_CD[:, start:end], k_ND[:, start:end].T)
            z_CN = grad_buffer[p if with_gradient else 0, :size]
            torch.mul(acc_CN, ib_PN[p] / temperature, out=z_CN)
            z_CN *= ia_PB[p, rows, None]
            positive_z_C1 = z_CN.gather(1, index_C1)
            masked_CN = same_CN
            if margin is not None:
                above_CN = z_CN > positive_z_C1 + margin / temperature
                masked_CN = above_CN if same_CN is None else above_CN | same_CN
            if masked_CN is not None:
                masked_CN.scatter_(1, index_C1, False)
                z_CN.masked_fill_(masked_CN, torch.finfo(dtype).min / 4)  # finite: 0 * z stays 0
                num_masked_B[rows] = masked_CN.sum(1)
            score_PB[p, rows] = positive_z_C1[:, 0] * temperature
            top_C1 = z_CN.amax(1, keepdim=True)
            torch.sub(z_CN, top_C1, out=exp_CN)
            sum_C1 = exp_CN.exp_().sum(1, keepdim=True)
            lse_PB[p, rows] = (top_C1 + sum_C1.log())[:, 0]
            # not lse - z: at low temperatures both are large and a solved row's loss is small
            loss_PB[p, rows] = (top_C1 - positive_z_C1 + sum_C1.log())[:, 0]
            if not with_gradient:
                continue
            exp_CN /= sum_C1
            exp_CN.scatter_add_(1, index_C1, exp_CN.new_full((1, 1), -1.0).expand(size, 1))
            exp_CN *= weights[p] / num_rows
            z_CN *= exp_CN
            row_PC[p] = z_CN.sum(1)
            column_PN[p] += z_CN.sum(0)
            torch.mul(exp_CN, ib_PN[p] / temperature, out=z_CN)
            z_CN *= ia_PB[p, rows, None]
        if dq_BD is None or dk_ND is None:
            continue
        for p in reversed(range(num_prefixes)):
            segment = slice(starts[p], widths[p])
            if p + 1 < num_prefixes:
                grad_buffer[p, :size] += grad_buffer[p + 1, :size]
            h_CN = grad_buffer[p, :size]
            pull_C1 = (row_PC[p:] * ia_PB[p:, rows] ** 2).sum(0)[:, None]
            dq_BD[rows, segment] = h_CN @ k_ND[:, segment] - pull_C1 * q_CD[:, segment]
            dk_ND[:, segment].addmm_(h_CN.T, q_CD[:, segment])
    if dk_ND is not None:
        for p in range(num_prefixes):
            segment = slice(starts[p], widths[p])
            pull_N1 = (column_PN[p:] * ib_PN[p:] ** 2).sum(0)[:, None]
            dk_ND[:, segment] -= pull_N1 * k_ND[:, segment]

    loss_P = loss_PB.mean(1)
    loss = (loss_P * loss_P.new_tensor(weights)).sum()
    return InfoNCEOutput(loss, loss_P, lse_PB, score_PB, num_masked_B), dq_BD, dk_ND
