"""From shards to one rank's share of a global batch, as token rows.

B queries, M hard negatives, N documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from drama.data.draws import draw_documents
from drama.data.packing import Row, TokenRows
from drama.data.reading import BadRecord, Order, RankDataset
from drama.data.records import Record, content_id, document_hash64, query_hash64
from drama.data.stream import ShardSet
from drama.data.tokens import TokenRecords
from drama.errors import UserError
from drama.tokenizer import TextEncoder


@dataclass
class RankBatch:
    """One rank's share of a global batch: token rows of the queries, then of the documents.

    The first `num_queries` documents are the positives, in query order; hard negatives follow.
    document_ids: int64 [N], equal ids mean equal documents. num_cut: texts that were cut.
    query_ids: int64 [B], ids of the queries' texts. negatives_of: int64 [M], the query of each hard
    negative. scores: float64 [N], a teacher's score for a document and its query, NaN where there
    is none. bad: records left out.
    """

    rows: TokenRows
    num_queries: int
    document_ids: Tensor
    num_cut: int
    query_ids: Tensor
    negatives_of: Tensor
    scores: Tensor
    bad: list[BadRecord] = field(default_factory=list)

    @classmethod
    def of_pairs(cls, rows: Sequence[Row], document_ids: Tensor) -> RankBatch:
        """Queries and as many positives, without hard negatives or scores. Queries differ where
        their positives do."""
        count, none = len(document_ids), torch.empty(0, dtype=torch.int64)
        unknown = torch.full((count,), torch.nan, dtype=torch.float64)
        packed = TokenRows.of(rows)
        return cls(packed, count, document_ids, 0, document_ids, none, unknown)

    @property
    def num_tokens(self) -> int:
        return int(self.rows.lengths.sum())


class RankBatches(RankDataset[RankBatch]):
    """Queries and documents of an endless run, for one rank; see `RankDataset`.

    One positive and up to `hard_negatives` negatives are drawn per query and epoch; a record with
    fewer negatives gives fewer columns.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        tokenize: TextEncoder,
        *,
        rank: int,
        world_size: int,
        seed: int,
        hard_negatives: int,
        max_query_tokens: int,
        max_document_tokens: int,
        on_bad: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__(
            shards,
            order,
            tokenize,
            rank=rank,
            world_size=world_size,
            seed=seed,
            max_tokens=max(max_query_tokens, max_document_tokens),
            on_bad=on_bad,
        )
        self.hard_negatives = hard_negatives
        self.max_query_tokens, self.max_document_tokens = max_query_tokens, max_document_tokens

    def __getitem__(self, step: int) -> RankBatch:
        if self.no_tokens:
            records, indices, epochs, bad = self._read(step, self.shards.read)
            _check_some(indices, bad)
            batch = self.of_records(records, indices, epochs)
        else:
            members, indices, epochs, bad = self._read(step, self.shards.read_token_member)
            _check_some(indices, bad)
            batch = self._of_tokens(TokenRecords(members), indices, epochs)
        batch.bad = bad
        return batch

    def of_records(
        self, records: Sequence[Record], indices: Sequence[int] | np.ndarray, epochs: np.ndarray
    ) -> RankBatch:
        """Rows of these records; `indices` and `epochs` decide which documents are drawn."""
        drawn = draw_documents(
            self.seed,
            epochs,
            np.asarray(indices),
            np.array([len(record.positives) for record in records]),
            np.array([len(record.negatives) for record in records]),
            self.hard_negatives,
        )
        documents = [r.positives[i] for r, i in zip(records, drawn.positive_B, strict=True)]
        documents += [
            records[owner].negatives[i]
            for owner, i in zip(drawn.owner_M, drawn.negative_M, strict=True)
        ]
        owners = [*range(len(records)), *drawn.owner_M.tolist()]
        queries, cut_queries = self.tokenize.queries(records, self.max_query_tokens)
        texts, cut_documents = self.tokenize(
            [document.full_text for document in documents],
            "document",
            self.max_document_tokens,
        )
        # by content, not by id: two sources may both call a document "1"
        ids = [document_hash64(content_id(d.title, d.text)) for d in documents]
        scores = [
            (records[owner].scores or {}).get(document.id, math.nan)
            for owner, document in zip(owners, documents, strict=True)
        ]
        return RankBatch(
            TokenRows.of(queries + texts),
            len(queries),
            torch.tensor(ids),
            cut_queries + cut_documents,
            query_ids=torch.tensor([query_hash64(record.query) for record in records]),
            negatives_of=torch.from_numpy(drawn.owner_M),
            scores=torch.tensor(scores, dtype=torch.float64),
        )

    def _of_tokens(
        self, records: TokenRecords, indices: np.ndarray, epochs: np.ndarray
    ) -> RankBatch:
        drawn = draw_documents(
            self.seed, epochs, indices, records.positives_B, records.negatives_B,
            self.hard_negatives,
        )  # fmt: skip
        own = np.arange(len(records))
        of_X = np.concatenate((own, own, drawn.owner_M))
        row_X = np.concatenate(
            (
                np.zeros_like(own),
                1 + drawn.positive_B,
                1 + records.positives_B[drawn.owner_M] + drawn.negative_M,
            )
        )
        limit_X = np.full(len(of_X), self.max_document_tokens)
        limit_X[own] = self.max_query_tokens
        tokens, lengths, cut = records.rows(
            of_X, row_X, limit_X, self.tokenize.tokenizer.eos_token_id
        )
        ids = torch.from_numpy(records.ids(of_X, row_X))
        scores = records.scores(of_X[len(own) :], row_X[len(own) :])
        return RankBatch(
            TokenRows(tokens, lengths),
            len(own),
            ids[len(own) :],
            cut,
            query_ids=ids[: len(own)],
            negatives_of=torch.from_numpy(drawn.owner_M),
            scores=torch.from_numpy(scores),
        )


def _check_some(indices: np.ndarray, bad: Sequence[BadRecord]) -> None:
    if not len(indices):  # a contrastive step needs a query
        raise UserError(f"every record of a batch is bad, the last one: {bad[-1].message}")
