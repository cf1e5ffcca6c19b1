"""The token ids of a record, stored beside its JSON so that training tokenises nothing.

Member `KEY.tok`, little-endian, for a record of P positives and N negatives, D = P + N:

    uint32 P, N; uint32 whether scores follow; uint32 0
    int64  [1 + D]  ids of the query's text and of the documents' texts
    float64 [D]     a teacher's scores, NaN where there is none (only if they follow)
    uint32 [1 + D]  tokens of the query and of each document
    uint32 [...]    the token ids, one text after the other, prefix and EOS included
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drama.data.members import TAR_BLOCK
from drama.data.records import Record, content_id, document_hash64, query_hash64

_HEAD = struct.Struct("<IIII")


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A record as numbers. Rows: the query, the positives, the negatives.

    ids: int64 [1 + D]. scores: float64 [D] or None. lengths: int64 [1 + D]. tokens: uint32.
    """

    num_positives: int
    num_negatives: int
    ids: np.ndarray
    scores: np.ndarray | None
    lengths: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, record: Record, rows: Sequence[Sequence[int]]) -> TokenRecord:
        """A record and its token rows, the query's first."""
        documents = (*record.positives, *record.negatives)
        ids = [document_hash64(content_id(d.title, d.text)) for d in documents]
        scores = None
        if record.scores is not None:
            scores = np.array([record.scores.get(d.id, math.nan) for d in documents], "<f8")
        return cls(
            len(record.positives),
            len(record.negatives),
            np.array([query_hash64(record.query), *ids], "<i8"),
            scores,
            np.array([len(row) for row in rows], np.int64),
            np.array([token for row in rows for token in row], "<u4"),
        )

    def to_bytes(self) -> bytes:
        """The payload of the member; `from_bytes` gives the same back."""
        head = _HEAD.pack(self.num_positives, self.num_negatives, self.scores is not None, 0)
        scores = b"" if self.scores is None else self.scores.tobytes()
        lengths = self.lengths.astype("<u4").tobytes()
        return b"".join((head, self.ids.tobytes(), scores, lengths, self.tokens.tobytes()))

    @classmethod
    def from_bytes(cls, payload: bytes | memoryview) -> TokenRecord:
        """Parse a payload whose checksum was compared."""
        positives, negatives, has_scores, _ = _HEAD.unpack_from(payload)
        documents = positives + negatives
        at = _HEAD.size
        ids = np.frombuffer(payload, "<i8", 1 + documents, at)
        at += 8 * (1 + documents)
        scores = None
        if has_scores:
            scores = np.frombuffer(payload, "<f8", documents, at)
            at += 8 * documents
        lengths = np.frombuffer(payload, "<u4", 1 + documents, at).astype(np.int64)
        at += 4 * (1 + documents)
        tokens = np.frombuffer(payload, "<u4", -1, at)
        return cls(positives, negatives, ids, scores, lengths, tokens)

    def rows(self) -> list[np.ndarray]:
        """The token rows: query, positives, negatives."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])


class TokenRecords:
    """Tar members of B records as one array: rows of any of them are gathered without a loop.

    positives_B, negatives_B: int64, how many documents each record has.
    """

    def __init__(self, members: Sequence[bytes]) -> None:
        self._words = np.frombuffer(b"".join(members), "<u4")
        sizes = np.fromiter(map(len, members), np.int64, len(members))
        # in words; members are whole tar blocks, so whatever is 8 bytes wide lies on 8 bytes
        start_B = (np.cumsum(sizes) - sizes + TAR_BLOCK) // 4
        self.positives_B = self._words[start_B].astype(np.int64)
        self.negatives_B = self._words[start_B + 1].astype(np.int64)
        has_scores_B = self._words[start_B + 2].astype(np.int64)
        documents_B = self.positives_B + self.negatives_B
        self._ids_B = start_B + _HEAD.size // 4
        scores_B = self._ids_B + 2 * (1 + documents_B)
        self._scores_B = np.where(has_scores_B > 0, scores_B, -1)
        lengths_B = scores_B + 2 * documents_B * has_scores_B
        # over all rows of all records: length of each, and where its tokens start
        count_B = 1 + documents_B
        self._first_B = np.cumsum(count_B) - count_B
        within = np.arange(count_B.sum()) - np.repeat(self._first_B, count_B)
        self._lengths = self._words[np.repeat(lengths_B, count_B) + within].astype(np.int64)
        before = np.cumsum(self._lengths) - self._lengths
        tokens_B = lengths_B + count_B - before[self._first_B]
        self._starts = np.repeat(tokens_B, count_B) + before

    def __len__(self) -> int:
        return len(self.positives_B)

    def ids(self, of_X: np.ndarray, row_X: np.ndarray) -> np.ndarray:
        """Ids of rows `row_X` of the records `of_X`, int64 [X]."""
        return self._words.view("<i8")[self._ids_B[of_X] // 2 + row_X]

    def scores(self, of_X: np.ndarray, row_X: np.ndarray) -> np.ndarray:
        """Scores of documents (rows from 1 on), float64 [X], NaN where there is none."""
        at_X = self._scores_B[of_X]
        scores_X = np.full(len(of_X), np.nan)
        known = at_X >= 0
        scores_X[known] = self._words.view("<f8")[at_X[known] // 2 + row_X[known] - 1]
        return scores_X

    def rows(
        self, of_X: np.ndarray, row_X: np.ndarray, limit_X: np.ndarray, eos: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Token rows side by side, int32, their lengths int64 [X], and how many were cut.

        A row longer than its limit keeps the tokens before it and ends in `eos`.
        """
        at_X = self._first_B[of_X] + row_X
        full_X, starts_X = self._lengths[at_X], self._starts[at_X]
        lengths_X = np.minimum(full_X, limit_X)
        places = zip(starts_X.tolist(), (starts_X + lengths_X).tolist(), strict=True)
        # slices: an index for every token would be twice the tokens' own bytes
        tokens = np.concatenate([self._words[start:stop] for start, stop in places]).view(np.int32)
        cut_X = full_X > limit_X
        tokens[np.cumsum(lengths_X)[cut_X] - 1] = eos
        return tokens, lengths_X, int(cut_X.sum())
