"""InfoNCE in row chunks with torch's own operators: any device, float32 or float64.

Work memory is `WORK_ELEMENTS` + `BLOCK_ELEMENTS` of the accumulation dtype, whatever B and N (at
least one row).

q and k are first scaled to q~ = q / (|q| temperature) and k~ = k / |k| at the widest prefix, so its
logits are the product itself. Passes over a chunk's logits, besides the three matrix products:
softmax and sum for the widest prefix; two scalings, these two, a scaling, the product with the
logits, its two sums and a scaled addition for every further one. What is left out by id
costs no pass: the pairs are found by sorting the ids. `symmetric` needs the columns' logsumexp over
all rows first: a fourth matrix product.

`torch.softmax` is the only exponential of a row (its vectorised form costs two thirds of
`torch.exp`), and the loss is read off it: log1p of minus the negatives' share where the row is
nearly solved, so that small losses keep their digits, else the log of the positive's share.

B queries, C rows of a chunk or of a block of it, N documents, D width, P prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from drama.kernels.infonce_problem import (
    MASKED,
    Evaluation,
    Problem,
    column_targets,
    inverse_norms,
    is_normed,
    remove_pull,
)

WORK_ELEMENTS = 2**24  # of the chunk's logits, all prefixes: 64 MiB in float32
BLOCK_ELEMENTS = 2**19  # of a block's logits: 2 MiB in float32, so that a few fit a cache
PAIRS = 2**20  # duplicates that are looked up at a time


def evaluate(problem: Problem, *, with_gradient: bool) -> Evaluation:
    """Loss and statistics of all rows, and the gradients where asked for."""
    scores = _Scores(problem, with_gradient)
    if not problem.symmetric:
        gradients = _backward(scores, None) if with_gradient else _forward(scores, None)
        return scores.evaluation(gradients)
    negatives_lse_PN = torch.full_like(scores.ib_PN, -torch.inf)
    _forward(scores, negatives_lse_PN)
    positive_z_PB = scores.row_statistics()[0]
    targets = column_targets(negatives_lse_PN, positive_z_PB, problem.positive_B)
    done = scores.evaluation(_backward(scores, targets) if with_gradient else ())
    return done._replace(loss_PB=(done.loss_PB + targets[0]) / 2)


def _forward(scores: _Scores, negatives_lse_PN: Tensor | None) -> tuple[()]:
    """Row statistics; where given, adds every chunk's negatives to the columns' logsumexp."""
    for chunk in scores.chunks():
        for p, rows, z_CN in scores.logits(chunk):
            if negatives_lse_PN is not None:
                x_CN = scores.spare[: len(z_CN)].copy_(z_CN)
                x_CN.scatter_(1, scores.positive_B1[rows], MASKED)
                top_N = x_CN.amax(0)
                x_CN -= top_N
                chunk_N = top_N + x_CN.exp_().sum(0).log()
                # a column without any negative: its top is MASKED, its sum means nothing
                chunk_N.masked_fill_(top_N < MASKED / 2, -torch.inf)
                negatives_lse_PN[p] = torch.logaddexp(negatives_lse_PN[p], chunk_N)
            scores.gradient(p, z_CN, rows)
    return ()


def _backward(scores: _Scores, targets: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    """Row statistics and the gradients with respect to q, k and temperature."""
    problem, q_BD, k_ND = scores.problem, scores.q_BD, scores.k_ND
    dq_BD, dk_ND = torch.empty_like(q_BD), torch.zeros_like(k_ND)
    weights, last = problem.weights, len(problem.widths) - 1
    row_PB, column_PN = q_BD.new_zeros(last, len(q_BD)), q_BD.new_zeros(last, len(k_ND))
    scores.restart()
    for chunk in scores.chunks():
        for p, rows, z_CN in scores.logits(chunk):
            if targets is not None:
                column_loss_PB, v_PN = targets
                x_CN = torch.sub(z_CN, v_PN[p], out=scores.spare[: len(z_CN)]).exp_()
                at_positive_C1 = torch.expm1(-column_loss_PB[p, rows, None])
                x_CN.scatter_(1, scores.positive_B1[rows], at_positive_C1)
            g_CN = scores.gradient(p, z_CN, rows)
            inside = slice(rows.start - chunk.start, rows.stop - chunk.start)
            if targets is not None:
                g_CN.add_(x_CN).mul_(0.5)
            if p < last:
                # z = product * ra * rb, so sums of g * z are sums of (g * ra * rb) * product
                g_CN *= scores.rb_PN[p] * weights[p]
                gz_CN = torch.mul(g_CN, scores.product[inside], out=scores.spare[: len(z_CN)])
                row_PB[p, rows] = gz_CN.sum(1) * scores.ra_PB[p, rows]
                column_PN[p].addmv_(gz_CN.T, scores.ra_PB[p, rows])
                continue
            if weights[p] != 1:
                g_CN *= weights[p]
            for narrow in reversed(range(last)):  # sums over this prefix and all wider ones
                wider_CN, g_CN = g_CN, scores.narrow(narrow)[inside]
                torch.addcmul(wider_CN, g_CN, scores.ra_PB[narrow, rows, None], out=g_CN)
        for p, segment in enumerate(scores.segments):
            h_CN = scores.product if p == last else scores.narrow(p)
            h_CN = h_CN[: chunk.stop - chunk.start]
            torch.mm(h_CN, k_ND[:, segment], out=dq_BD[chunk, segment])
            dk_ND[:, segment].addmm_(h_CN.T, q_BD[chunk, segment])

    temperature, num_rows = problem.temperature, len(q_BD)
    squares_PB = (scores.ra_PB * temperature).square_() * is_normed(scores.ia_PB)
    squares_PN = scores.rb_PN.square() * is_normed(scores.ib_PN)
    total_B = remove_pull(dq_BD, q_BD, row_PB, squares_PB, problem.widths)
    remove_pull(dk_ND, k_ND, column_PN, squares_PN, problem.widths)
    dq_BD *= (scores.ia_PB[-1] / (temperature * num_rows))[:, None]
    dk_ND *= (scores.ib_PN[-1] / num_rows)[:, None]
    return (
        problem.at_full_width(dq_BD),
        problem.at_full_width(dk_ND),
        total_B.sum() / (temperature * -num_rows),
    )


class _Scores:
    """Masked logits of a chunk of rows, prefix by prefix, and the row statistics."""

    def __init__(self, problem: Problem, with_gradient: bool) -> None:
        self.problem, widths = problem, problem.widths
        q_BD, k_ND = problem.q_BD.to(problem.dtype), problem.k_ND.to(problem.dtype)
        self.segments = [slice(a, b) for a, b in zip((0, *widths[:-1]), widths, strict=True)]
        self.ia_PB, self.ib_PN = inverse_norms(q_BD, widths), inverse_norms(k_ND, widths)
        self.q_BD = q_BD[:, : widths[-1]] * (self.ia_PB[-1] / problem.temperature)[:, None]
        self.k_ND = k_ND[:, : widths[-1]] * self.ib_PN[-1][:, None]
        # inverse norms of the scaled vectors' prefixes, so 1 at the widest
        self.ra_PB, self.rb_PN = self.ia_PB / self.ia_PB[-1], self.ib_PN / self.ib_PN[-1]
        self.positive_B1 = problem.positive_B[:, None]
        self.mask = _Mask(problem)
        # ids alone are counted by sorting them
        self.counts = problem.margin is not None or problem.owner_N is not None

        num_rows, num_columns, num_prefixes = len(q_BD), len(k_ND), len(widths)
        self.num_masked_B = self.mask.copies_B.clone() if self.counts else self.mask.copies_B
        self.num_narrow = num_prefixes - 1 if with_gradient else min(num_prefixes - 1, 1)
        # the product, and the narrow prefixes' logits, which become their gradients
        num_buffers = 1 + self.num_narrow
        chunk_size = max(1, WORK_ELEMENTS // (num_buffers * num_columns))
        if chunk_size > 64:
            chunk_size -= chunk_size % 64  # matrix products run slower on ragged edges
        self.chunk_size = min(num_rows, chunk_size)
        self.block_size = min(self.chunk_size, max(1, BLOCK_ELEMENTS // num_columns))
        self.work = q_BD.new_empty(num_buffers, self.chunk_size, num_columns)
        self.product, self.spare = self.work[0], q_BD.new_empty(self.block_size, num_columns)
        self.restart()

    def restart(self) -> None:
        """Forget the row statistics, before the rows are visited again."""
        self.parts: list[list[tuple[Tensor, ...]]] = [[] for _ in self.segments]

    def chunks(self) -> Iterator[slice]:
        for first in range(0, len(self.q_BD), self.chunk_size):
            yield slice(first, min(first + self.chunk_size, len(self.q_BD)))

    def narrow(self, p: int) -> Tensor:
        return self.work[1 + p % self.num_narrow]

    def logits(self, chunk: slice) -> Iterator[tuple[int, slice, Tensor]]:
        """Prefix, rows and their masked logits [C, N], in a buffer that the caller may overwrite.

        Matrix products run on the whole chunk, everything else on blocks of rows that stay in the
        cache from the first operator to the last.
        """
        acc_CN = self.product[: chunk.stop - chunk.start]
        for p, segment in enumerate(self.segments):
            factors = self.q_BD[chunk, segment], self.k_ND[:, segment].T
            if p == 0:
                torch.mm(*factors, out=acc_CN)
            else:
                acc_CN.addmm_(*factors)
            for first in range(chunk.start, chunk.stop, self.block_size):
                rows = slice(first, min(first + self.block_size, chunk.stop))
                inside = slice(first - chunk.start, rows.stop - chunk.start)
                z_CN = acc_CN[inside]
                if p + 1 < len(self.segments):
                    z_CN = torch.mul(z_CN, self.rb_PN[p], out=self.narrow(p)[inside])
                    z_CN *= self.ra_PB[p, rows, None]
                positive_z_C1 = z_CN.gather(1, self.positive_B1[rows])
                self._leave_out(p, z_CN, positive_z_C1, rows)
                self.parts[p].append((positive_z_C1[:, 0],))
                yield p, rows, z_CN

    def _leave_out(self, p: int, z_CN: Tensor, positive_z_C1: Tensor, rows: slice) -> None:
        self.mask.leave_out(z_CN, rows)
        margin = self.problem.margin
        if margin is not None:
            limit_C1 = positive_z_C1 + margin / self.problem.temperature
            # as numbers, not bools: four times as fast on a CPU
            z_CN.add_(torch.gt(z_CN, limit_C1, out=self.spare[: len(z_CN)]), alpha=MASKED)
        if self.mask.acts or margin is not None:
            z_CN.scatter_(1, self.positive_B1[rows], positive_z_C1)
        if self.counts and p + 1 == len(self.segments):
            out_CN = torch.lt(z_CN, MASKED / 2, out=self.spare[: len(z_CN)])
            self.num_masked_B[rows] = out_CN.sum(1, dtype=torch.float64).long()

    def gradient(self, p: int, z_CN: Tensor, rows: slice) -> Tensor:
        """Turn the logits into softmax minus onehot, in place, and keep the statistics.

        The positive gets minus the sum of the others: a solved row keeps its digits, which
        1 - softmax would lose.
        """
        torch.softmax(z_CN, 1, out=z_CN)
        positive_C1 = self.positive_B1[rows]
        p_C1 = z_CN.gather(1, positive_C1)
        others_C1 = z_CN.scatter_(1, positive_C1, 0.0).sum(1, keepdim=True)
        loss_C1 = torch.where(others_C1 < 0.5, -torch.log1p(-others_C1), -p_C1.log())
        lost_C = (p_C1[:, 0] < torch.finfo(p_C1.dtype).tiny * 2**24).nonzero()[:, 0]
        if len(lost_C):
            loss_C1[lost_C, 0] = self._loss_of_underflown(p, z_CN, rows, lost_C)
        self.parts[p][-1] += (loss_C1[:, 0],)
        return z_CN.scatter_(1, positive_C1, -others_C1)

    def _loss_of_underflown(self, p: int, p_CN: Tensor, rows: slice, lost_C: Tensor) -> Tensor:
        """Cross-entropy by way of the likeliest column, where softmax at the positive is 0."""
        top_p_L, top_L = p_CN[lost_C].max(1)
        row_L, width = lost_C + rows.start, self.problem.widths[p]
        top_z_L = torch.linalg.vecdot(self.q_BD[row_L, :width], self.k_ND[top_L, :width])
        top_z_L *= self.ra_PB[p, row_L] * self.rb_PN[p, top_L]
        return top_z_L - self.parts[p][-1][0][lost_C] - top_p_L.log()

    def row_statistics(self) -> tuple[Tensor, Tensor]:
        """The positive's logit and the cross-entropy, [P, B]."""
        joined = [
            [torch.cat(x) if len(x) > 1 else x[0] for x in zip(*parts, strict=True)]
            for parts in self.parts
        ]
        positive_z_PB, loss_PB = (torch.stack(x) for x in zip(*joined, strict=True))
        return positive_z_PB, loss_PB

    def evaluation(self, gradients: tuple[Tensor, ...]) -> Evaluation:
        positive_z_PB, loss_PB = self.row_statistics()
        score_PB = positive_z_PB * self.problem.temperature
        return Evaluation(loss_PB, positive_z_PB + loss_PB, score_PB, self.num_masked_B, *gradients)


