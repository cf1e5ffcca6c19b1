"""From records to packed chunks: tokens side by side, no padding, cut by a token budget.

T packed tokens, B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from drama.data.order import LaneOrder
from drama.data.records import Document, Record, content_id, document_hash64, query_hash64
from drama.data.stream import ShardSet
from drama.tokenizer import TextEncoder


@dataclass
class PackedBatch:
    """Sequences laid side by side.

    input_ids_T, position_ids_T: int64. cu_seqlens: int32 [B + 1]. lengths: the same on the host.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device | str) -> PackedBatch:
        ids, positions, cu = (
            x.to(device, non_blocking=True)
            for x in (self.input_ids_T, self.position_ids_T, self.cu_seqlens)
        )
        return PackedBatch(ids, positions, cu, self.lengths)


def pack(rows: Sequence[Sequence[int]]) -> PackedBatch:
    """Lay token rows (each at least one token) side by side, in the order given."""
    lengths = tuple(len(row) for row in rows)
    assert min(lengths, default=0) > 0, "packing needs rows with at least one token"
    return PackedBatch(
        torch.from_numpy(np.fromiter(chain.from_iterable(rows), np.int64, sum(lengths))),
        torch.cat([torch.arange(n) for n in lengths]),
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        lengths,
    )


def count_chunks(lengths: Sequence[int], token_budget: int) -> int:
    """How many chunks `lengths` (sorted) need when none may exceed the budget."""
    return len(_greedy(lengths, token_budget))


def _greedy(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Cut the sequence of lengths into runs of at most `capacity` tokens; a longer one is alone."""
    chunks: list[list[int]] = []
    room = -1
    for index, length in enumerate(lengths):
        if length > room:
            chunks.append([])
            room = capacity
        chunks[-1].append(index)
        room -= length
    return chunks


def even_chunks(lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Cut `lengths` into exactly `num_chunks` consecutive runs, the largest as small as possible.

    Runs hold indices into `lengths`. Fewer sequences than chunks give empty runs at the end.
    """
    low, high = max(lengths), sum(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if len(_greedy(lengths, middle)) <= num_chunks else (middle + 1, high)
        )
    chunks = _greedy(lengths, low)
    while len(chunks) < num_chunks and len(chunks) < len(lengths):
        widest = max((c for c in chunks if len(c) > 1), key=lambda c: sum(lengths[i] for i in c))
        at, half = chunks.index(widest), len(widest) // 2
        chunks[at : at + 1] = [widest[:half], widest[half:]]
    return chunks + [[] for _ in range(num_chunks - len(chunks))]


@dataclass
class RankBatch:
    """One rank's share of a global batch: token rows of the queries, then of the documents.

    The first `num_queries` documents are the positives, in query order; hard negatives follow.
    document_ids: int64 [documents], equal ids mean equal documents. num_cut: texts that were cut.
    query_ids: int64 [queries], ids of the queries' texts. negatives_of: int64 [hard negatives], the
    query of each. scores: float64 [documents], a teacher's score for a document and its query, NaN
    where there is none.
    """

    rows: list[list[int]]
    num_queries: int
    document_ids: Tensor
    num_cut: int
    query_ids: Tensor
    negatives_of: Tensor
    scores: Tensor

    @classmethod
    def of_pairs(cls, rows: list[list[int]], document_ids: Tensor) -> RankBatch:
        """Queries and as many positives, without hard negatives, scores or ids of queries."""
        count, none = len(document_ids), torch.empty(0, dtype=torch.int64)
        unknown = torch.full((count,), torch.nan, dtype=torch.float64)
        return cls(rows, count, document_ids, 0, torch.zeros_like(document_ids), none, unknown)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))


class RankBatches(Dataset[RankBatch]):
    """Batch `i` of an endless run, for one rank: a pure function of (seed, i).

    A map-style dataset, so a DataLoader over `range(start, stop)` reads, tokenises and resumes with
    any number of workers and gives the same batches. One positive and up to `hard_negatives`
    negatives are drawn per query and epoch; a record with fewer negatives gives fewer columns.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: LaneOrder,
        tokenize: TextEncoder,
        *,
        rank: int,
        world_size: int,
        seed: int,
        hard_negatives: int,
        max_query_tokens: int,
        max_document_tokens: int,
    ) -> None:
        self.shards, self.order, self.tokenize = shards, order, tokenize
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.hard_negatives = hard_negatives
        self.max_query_tokens, self.max_document_tokens = max_query_tokens, max_document_tokens

    def __getitem__(self, step: int) -> RankBatch:
        epoch, batch = divmod(step, self.order.batches_per_epoch)
        indices = self.order.rank_indices(epoch, batch, self.rank, self.world_size)
        return self.of_records([self.shards.read(int(i)) for i in indices], indices, epoch)

    def of_records(
        self, records: Sequence[Record], indices: Sequence[int] | np.ndarray, epoch: int
    ) -> RankBatch:
        """Rows of these records; `indices` and `epoch` decide which documents are drawn."""
        drawn = [
            self._draw(record, epoch, int(i)) for record, i in zip(records, indices, strict=True)
        ]
        positives = [positive for positive, _ in drawn]
        documents = positives + [doc for _, negatives in drawn for doc in negatives]
        counts = [len(negatives) for _, negatives in drawn]
        negatives_of = np.repeat(np.arange(len(records)), counts)
        owners = [*range(len(records)), *negatives_of.tolist()]
        queries, cut_queries = self.tokenize(
            [record.query for record in records], "query", self.max_query_tokens
        )
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
            queries + texts,
            len(queries),
            torch.tensor(ids),
            cut_queries + cut_documents,
            query_ids=torch.tensor([query_hash64(record.query) for record in records]),
            negatives_of=torch.from_numpy(negatives_of),
            scores=torch.tensor(scores, dtype=torch.float64),
        )

    def _draw(self, record: Record, epoch: int, index: int) -> tuple[Document, list[Document]]:
        # raw words, as in LaneOrder: numpy keeps these from version to version
        seeds = np.random.SeedSequence([self.seed, epoch, index])
        words = np.random.Philox(seeds).random_raw(1 + len(record.negatives))
        positive = record.positives[int(words[0]) % len(record.positives)]
        chosen = np.argsort(words[1:], kind="stable")[: self.hard_negatives]
        return positive, [record.negatives[i] for i in chosen]
