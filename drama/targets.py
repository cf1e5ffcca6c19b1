"""What the columns of a loss are to the queries of one rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """B local queries, M documents of all ranks (columns).

    positive_B: int64, each query's column. ids_M: int64, equal where documents are equal. same_M:
    int64, equal too for positives of queries with one text: no negatives of one another's queries.
    query_M: int64, the local query that a document was read with, -1 for one of another rank.
    is_positive_M: bool, some query's positive; all others are hard negatives. score_M: float32, a
    teacher's score for the document and its query, NaN where there is none. query_ids_B: int64, ids
    of the queries' texts. queries_of_ranks: how many queries each rank holds.
    """

    positive_B: Tensor
    ids_M: Tensor
    same_M: Tensor
    query_M: Tensor
    is_positive_M: Tensor
    score_M: Tensor
    query_ids_B: Tensor
    queries_of_ranks: tuple[int, ...]

    def to(self, device: torch.device) -> Targets:
        names = self._fields[:-1]
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        return self._replace(**moved)

    @property
    def owners(self) -> Tensor:
        """As `infonce` wants them: the only row that a column is a negative for, -1 for every row;
        -2 is no row of this rank."""
        row_M = torch.where(self.query_M < 0, -2, self.query_M)
        return torch.where(self.is_positive_M, -1, row_M)
