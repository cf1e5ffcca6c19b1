"""Who encodes which texts of a global batch: the same number of tokens on every rank.

A step ends when the slowest rank ends. Ranks read records, and records differ in length: with long
documents one rank may hold a fifth more tokens than another. So before anything is encoded the
texts of all ranks are sorted by length and dealt out, forwards and backwards in turn; they travel
as token ids, a few bytes a token. Queries and documents are dealt apart, so that the loss is spread
evenly too. The result depends on the batch and the number of ranks only.

W ranks, B queries and N documents of one rank, M documents of all ranks. A text's number counts
over all ranks in the order in which they were read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from drama.data.batches import RankBatch
from drama.data.packing import Row, even_chunks
from drama.gather import all_gather
from drama.targets import Targets


@dataclass
class Share:
    """What one rank encodes: token rows of queries, then of documents, each shortest first.

    query_B: numbers of its queries; query_ids_B: ids of their texts. documents_by_rank: the
    documents' numbers, in the order in which each rank holds them; queries_of_ranks: how many
    queries each holds. By number of a document: ids_M, its id; same_M, equal for those that are no
    negatives of one another's queries; query_M, the number of the query
    that it was read with; score_M, a teacher's score. positive_Q: by number of a query, its
    positive document.
    """

    rows: Sequence[Row]
    query_B: np.ndarray
    query_ids_B: np.ndarray
    documents_by_rank: list[np.ndarray]
    queries_of_ranks: tuple[int, ...]
    ids_M: np.ndarray
    same_M: np.ndarray
    query_M: np.ndarray
    score_M: np.ndarray
    positive_Q: np.ndarray
    order: list[int] = field(init=False)  # row numbers, shortest row first

    def __post_init__(self) -> None:
        self.order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]))

    @property
    def num_queries(self) -> int:
        return len(self.query_B)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row, in the order of the chunks."""
        return [len(self.rows[i]) for i in self.order]

    def chunks(self, num_chunks: int) -> list[list[int]]:
        """Row numbers of each of `num_chunks` chunks, queries and documents mixed by length."""
        return [[self.order[i] for i in chunk] for chunk in even_chunks(self.lengths, num_chunks)]

    def targets(self, part_sizes: Sequence[Sequence[int]]) -> Targets:
        """What the gathered documents are to this rank's queries.

        part_sizes: as in `Columns`, the documents of each rank in the order in which it holds them.
        """
        taken, numbers = [0] * len(self.documents_by_rank), []
        for sizes in part_sizes:
            for rank, n in enumerate(sizes):
                numbers.append(self.documents_by_rank[rank][taken[rank] : taken[rank] + n])
                taken[rank] += n
        number_M = np.concatenate(numbers)
        column_of_M = np.empty_like(number_M)
        column_of_M[number_M] = np.arange(len(number_M))
        row_Q = np.full(len(self.positive_Q), -1)
        row_Q[self.query_B] = np.arange(len(self.query_B))
        is_positive_M = np.zeros(len(number_M), bool)
        is_positive_M[self.positive_Q] = True
        return Targets(
            torch.from_numpy(column_of_M[self.positive_Q[self.query_B]]),
            torch.from_numpy(self.ids_M[number_M]),
            torch.from_numpy(self.same_M[number_M]),
            torch.from_numpy(row_Q[self.query_M[number_M]]),
            torch.from_numpy(is_positive_M[number_M]),
            torch.from_numpy(self.score_M[number_M].astype(np.float32)),
            torch.from_numpy(self.query_ids_B),
            self.queries_of_ranks,
        )


