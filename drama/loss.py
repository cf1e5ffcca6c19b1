"""The contrastive objective over the global batch, evaluated once on detached vectors.

Every rank holds its own queries and documents. Documents and their ids are gathered, each rank
computes its queries against all columns, and the columns' gradient goes back to its owners by a
reduce-scatter. The result is the gradient of the mean over the global batch, whatever the split:
one process that holds everything gets the same.

B local queries, N local documents (first B are the positives), M gathered columns, D width,
P Matryoshka prefixes, W ranks, L the largest N of any rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from drama.kernels.infonce import infonce

# torch 2.13 renamed them and warns under the old names; 2.11 and 2.12 know only those
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


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

    def __call__(self, q_BD: Tensor, k_ND: Tensor, k_ids_N: Tensor) -> LossOutput:
        """Evaluate loss and gradients; q and k are detached here."""
        k_MD, sizes = gather_rows(k_ND.detach())
        k_ids_M, _ = gather_rows(k_ids_N)
        rank = dist.get_rank() if dist.is_initialized() else 0
        offset = sum(sizes[:rank])
        q_BD, k_MD = q_BD.detach().requires_grad_(), k_MD.requires_grad_()
        output = infonce(
            q_BD,
            k_MD,
            offset + torch.arange(len(q_BD), device=q_BD.device),
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
            grad_k_ND=scatter_rows(grad_k_MD, sizes),
            num_masked=int(totals[-2].item()),
        )


def gather_rows(x_ND: Tensor) -> tuple[Tensor, list[int]]:
    """All ranks' rows one below the other, and how many rows each rank gave; no gradient."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x_ND, [len(x_ND)]
    world = dist.get_world_size()
    sizes_W = torch.empty(world, dtype=torch.int64, device=x_ND.device)
    _all_gather(sizes_W, torch.tensor([len(x_ND)], device=x_ND.device))
    sizes = sizes_W.tolist()
    padded_LD = x_ND.new_zeros(max(sizes), *x_ND.shape[1:])
    padded_LD[: len(x_ND)] = x_ND
    all_WLD = x_ND.new_empty(world * max(sizes), *x_ND.shape[1:])
    _all_gather(all_WLD, padded_LD)
    parts = all_WLD.unflatten(0, (world, max(sizes)))
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)]), sizes


def scatter_rows(grad_MD: Tensor, sizes: list[int]) -> Tensor:
    """Sum every rank's gradient of the gathered rows and keep this rank's rows."""
    if len(sizes) == 1:
        return grad_MD
    padded_WLD = grad_MD.new_zeros(len(sizes), max(sizes), grad_MD.shape[1])
    for part, grad in zip(padded_WLD, grad_MD.split(sizes), strict=True):
        part[: len(grad)] = grad
    own_LD = grad_MD.new_empty(max(sizes), grad_MD.shape[1])
    _reduce_scatter(own_LD, padded_WLD.flatten(0, 1))
    return own_LD[: sizes[dist.get_rank()]]
