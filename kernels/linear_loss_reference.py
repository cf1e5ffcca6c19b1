"""Cross-entropy and distillation as plain autograd over all logits: what `linear_loss` is held to.

    z = hidden weight^T        y = teacher_hidden teacher_weight^T
    ce_t = -log softmax(z_t)[target_t]
    kl_t = temperature^2 KL(softmax(y_t / temperature) || softmax(z_t / temperature))
    loss = sum_t ce_weight ce_t + kl_weight kl_t

Runs in the dtype of its inputs, float64 included: three products of the student and one of the
teacher, by autograd. Saves, and needs, several [T, V] matrices of that dtype.

T tokens, V vocabulary, D student width, E teacher width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LinearLossOutput(NamedTuple):
    """What `linear_loss` returns; only `loss` carries a gradient.

    loss: 0-dim, the weighted sum over the tokens. ce_T: cross-entropy. kl_T: divergence from the
    teacher, None without one.
    """

    loss: Tensor
    ce_T: Tensor
    kl_T: Tensor | None


def linear_loss_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    teacher_hidden_TE: Tensor | None = None,
    teacher_weight_VE: Tensor | None = None,
    temperature: float = 1.0,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
) -> LinearLossOutput:
    """Loss and its parts, differentiable by autograd. Arguments as in `linear_loss`."""
    z_TV = hidden_TD @ weight_VD.T
    ce_T = F.cross_entropy(z_TV, target_T, reduction="none")
    if teacher_hidden_TE is None or teacher_weight_VE is None:
        return LinearLossOutput((ce_weight * ce_T).sum(), ce_T.detach(), None)
    y_TV = teacher_hidden_TE.detach() @ teacher_weight_VE.detach().T
    log_s_TV, log_q_TV = (F.log_softmax(x / temperature, 1) for x in (z_TV, y_TV))
    kl_T = (log_q_TV.exp() * (log_q_TV - log_s_TV)).sum(1) * temperature**2
    loss = (ce_weight * ce_T + kl_weight * kl_T).sum()
    return LinearLossOutput(loss, ce_T.detach(), kl_T.detach())
