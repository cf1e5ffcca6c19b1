"""The contrastive objective over the global batch, evaluated once on detached vectors.

Every rank holds some queries and documents. Documents are gathered, each rank computes its queries
against all columns, and the columns' gradient goes back to its owners by a reduce-scatter. The
result is the gradient of the mean over the global batch, whatever the split: one process that holds
everything gets the same. The column direction (`symmetric`) is the same the other way round: the
queries are gathered, each rank computes the positives of its queries against all of them.

B local queries, M gathered columns, Q queries of all ranks, D width, P Matryoshka prefixes, E
teacher's width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from drama.distill import ScoreDistillation, Term, similarity_distillation, spread_out
from drama.gather import Columns
from drama.kernels.infonce import infonce
from drama.kernels.infonce_reference import InfoNCEOutput
from drama.targets import Targets
from drama.teacher import TeacherVectors
from drama.temperature import LearnedTemperature


@dataclass(frozen=True)
class LossOutput:
    """loss: all terms, of the global batch, the same on every rank; loss_P: the contrastive one by
    prefix, unweighted; terms: the others by name.

    grad_q_BD, grad_k_ND: gradient of `loss` with respect to this rank's vectors; grad_temperature
    with respect to a learned one. num_masked: columns left out, summed over the global batch.
    """

    loss: float
    loss_P: Tensor
    grad_q_BD: Tensor
    grad_k_ND: Tensor
    num_masked: int
    terms: dict[str, float] = field(default_factory=dict)
    grad_temperature: float = 0.0


@dataclass(frozen=True)
class ContrastiveLoss:
    """InfoNCE with in-batch and hard negatives from all ranks (DRAMA section 3.1), and what may be
    added to it.

    Empty `prefixes` means the full width only; empty `prefix_weights` means 1 each. own_negatives:
    a hard negative counts for the query that it was read with only. symmetric: mean of this
    direction and of the documents' one. spread_weight: of `spread_out` over queries and over
    positives. teacher: vectors whose cosines are imitated, with `teacher_weight`.
    """

    temperature: float | LearnedTemperature
    prefixes: tuple[int, ...] = ()
    prefix_weights: tuple[float, ...] = ()
    margin: float | None = None
    own_negatives: bool = False
    symmetric: bool = False
    scores: ScoreDistillation | None = None
    spread_weight: float = 0.0
    teacher: TeacherVectors | None = None
    teacher_weight: float = 1.0

    def __call__(self, q_BD: Tensor, columns: Columns, targets: Targets) -> LossOutput:
        """Evaluate loss and gradients.

        Args:
            q_BD: this rank's queries; detached here.
            columns: to which this rank's documents were sent.
            targets: what the columns are to the queries.
        """
        learned = self.temperature if isinstance(self.temperature, LearnedTemperature) else None
        temperature = learned.leaf(q_BD.device) if learned else self.temperature
        assert not isinstance(temperature, LearnedTemperature)
        q_BD, k_MD = q_BD.detach().requires_grad_(), columns.receive().requires_grad_()
        num_ranks = len(targets.queries_of_ranks)
        output = infonce(
            q_BD,
            k_MD,
            targets.positive_B,
            temperature=temperature,
            prefixes=self.prefixes or None,
            prefix_weights=self.prefix_weights or None,
            k_ids_N=targets.same_M,
            margin=self.margin,
            own_negatives=targets.owners if self.own_negatives else False,
            symmetric=self.symmetric and num_ranks == 1,
        )
        mean, loss_P = output.loss, output.loss_P
        leaves = [q_BD, k_MD, *([temperature] if isinstance(temperature, Tensor) else [])]
        queries = None
        if self.symmetric and num_ranks > 1:
            queries = Columns([list(targets.queries_of_ranks)])
            queries.send(q_BD)
            q_QD = queries.receive().requires_grad_()
            back = self._column_direction(q_QD, k_MD, targets, temperature)
            mean, loss_P = (mean + back.loss) / 2, (loss_P + back.loss_P) / 2
            leaves.append(q_QD)
        # infonce averages over its own rows; the objective averages over everybody's
        totals = torch.cat(
            [loss_P.detach() * len(q_BD), output.num_masked_B.sum()[None].to(loss_P)]
        ).double()
        if num_ranks > 1:
            dist.all_reduce(totals)
        num_queries = sum(targets.queries_of_ranks)
        terms = self._terms(q_BD, k_MD, targets, temperature)
        local = mean * (len(q_BD) / num_queries)
        for term in terms.values():
            local = local + term.part
        grad_q_BD, grad_k_MD, *others = torch.autograd.grad(local, leaves)
        if queries is not None:
            grad_q_BD = grad_q_BD + queries.scatter_sum(others.pop())
        mean_P = totals[:-1] / num_queries
        weights_P = mean_P.new_tensor(self.prefix_weights or [1.0] * len(mean_P))
        return LossOutput(
            loss=(mean_P * weights_P).sum().item() + sum(t.value for t in terms.values()),
            loss_P=mean_P,
            grad_q_BD=grad_q_BD,
            grad_k_ND=columns.scatter_sum(grad_k_MD),
            num_masked=int(totals[-1].item()),
            terms={name: term.value for name, term in terms.items()},
            grad_temperature=self._summed(others[0], num_ranks) if others else 0.0,
        )

    def _column_direction(
        self, q_QD: Tensor, k_MD: Tensor, targets: Targets, temperature: float | Tensor
    ) -> InfoNCEOutput:
        """This rank's positives against everybody's queries; a query with an equal positive, or
        of the same text, is no negative."""
        num_queries, rank = len(targets.positive_B), dist.get_rank()
        first = sum(targets.queries_of_ranks[:rank])
        ids = Columns([list(targets.queries_of_ranks)])
        ids.send(targets.same_M[targets.positive_B])
        rows_B = torch.arange(first, first + num_queries, device=q_QD.device)
        return infonce(
            k_MD[targets.positive_B],
            q_QD,
            rows_B,
            temperature=temperature,
            prefixes=self.prefixes or None,
            prefix_weights=self.prefix_weights or None,
            k_ids_N=ids.receive(),
        )

    def _terms(
        self, q_BD: Tensor, k_MD: Tensor, targets: Targets, temperature: float | Tensor
    ) -> dict[str, Term]:
        terms = {}
        positives_BD = k_MD[targets.positive_B]
        if self.scores is not None:
            terms["scores"] = self.scores(q_BD, k_MD, targets, temperature)
        if self.spread_weight:
            terms["spread_queries"] = spread_out(q_BD, self.spread_weight)
            terms["spread_documents"] = spread_out(positives_BD, self.spread_weight)
        if self.teacher is not None:
            ids = torch.cat((targets.query_ids_B, targets.ids_M[targets.positive_B]))
            teacher_XE = self.teacher.look_up(ids.cpu()).to(q_BD.device)
            texts_XD = torch.cat((q_BD, positives_BD))
            terms["teacher"] = similarity_distillation(texts_XD, teacher_XE, self.teacher_weight)
        return terms

    def _summed(self, gradient: Tensor, num_ranks: int) -> float:
        if num_ranks > 1:
            dist.all_reduce(gradient)
        return gradient.item()
