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
