"""InfoNCE as plain autograd over the whole matrix: the oracle that `infonce` is held against.

Runs in the dtype of its inputs, float64 included. Memory is O(P * B * N). Not for training.

B queries, N documents (columns), D width, P Matryoshka prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def infonce_reference(
    q_BD: Tensor,
    k_ND: Tensor,
    positive_B: Tensor,
    *,
    temperature: float,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    k_ids_N: Tensor | None = None,
    margin: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss, loss_P), differentiable by autograd. Arguments as in `infonce`."""
    prefixes = list(prefixes or [q_BD.shape[1]])
    weights = list(prefix_weights or [1.0] * len(prefixes))
    rows_B = torch.arange(len(q_BD), device=q_BD.device)
    losses = []
    for dim in prefixes:
        cosine_BN = F.normalize(q_BD[:, :dim], dim=1) @ F.normalize(k_ND[:, :dim], dim=1).T
        masked_BN = torch.zeros_like(cosine_BN, dtype=torch.bool)
        if k_ids_N is not None:
            masked_BN |= k_ids_N[None, :] == k_ids_N[positive_B][:, None]
        if margin is not None:
            masked_BN |= cosine_BN > cosine_BN[rows_B, positive_B][:, None] + margin
        masked_BN[rows_B, positive_B] = False
        logits_BN = (cosine_BN / temperature).masked_fill(masked_BN, float("-inf"))
        losses.append(F.cross_entropy(logits_BN, positive_B))
    loss_P = torch.stack(losses)
    return (loss_P * loss_P.new_tensor(weights)).sum(), loss_P
