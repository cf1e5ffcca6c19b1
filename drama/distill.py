"""What a retriever can learn from besides its positives: a teacher's scores, a teacher's vectors,
and the wish that different texts lie apart.

Each term is a part of the global batch's value on every rank: the parts sum to the term, and a
part's gradient is that of the whole with respect to this rank's vectors.

B local queries, M columns of all ranks, R rows with scores, K scored documents of a row, X texts of
this rank, D student's width, E teacher's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from drama.targets import Targets


@dataclass(frozen=True)
class Term:
    """value: of the global batch, the same on every rank. part: to be differentiated."""

    value: float
    part: Tensor


@dataclass(frozen=True)
class ScoreDistillation:
    """KL(teacher || student) over a query's own scored documents, positive and hard negatives.

    The teacher's distribution is softmax(score / temperature); the student's is that of the
    contrastive loss. Mean over the queries with at least two scored documents.
    """

    weight: float
    temperature: float = 1.0

    def __call__(
        self, q_BD: Tensor, k_MD: Tensor, targets: Targets, temperature: float | Tensor
    ) -> Term:
        row_R, column_RK, score_RK = _scored(targets)
        count = _sum(torch.tensor(float(len(row_R)))).item()
        if not count:
            return Term(0.0, q_BD.sum() * 0.0)
        present_RK = column_RK >= 0
        documents_RKD = F.normalize(_wide(k_MD[column_RK.clamp_min(0)]), dim=2)
        queries_RD = F.normalize(_wide(q_BD[row_R]), dim=1)
        logits_RK = torch.einsum("rd,rkd->rk", queries_RD, documents_RKD) / temperature
        # a number far below every logit, not -inf: 0 * inf is no number
        student_RK = logits_RK.masked_fill(~present_RK, -1e9).log_softmax(1)
        teacher_RK = (
            (score_RK.to(logits_RK.dtype) / self.temperature)
            .masked_fill(~present_RK, -1e9)
            .log_softmax(1)
        )
        kl = (teacher_RK.exp() * (teacher_RK - student_RK) * present_RK).sum() / count
        return Term(self.weight * _sum(kl.detach().double()).item(), self.weight * kl)


def _scored(targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with two scored documents or more, their columns [R, K], -1 where fewer, and scores."""
    usable_M = (targets.query_M >= 0) & targets.score_M.isfinite()
    column = usable_M.nonzero()[:, 0]
    row, order = targets.query_M[column].sort(stable=True)
    column = column[order]
    row_R, counts_R = torch.unique_consecutive(row, return_counts=True)
    first_R = counts_R.cumsum(0) - counts_R
    row_R, counts_R, first_R = (x[counts_R >= 2] for x in (row_R, counts_R, first_R))
    width = int(counts_R.max()) if len(counts_R) else 0
    place_K = torch.arange(width, device=column.device)
    at_RK = (first_R[:, None] + place_K).clamp_max(max(0, len(column) - 1))
    column_RK = torch.where(place_K < counts_R[:, None], column[at_RK], -1)
    return row_R, column_RK, targets.score_M[column_RK.clamp_min(0)]


def spread_out(x_XD: Tensor, weight: float) -> Term:
    """Mean squared cosine of different texts (Zhang et al. 2017, arXiv 1708.06320).

    sum_ij (x_i . x_j)^2 is the squared norm of the Gram matrix X^T X: the whole batch of all ranks
    for the price of a D x D matrix.
    """
    unit_XD = F.normalize(_wide(x_XD), dim=1)
    own_DD = unit_XD.T @ unit_XD
    gram_DD = _sum(own_DD.detach())
    count = _sum(torch.tensor(float(len(x_XD)))).item()
    pairs = max(1.0, count * (count - 1))
    value = (gram_DD.double().square().sum().item() - count) / pairs
    return Term(weight * value, weight * 2 / pairs * (gram_DD * own_DD).sum())


def similarity_distillation(x_XD: Tensor, teacher_XE: Tensor, weight: float) -> Term:
    """Mean squared difference between the student's and the teacher's cosines of all pairs of
    texts. Widths may differ: no projection is learned.

    sum_ij (x_i . x_j - t_i . t_j)^2 = |X^T X|^2 - 2 |X^T T|^2 + |T^T T|^2.
    """
    unit_XD = F.normalize(_wide(x_XD), dim=1)
    teacher_XE = F.normalize(teacher_XE.to(unit_XD.dtype), dim=1)
    own_DD, own_DE = unit_XD.T @ unit_XD, unit_XD.T @ teacher_XE
    gram_DD, gram_DE, gram_EE = (
        _sum(v.detach()) for v in (own_DD, own_DE, teacher_XE.T @ teacher_XE)
    )
    pairs = max(1.0, _sum(torch.tensor(float(len(x_XD)))).item() ** 2)
    squares = [g.double().square().sum().item() for g in (gram_DD, gram_DE, gram_EE)]
    value = (squares[0] - 2 * squares[1] + squares[2]) / pairs
    part = (2 * (gram_DD * own_DD).sum() - 4 * (gram_DE * own_DE).sum()) / pairs
    return Term(weight * value, weight * part)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum(x: Tensor) -> Tensor:
    """Over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    on_gpu = dist.get_backend() == "nccl" and not x.is_cuda
    total = x.cuda() if on_gpu else x.clone()
    dist.all_reduce(total)
    return total
