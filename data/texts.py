"""From shards to one rank's share of a global batch of texts, for training language models.

B texts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from drama.data.draws import draw_documents
from drama.data.manifest import TokenSettings
from drama.data.packing import Row, TokenRows
from drama.data.reading import BadRecord, Order, RankDataset
from drama.data.records import Record
from drama.data.stream import ShardSet
from drama.data.tokens import TokenRecords
from drama.errors import UserError
from drama.tokenizer import TextEncoder

WINDOW_DRAW = 1  # last word of a window's seed; not 0, which would be no word of its own
WHOLE = sys.maxsize  # a limit in tokens that cuts nothing


@dataclass
class TextBatch:
    """One rank's share of a global batch of texts: a token row of each, at least 2 tokens long.

    source_B: number of each text's source in `RankTexts.sources`. index_B: record numbers. epoch_B:
    epochs. All int64. bad: records left out.
    """

    rows: TokenRows
    source_B: Tensor
    index_B: Tensor
    epoch_B: Tensor
    bad: list[BadRecord] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return int(self.rows.lengths.sum())


class RankTexts(RankDataset[TextBatch]):
    """Texts of an endless run, for one rank; see `RankDataset`.

    Any shards serve: a text gives its document, a pair one of its positives, drawn anew each epoch.
    A document of at most `max_tokens` is whole, EOS last; a longer one gives `max_tokens` tokens in
    a row (BOS in front where the tokenizer has one), from a place that is drawn anew each epoch. A
    document of fewer than 2 tokens, which leave nothing to predict, is left out, so a batch may be
    shorter than its share, even empty.

    Token ids that the shards hold end where `drama shard --max-tokens` has cut them (EOS last), so
    windows come out of the stored part. They are used if that is at least `max_tokens` long.

    sources: names of the shards' sources, sorted.

    Raises:
        UserError: `max_tokens` below 2.
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
        max_tokens: int,
        on_bad: Literal["stop", "skip"] = "stop",
    ) -> None:
        if max_tokens < 2:
            raise UserError(f"max_tokens is {max_tokens}; a text needs at least 2 to predict one")
        super().__init__(
            shards,
            order,
            tokenize,
            rank=rank,
            world_size=world_size,
            seed=seed,
            max_tokens=max_tokens,
            on_bad=on_bad,
        )
        self.max_tokens = max_tokens
        *front, _ = tokenize.tokenizer.backend_tokenizer.encode("").ids
        self._front = np.array(front, np.int64)  # BOS, where the tokenizer has one
        self.sources = shards.sources

    def __getitem__(self, step: int) -> TextBatch:
        rows: Sequence[Row] = []
        if self.no_tokens:
            records, indices, epochs, bad = self._read(step, self.shards.read)
            if records:
                rows = self._tokenised(records, indices, epochs)
        else:
            members, indices, epochs, bad = self._read(step, self.shards.read_token_member)
            if members:
                rows = self._stored(TokenRecords(members), indices, epochs)
        kept = np.flatnonzero([len(row) > 1 for row in rows])
        indices, epochs = indices[kept], epochs[kept]
        windows = [
            self._window(rows[place], index, epoch)
            for place, index, epoch in zip(
                kept.tolist(), indices.tolist(), epochs.tolist(), strict=True
            )
        ]
        return TextBatch(
            TokenRows.of(windows),
            torch.from_numpy(self.shards.source_numbers(indices)),
            torch.from_numpy(indices.astype(np.int64)),
            torch.from_numpy(epochs.astype(np.int64)),
            bad,
        )

    def _tokenised(
        self, records: Sequence[Record], indices: np.ndarray, epochs: np.ndarray
    ) -> Sequence[Row]:
        drawn_B = self._drawn(np.array([len(r.positives) for r in records]), indices, epochs)
        texts = [r.positives[i].full_text for r, i in zip(records, drawn_B, strict=True)]
        return self.tokenize(texts, "document", WHOLE)[0]

    def _stored(
        self, records: TokenRecords, indices: np.ndarray, epochs: np.ndarray
    ) -> Sequence[Row]:
        row_B = 1 + self._drawn(records.positives_B, indices, epochs)
        own_B = np.arange(len(records))
        eos = self.tokenize.tokenizer.eos_token_id
        tokens, lengths, _ = records.rows(own_B, row_B, np.full(len(own_B), WHOLE), eos)
        return TokenRows(tokens, lengths)

    def _drawn(
        self, positives_B: np.ndarray, indices: np.ndarray, epochs: np.ndarray
    ) -> np.ndarray:
        none_B = np.zeros_like(positives_B)
        return draw_documents(self.seed, epochs, indices, positives_B, none_B, 0).positive_B

    def _window(self, row: Row, index: int, epoch: int) -> Row:
        """`max_tokens` tokens of a longer row, from a place that depends on seed, epoch and record
        only; what the tokenizer puts in front of a text stands in front of a window too. The place
        is a raw word of Philox, which numpy keeps the same in every version."""
        if len(row) <= self.max_tokens:
            return row
        seeds = np.random.SeedSequence([self.seed, epoch, index, WINDOW_DRAW])
        word = int(np.random.Philox(seeds).random_raw())
        start = word % (len(row) - self.max_tokens + 1)
        first = start + len(self._front) if start else 0
        rest = np.asarray(row[first : start + self.max_tokens], np.int64)
        return np.concatenate((self._front, rest)) if start else rest

    def _same_prefixes(self, tokens: TokenSettings) -> bool:
        return tokens.document_prefix == self.tokenize.document_prefix  # no query is read
