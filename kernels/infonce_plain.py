"""InfoNCE over the whole matrix, one prefix after the other: fewest operators, O(B * N) memory.

For matrices so small that the time goes into calling operators, not into running them. The same
formulas as in the chunked back ends; each prefix has its own three matrix products. Queries and
documents lie one below the other, so that what happens to both is one operator.

B queries, N documents, R = B + N, D width, P prefixes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drama.kernels.infonce_problem import EPS, Evaluation, Problem


def evaluate(problem: Problem, *, with_gradient: bool) -> Evaluation:
    """Loss and statistics of all rows, and the gradients where asked for."""
    num_rows, positive_B1 = len(problem.q_BD), problem.positive_B[:, None]
    x_RD = torch.cat((problem.q_BD, problem.k_ND)).to(problem.dtype)
    fixed_BN = _left_out(problem)
    statistics, gradients = [], []
    num_masked_B = torch.zeros_like(problem.positive_B)
    for width, weight in zip(problem.widths, problem.weights, strict=True):
        prefix_RD = x_RD[:, :width]
        norm_R1 = torch.linalg.vector_norm(prefix_RD, dim=1, keepdim=True).clamp_min_(EPS)
        unit_RD = prefix_RD / norm_R1
        score_BN = torch.mm(unit_RD[:num_rows], unit_RD[num_rows:].T)
        score_B1 = score_BN.gather(1, positive_B1)
        masked_BN = fixed_BN
        if problem.margin is not None:
            above_BN = score_BN > score_B1 + problem.margin
            masked_BN = above_BN if fixed_BN is None else above_BN | fixed_BN
        z_BN = score_BN.div_(problem.temperature)
        if masked_BN is not None:
            masked_BN.scatter_(1, positive_B1, False)
            z_BN.masked_fill_(masked_BN, -torch.inf)
            num_masked_B = masked_BN.sum(1)
        log_p_BN = torch.log_softmax(z_BN, 1)
        log_p_B1 = log_p_BN.gather(1, positive_B1)
        lse_B1 = z_BN.gather(1, positive_B1) - log_p_B1
        loss_B1 = -log_p_B1
        g_BN = log_p_BN.exp_().scatter_(1, positive_B1, log_p_B1.expm1_())
        if problem.symmetric:
            loss_B1 = (loss_B1 + _add_columns(g_BN, z_BN, problem)[:, None]) / 2
        statistics.append((loss_B1, lse_B1, score_B1))
        if with_gradient:
            gradients.append(_gradient(g_BN.mul_(weight / num_rows), unit_RD, norm_R1, problem))
    loss_PB, lse_PB, score_PB = (
        (torch.cat(x, 1) if len(x) > 1 else x[0]).T for x in zip(*statistics, strict=True)
    )
    if not with_gradient:
        return Evaluation(loss_PB, lse_PB, score_PB, num_masked_B)
    d_RD, dtemperature = gradients[-1]
    for narrow_RD, part in gradients[:-1]:
        d_RD[:, : narrow_RD.shape[1]] += narrow_RD
        if dtemperature is not None and part is not None:
            dtemperature += part
    d_RD = problem.at_full_width(d_RD)
    dq_BD, dk_ND = d_RD[:num_rows], d_RD[num_rows:]
    return Evaluation(loss_PB, lse_PB, score_PB, num_masked_B, dq_BD, dk_ND, dtemperature)


def _left_out(problem: Problem) -> Tensor | None:
    """What the ids and the owners leave out, [B, N]; the positives included."""
    masked_BN = None
    if problem.k_ids_N is not None:
        masked_BN = problem.k_ids_N[None] == problem.k_ids_N[problem.positive_B][:, None]
    if problem.owner_N is not None:
        rows_B1 = torch.arange(len(problem.q_BD), device=problem.q_BD.device)[:, None]
        others_BN = (problem.owner_N != -1) & (problem.owner_N != rows_B1)
        masked_BN = others_BN if masked_BN is None else masked_BN | others_BN
    return masked_BN


def _add_columns(g_BN: Tensor, z_BN: Tensor, problem: Problem) -> Tensor:
    """Mean of g and of the column direction's gradient, in place; returns that direction's loss."""
    positive_B = problem.positive_B
    same_BB = positive_B[:, None] == positive_B
    z_columns_BB = z_BN.T[positive_B].masked_fill_(same_BB.fill_diagonal_(False), -torch.inf)
    log_p_BB = torch.log_softmax(z_columns_BB, 1)
    loss_B = -log_p_BB.diagonal().clone()
    gradient_BB = log_p_BB.exp_()
    gradient_BB.diagonal().sub_(1)
    g_BN.index_add_(1, positive_B, gradient_BB.T)
    g_BN.mul_(0.5)
    return loss_B


def _gradient(
    g_BN: Tensor, unit_RD: Tensor, norm_R1: Tensor, problem: Problem
) -> tuple[Tensor, Tensor | None]:
    """One prefix's gradient with respect to q and k, [R, D], and to a trained temperature."""
    num_rows, temperature = len(g_BN), problem.temperature
    d_RD = torch.empty_like(unit_RD)
    torch.mm(g_BN, unit_RD[num_rows:], out=d_RD[:num_rows])
    torch.mm(g_BN.T, unit_RD[:num_rows], out=d_RD[num_rows:])
    along_R1 = (d_RD * unit_RD).sum(1, keepdim=True)
    pull_R1 = along_R1 * (norm_R1 > EPS)  # a norm that was too short to be one stays EPS
    d_RD.addcmul_(unit_RD, pull_R1, value=-1).div_(norm_R1.mul_(temperature))
    if not problem.trains_temperature:
        return d_RD, None
    return d_RD, along_R1[:num_rows].sum().div_(-temperature.square())
