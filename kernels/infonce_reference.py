"""InfoNCE as plain autograd over the whole matrix: the oracle that `infonce` is held against.

Runs in the dtype of its inputs, float64 included. Memory is O(P * B * N). Every rule is one line
over the whole matrix, so that it can be checked by reading.

B queries, N documents (columns), D width, P Matryoshka prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def infonce_reference(
    q_BD: Tensor,
    k_ND: Tensor,
    positive_B: Tensor,
    *,
    temperature: float | Tensor,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    k_ids_N: Tensor | None = None,
    margin: float | None = None,
    own_negatives: bool | Tensor = False,
    symmetric: bool = False,
) -> InfoNCEOutput:
    """Loss and statistics, differentiable by autograd. Arguments as in `infonce`."""
    prefixes = list(prefixes or [q_BD.shape[1]])
    weights = q_BD.new_tensor(prefix_weights or [1.0] * len(prefixes))
    rows_B, columns_N = (torch.arange(len(x), device=x.device) for x in (q_BD, k_ND))
    positive_BN = columns_N[None] == positive_B[:, None]
    fixed_BN = torch.zeros_like(positive_BN)
    if k_ids_N is not None:
        fixed_BN |= k_ids_N[None] == k_ids_N[positive_B][:, None]
    if own_negatives is not False:
        owner_N = _owners(positive_B, columns_N) if own_negatives is True else own_negatives
        fixed_BN |= (owner_N != -1)[None] & (owner_N[None] != rows_B[:, None])
    statistics = []
    for dim in prefixes:
        cosine_BN = F.normalize(q_BD[:, :dim], dim=1) @ F.normalize(k_ND[:, :dim], dim=1).T
        score_B = cosine_BN[rows_B, positive_B]
        masked_BN = fixed_BN
        if margin is not None:
            masked_BN = masked_BN | (cosine_BN > score_B[:, None] + margin)
        masked_BN = masked_BN & ~positive_BN
        logits_BN = (cosine_BN / temperature).masked_fill(masked_BN, float("-inf"))
        loss_B = F.cross_entropy(logits_BN, positive_B, reduction="none")
        if symmetric:
            # row i's column: the rows that it is a negative for, and row i itself
            column_BB = logits_BN.T[positive_B].masked_fill(
                positive_BN.T[positive_B]
                & ~torch.eye(len(q_BD), dtype=torch.bool).to(rows_B.device),
                float("-inf"),
            )
            loss_B = (loss_B + F.cross_entropy(column_BB, rows_B, reduction="none")) / 2
        statistics.append((loss_B.mean(), logits_BN.logsumexp(1), score_B, masked_BN.sum(1)))
    loss_P, lse_PB, score_PB, masked_PB = (torch.stack(s) for s in zip(*statistics, strict=True))
    return InfoNCEOutput(
        loss_P @ weights, loss_P.detach(), lse_PB.detach(), score_PB.detach(), masked_PB[-1]
    )


def _owners(positive_B: Tensor, columns_N: Tensor) -> Tensor:
    """Every column that is no row's positive belongs to the row of the nearest one before it."""
    before_NB = positive_B[None] < columns_N[:, None]
    # of rows with one positive the last; -2 is no row
    last_B = positive_B * len(positive_B) + torch.arange(len(positive_B)).to(positive_B)
    nearest_N = last_B[None].masked_fill(~before_NB, -1).max(1)
    owner_N = torch.where(before_NB.any(1), nearest_N.indices, -2)
    return torch.where((columns_N[:, None] == positive_B[None]).any(1), -1, owner_N)
