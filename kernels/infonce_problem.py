"""What the back ends of `infonce` are given, what they return, and what they share.

B queries (rows), N documents (columns), D width, P prefixes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -1e30  # logit of a column that is left out: exp gives 0, and 0 * MASKED stays 0
EPS = 1e-12  # shortest norm, as in torch.nn.functional.normalize


class Problem(NamedTuple):
    """Checked arguments of one evaluation; a NamedTuple, as the fields are those of one operator.

    temperature: 0-dim, of the accumulation dtype, on the device of q. owner_N: the row that a
    column is a negative for, -1 where it is one for all rows. The other fields as in `infonce`.
    """

    q_BD: Tensor
    k_ND: Tensor
    positive_B: Tensor
    temperature: Tensor
    widths: tuple[int, ...]
    weights: tuple[float, ...]
    k_ids_N: Tensor | None
    margin: float | None
    owner_N: Tensor | None
    symmetric: bool
    trains_temperature: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of accumulation and softmax."""
        return torch.float64 if self.q_BD.dtype == torch.float64 else torch.float32

    def at_full_width(self, gradient_RD: Tensor) -> Tensor:
        """The gradient of all dimensions: those past the widest prefix have none."""
        missing = self.q_BD.shape[1] - gradient_RD.shape[1]
        return F.pad(gradient_RD, (0, missing)) if missing else gradient_RD


class Evaluation(NamedTuple):
    """Loss, statistics and, where asked for, the gradients of the weighted loss.

    loss_PB: cross-entropy per prefix and row. All in the accumulation dtype, but that gradients
    may be in the dtype of their input.
    """

    loss_PB: Tensor
    lse_PB: Tensor
    positive_score_PB: Tensor
    num_masked_B: Tensor
    dq_BD: Tensor | None = None
    dk_ND: Tensor | None = None
    dtemperature: Tensor | None = None


def inverse_norms(x_RD: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Inverse norm of every prefix of every row, [P, R]; a row of zeros gets 1 / EPS."""
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(x_RD[:, :width], dim=1, dtype=wide) for width in widths]
    return torch.stack(norms).clamp_min_(EPS).reciprocal_()


def is_normed(inverse_PR: Tensor) -> Tensor:
    """Where a norm is a norm and not EPS, which does not change with the vector."""
    return inverse_PR < 0.99 / EPS


def owners(positive_B: Tensor, num_columns: int) -> Tensor:
    """Owner of every column where documents are laid out row by row, positive first, [N]."""
    columns_N = torch.arange(num_columns, device=positive_B.device)
    sorted_B, order_B = positive_B.sort(stable=True)
    before_N = torch.searchsorted(sorted_B, columns_N, right=True) - 1
    # -2 is no row: a column before all positives counts for none
    owner_N = torch.where(before_N < 0, -2, order_B[before_N.clamp_min(0)])
    return owner_N.index_fill(0, positive_B, -1)


def column_targets(
    negatives_lse_PN: Tensor, positive_z_PB: Tensor, positive_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and denominators of the column direction.

    Column c = positive_B[i] is a softmax over the rows: row i and every row that c is a negative
    for. negatives_lse_PN is the logsumexp over the latter, -inf where there is none.

    Returns:
        Loss of row i's column, [P, B], and V_PN such that the gradient at a negative entry of
        column c is exp(z - V_c): +inf where c is nobody's positive.
    """
    # not logaddexp - z: a solved column's loss is small, both of these are large
    above_PB = negatives_lse_PN[:, positive_B] - positive_z_PB
    loss_PB = torch.logaddexp(above_PB, torch.zeros_like(above_PB))
    d_PB = positive_z_PB + loss_PB
    num_prefixes, num_columns = negatives_lse_PN.shape
    # V = -logsumexp over the rows of one positive of -D; two rows may share their positive
    index_PB = positive_B.expand(num_prefixes, -1)
    low_PN = d_PB.new_full((num_prefixes, num_columns), torch.inf)
    low_PN.scatter_reduce_(1, index_PB, d_PB, "amin")
    total_PN = torch.zeros_like(low_PN)
    total_PN.scatter_add_(1, index_PB, (low_PN.gather(1, index_PB) - d_PB).exp())
    return loss_PB, torch.where(low_PN == torch.inf, torch.inf, low_PN - total_PN.log())


def remove_pull(
    raw_RD: Tensor, x_RD: Tensor, c_PR: Tensor, inverse_squares_PR: Tensor, widths: tuple[int, ...]
) -> Tensor:
    """Take out of `raw_RD`, in place, what renormalising each prefix takes out of a gradient.

    Prefix p does not change when x[:d_p] grows, so its part of the gradient has no component along
    x[:d_p]. c_PR: what that component is, x . raw of prefix p alone, for all but the widest prefix;
    the widest's is what is left of x . raw. inverse_squares_PR: 0 where a norm was too short to be
    one, so that nothing was renormalised. Returns x . raw, [R].
    """
    # in pieces: whole, the products and casts would be as large as the gradient
    piece = (2**25 if x_RD.is_cuda else 2**20) // widths[-1] + 1
    totals = []
    for at in range(0, len(raw_RD), piece):
        raw, x = raw_RD[at : at + piece], x_RD[at : at + piece, : widths[-1]].to(raw_RD.dtype)
        c, inverse_squares = c_PR[:, at : at + piece], inverse_squares_PR[:, at : at + piece]
        totals.append(torch.linalg.vecdot(x, raw))
        widest = totals[-1] - c.sum(0) if len(c) else totals[-1]
        pull = widest * inverse_squares[-1]
        for p in reversed(range(len(widths))):
            if p < len(c):
                pull = pull + c[p] * inverse_squares[p]
            segment = slice(widths[p - 1] if p else 0, widths[p])
            raw[:, segment].addcmul_(x[:, segment], pull[:, None], value=-1)
    return torch.cat(totals)
