"""What every kind of batch shares: one rank's records of a step, read in the order of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from drama.data.manifest import DAMAGED, TokenSettings
from drama.data.stream import ShardSet
from drama.errors import UserError
from drama.tokenizer import TextEncoder, tokenizer_sha256

T = TypeVar("T")
Batch = TypeVar("Batch", covariant=True)


@dataclass(frozen=True)
class BadRecord:
    """A record that was left out of a batch: its number, a short reason, the whole message."""

    index: int
    reason: str
    message: str


class Order(Protocol):
    """Which records a step takes: a function of the step alone, whatever the world size."""

    batches_per_epoch: int

    def rank_records(
        self, step: int, rank: int, world_size: int
    ) -> tuple[np.ndarray, np.ndarray]: ...


class RankDataset(Dataset[Batch]):
    """Batch `i` of an endless run, for one rank: a pure function of (seed, i).

    A map-style dataset, so a DataLoader over `range(start, stop)` reads, tokenises and resumes with
    any number of workers and gives the same batches. Token ids that the shards hold are used if
    they are what tokenising would give; `no_tokens` says why they are not.

    Args:
        on_bad: a damaged record ends the run, or is left out and reported in the batch.
        max_tokens: of the longest text that is asked for.
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
        on_bad: Literal["stop", "skip"],
    ) -> None:
        self.shards, self.order, self.tokenize = shards, order, tokenize
        self.rank, self.world_size, self.seed, self.on_bad = rank, world_size, seed, on_bad
        self.no_tokens = self._no_tokens(max_tokens)

    def _read(
        self, step: int, read: Callable[[int], T]
    ) -> tuple[list[T], np.ndarray, np.ndarray, list[BadRecord]]:
        """What was read for a step, the record numbers of it and their epochs, and the others."""
        indices, epochs = self.order.rank_records(step, self.rank, self.world_size)
        if self.shards.is_remote:
            info = get_worker_info()
            after = step + (info.num_workers if info else 1)
            self.shards.prefetch(self.order.rank_records(after, self.rank, self.world_size)[0])
        found: list[T] = []
        kept: list[int] = []
        bad: list[BadRecord] = []
        for place, index in enumerate(indices.tolist()):
            try:
                found.append(read(index))
                kept.append(place)
            except UserError as error:
                # a server that is away or a full disk would else empty the batches
                if self.on_bad == "stop" or error.reason != DAMAGED:
                    raise
                bad.append(BadRecord(index, error.reason, str(error)))
        return found, indices[kept], epochs[kept], bad

    def record_ids(self, step: int) -> list[dict[str, Any]]:
        """Which records a step has here: place in the shards, query id, source; reads them."""
        records, indices, epochs, _ = self._read(step, self.shards.read)
        return [
            {"record": index, "epoch": epoch, "query_id": record.query_id, "source": record.source}
            for record, index, epoch in zip(records, indices.tolist(), epochs.tolist(), strict=True)
        ]

    def _no_tokens(self, max_tokens: int) -> str:
        tokens = self.shards.tokens
        if tokens is None:
            if any(manifest.tokens for manifest in self.shards.manifests):
                return "the folders of shards do not all hold token ids made in one way"
            return "the shards hold no token ids"
        if tokens.tokenizer_sha256 != tokenizer_sha256(self.tokenize.tokenizer):
            return "the shards hold token ids of another tokenizer"
        if not self._same_prefixes(tokens):
            return "the shards' token ids were made with other prefixes"
        if tokens.max_tokens < max_tokens:
            return f"the shards' token ids were cut at {tokens.max_tokens}"
        return ""

    def _same_prefixes(self, tokens: TokenSettings) -> bool:
        return (tokens.query_prefix, tokens.document_prefix) == (
            self.tokenize.query_prefix,
            self.tokenize.document_prefix,
        )