def share_out(batch: RankBatch, *, balance: bool, group: dist.ProcessGroup | None) -> Share:
    """Deal the texts of all ranks out, or with `balance` off only number them.

    Every rank calls it; the texts travel through `group`, one that moves host memory.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    texts = _Texts.of_all_ranks(batch, world, group)
    if world > 1 and balance:
        holder = np.empty_like(texts.lengths)
        holder[texts.is_query] = _dealt(texts.lengths[texts.is_query], world)
        # from the other end: the rank with the longest query does not get the longest document too
        holder[~texts.is_query] = world - 1 - _dealt(texts.lengths[~texts.is_query], world)
        rows = _exchange(batch.rows, texts, holder, rank, world, group)
    else:
        holder, rows = texts.reader, dict(enumerate(batch.rows, int((texts.reader < rank).sum())))

    # numbers within the queries and within the documents, and each rank's, shortest first
    place = np.where(texts.is_query, texts.is_query.cumsum(), (~texts.is_query).cumsum()) - 1
    held = [np.flatnonzero(holder == r) for r in range(world)]
    held = [h[np.argsort(texts.lengths[h], kind="stable")] for h in held]
    own = held[rank]
    own_queries, own_documents = own[texts.is_query[own]], own[~texts.is_query[own]]
    documents = ~texts.is_query
    ids_M, positive_Q = texts.ids[documents], texts.positive_of_queries()
    return Share(
        rows=[rows[int(i)] for i in (*own_queries, *own_documents)],
        query_B=place[own_queries],
        query_ids_B=texts.ids[own_queries],
        documents_by_rank=[place[h[documents[h]]] for h in held],
        queries_of_ranks=tuple(int(texts.is_query[h].sum()) for h in held),
        ids_M=ids_M,
        same_M=_same_documents(ids_M, ids_M[positive_Q], texts.ids[texts.is_query]),
        query_M=place[texts.query[documents]],
        score_M=texts.scores[documents],
        positive_Q=positive_Q,
    )


def _same_documents(
    ids_M: np.ndarray, positive_Q: np.ndarray, query_ids_Q: np.ndarray
) -> np.ndarray:
    """The documents' ids, the least of them for all positives of queries with one text: a data set
    with one positive a line has such queries, and their positives are no negatives.

    positive_Q: id of each query's positive. A document that two queries share joins theirs.
    """
    texts, query_Q = np.unique(query_ids_Q, return_inverse=True)
    if len(texts) == len(query_ids_Q):
        return ids_M
    ids, document_M = np.unique(ids_M, return_inverse=True)
    document_Q, least = np.searchsorted(ids, positive_Q), np.arange(len(ids))
    while True:
        of_text = np.full(len(texts), len(ids))
        np.minimum.at(of_text, query_Q, least[document_Q])
        joined = least.copy()
        np.minimum.at(joined, document_Q, of_text[query_Q])
        if (joined == least).all():
            return ids[least[document_M]]
        least = joined


@dataclass(frozen=True)
class _Texts:
    """All texts of a global batch as every rank knows them, rank by rank, queries first."""

    lengths: np.ndarray
    ids: np.ndarray
    is_query: np.ndarray
    query: np.ndarray  # number among all texts of the query that a text is, or was read with
    scores: np.ndarray
    reader: np.ndarray  # the rank that read it

    @classmethod
    def of_all_ranks(cls, batch: RankBatch, world: int, group: dist.ProcessGroup | None) -> _Texts:
        queries = np.arange(batch.num_queries)
        lengths = batch.rows.lengths
        scores = np.full(len(lengths), np.nan)
        scores[len(queries) :] = batch.scores.numpy()
        own = np.stack(
            (
                lengths,
                np.concatenate((batch.query_ids.numpy(), batch.document_ids.numpy())),
                np.arange(len(lengths)) < len(queries),
                np.concatenate((queries, queries, batch.negatives_of.numpy())),
                scores.view(np.int64),  # bit by bit: everything travels as one array of integers
            )
        )
        sizes = np.array([own.shape[1]])
        if world > 1:
            sizes = _gathered(sizes, world, group)[:, 0]
            padded = np.zeros((len(own), sizes.max()), np.int64)
            padded[:, : own.shape[1]] = own
            everybody = _gathered(padded.ravel(), world, group).reshape(world, len(own), -1)
            parts = [part[:, :n] for part, n in zip(everybody, sizes, strict=True)]
            own = np.concatenate(parts, 1)
        reader = np.repeat(np.arange(world), sizes)
        lengths, ids, kinds, query, bits = np.ascontiguousarray(own)
        first = sizes.cumsum() - sizes
        return cls(
            lengths, ids, kinds.astype(bool), query + first[reader], bits.view(np.float64), reader
        )

    def positive_of_queries(self) -> np.ndarray:
        """The number of each query's document: the first B documents of a rank, in order."""
        num_ranks = int(self.reader.max()) + 1
        queries = np.bincount(self.reader[self.is_query], minlength=num_ranks)
        documents = np.bincount(self.reader[~self.is_query], minlength=num_ranks)
        first = documents.cumsum() - documents
        return np.concatenate([f + np.arange(n) for f, n in zip(first, queries, strict=True)])


def _gathered(own: np.ndarray, world: int, group: dist.ProcessGroup | None) -> np.ndarray:
    everybody = torch.empty(world * len(own), dtype=torch.int64)
    all_gather(everybody, torch.from_numpy(own), group=group)
    return everybody.numpy().reshape(world, -1)


def _dealt(lengths: np.ndarray, world: int) -> np.ndarray:
    """A rank for each text: longest first, forwards through the ranks and backwards in turn."""
    turn = np.arange(len(lengths))
    lap, seat = turn // world, turn % world
    rank = np.empty_like(turn)
    rank[np.argsort(-lengths, kind="stable")] = np.where(lap % 2, world - 1 - seat, seat)
    return rank


def _exchange(
    rows: Sequence[Row],
    texts: _Texts,
    holder: np.ndarray,
    rank: int,
    world: int,
    group: dist.ProcessGroup | None,
) -> dict[int, Row]:
    """Send each row to its holder; return the rows that arrived, by number among all texts."""
    own = np.flatnonzero(texts.reader == rank)
    leaving = np.argsort(holder[own], kind="stable")  # by holder, then by number
    arriving = np.flatnonzero(holder == rank)  # by reader, as numbers are
    sent = np.concatenate([np.asarray(rows[i], np.int32) for i in leaving])
    lengths = texts.lengths
    out_splits = np.bincount(holder[own], weights=lengths[own], minlength=world).astype(int)
    in_splits = np.bincount(
        texts.reader[arriving], weights=lengths[arriving], minlength=world
    ).astype(int)
    received = torch.empty(int(lengths[arriving].sum()), dtype=torch.int32)
    dist.all_to_all_single(
        received, torch.from_numpy(sent), in_splits.tolist(), out_splits.tolist(), group=group
    )
    pieces = received.split(lengths[arriving].tolist())
    return {int(i): piece.numpy() for i, piece in zip(arriving, pieces, strict=True)}