class _Mask:
    """Leaves entries out by the documents' ids and owners; pairs of indices, never a matrix."""

    def __init__(self, problem: Problem) -> None:
        positive_B, owner_N, ids_N = problem.positive_B, problem.owner_N, problem.k_ids_N
        self.acts = owner_N is not None or ids_N is not None
        self.owned = None
        if owner_N is not None:
            owned = (owner_N != -1).nonzero()[:, 0]
            self.owned = owned[owner_N[owned].argsort(stable=True)]
            self.owned_by = owner_N[self.owned]
        # rows whose positive's id stands in several columns, and where those are among sorted ids
        self.copies_B = torch.zeros_like(positive_B)
        self.rows = positive_B[:0]
        if ids_N is not None:
            sorted_N, self.order_N = ids_N.sort()
            wanted_B = ids_N[positive_B]
            first_B = torch.searchsorted(sorted_N, wanted_B)
            self.copies_B = torch.searchsorted(sorted_N, wanted_B, right=True) - first_B - 1
            self.rows = self.copies_B.nonzero()[:, 0]
            self.first = first_B[self.rows]
            self.ends = (self.copies_B[self.rows] + 1).cumsum(0)

    def leave_out(self, z_CN: Tensor, rows: slice) -> None:
        """Mask in place; the positive may be masked too and is the caller's to put back."""
        if self.owned is not None:
            own = slice(*_between(self.owned_by, rows))
            at = (self.owned_by[own] - rows.start, self.owned[own])
            kept = z_CN[at]
            z_CN.index_fill_(1, self.owned, MASKED)
            z_CN[at] = kept
        if not len(self.rows):
            return
        first, last = _between(self.rows, rows)
        start, stop = (int(self.ends[i - 1]) if i else 0 for i in (first, last))
        for at_pair in range(start, stop, PAIRS):
            pair = torch.arange(at_pair, min(at_pair + PAIRS, stop), device=z_CN.device)
            which = torch.searchsorted(self.ends, pair, right=True)
            row = self.rows[which]
            before = self.ends[which] - self.copies_B[row] - 1
            z_CN[row - rows.start, self.order_N[self.first[which] + pair - before]] = MASKED


def _between(sorted_X: Tensor, rows: slice) -> tuple[int, int]:
    """Where row numbers within `rows` begin and end in a sorted list of them."""
    ends = torch.tensor([rows.start, rows.stop], device=sorted_X.device)
    first, last = torch.searchsorted(sorted_X, ends).tolist()
    return first, last
