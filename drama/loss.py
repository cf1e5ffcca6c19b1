"""The contrastive objective over the global batch, evaluated once on detached vectors.

Every rank holds some queries and documents. Documents are gathered, each rank computes its queries
against all columns, and the columns' gradient goes back to its owners by a reduce-scatter. The
result is the gradient of the mean over the global batch, whatever the split: one process that holds
everything gets the same.

B local queries, N local documents, M gathered columns, D width, P Matryoshka prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from drama.gather import Columns
from drama.kernels.infonce import infonce


@dataclass(frozen=True)
class LossOutput:
    """loss, loss_P: means over the global batch (loss_P unweighted), the same on every rank.

    grad_q_BD, grad_k_ND: gradient of `loss` (the global mean) with respect to this rank's vectors.
    num_masked: columns left out as false negatives, summed over the global batch.
    """

    loss: Tensor
    loss_P: Tensor
    grad_q_BD: Tensor
    grad_k_ND: Tensor
    num_masked: int


@dataclass(frozen=True)
class ContrastiveLoss:
    """InfoNCE with in-batch and hard negatives from all ranks (DRAMA section 3.1).

    Empty `prefixes` means the full width only; empty `prefix_weights` means 1 each.
    """

    temperature: float
    prefixes: tuple[int, ...] = ()
    prefix_weights: tuple[float, ...] = ()
    margin: float | None = None

    def __call__(
        self, q_BD: Tensor, columns: Columns, positive_B: Tensor, k_ids_M: Tensor
    ) -> LossOutput:
        """Evaluate loss and gradients.

        Args:
            q_BD: this rank's queries; detached here.
            columns: to which this rank's documents were sent.
            positive_B: int64, each query's column.
            k_ids_M: int64 ids of the columns.
        """
        q_BD, k_MD = q_BD.detach().requires_grad_(), columns.receive().requires_grad_()
        output = infonce(
            q_BD,
            k_MD,
            positive_B,
            temperature=self.temperature,
            prefixes=self.prefixes or None,
            prefix_weights=self.prefix_weights or None,
            k_ids_N=k_ids_M,
            margin=self.margin,
        )
        # infonce averages over its own rows; the objective averages over everybody's
        totals = torch.cat(
            [
                output.loss_P.detach() * len(q_BD),
                output.num_masked_B.sum()[None],
                output.loss_P.new_tensor([len(q_BD)]),
            ]
        ).double()
        if dist.is_initialized():
            dist.all_reduce(totals)
        num_queries = totals[-1].item()
        share = len(q_BD) / num_queries
        grad_q_BD, grad_k_MD = torch.autograd.grad(output.loss * share, (q_BD, k_MD))
        loss_P = totals[:-2] / num_queries
        weights_P = loss_P.new_tensor(self.prefix_weights or [1.0] * len(loss_P))
        return LossOutput(
            loss=(loss_P * weights_P).sum(),
            loss_P=loss_P,
            grad_q_BD=grad_q_BD,
            grad_k_ND=columns.scatter_sum(grad_k_MD),
            num_masked=int(totals[-2].item()),
        )
