"""The texts of a recovery: one rank's batches, weights of sources that follow losses, and the
held-out texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from drama.console import console
from drama.data.mixture import Mixture, training_order
from drama.data.order import LaneOrder
from drama.data.remote import PieceCache
from drama.data.stream import ShardSet
from drama.data.texts import RankTexts, TextBatch
from drama.distributed import Ranks
from drama.errors import UserError
from drama.loading import check_held_out, check_lanes_feed, load_ahead
from drama.prune.domains import DomainWeights
from drama.prune.recovery_recipe import RecoveryRecipe
from drama.tokenizer import TextEncoder


class _Listed:
    """The order of one batch: these records."""

    batches_per_epoch = 1

    def __init__(self, index_B: np.ndarray) -> None:
        self.index_B = index_B

    def rank_records(self, step: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        own = self.index_B[rank::world_size]
        return own, np.zeros_like(own)


def _spread(shards: ShardSet, most: int) -> np.ndarray:
    """Record numbers evenly spread, as sources lie one after another; of a rare source some more
    than its share."""
    chosen = [np.arange(most) * len(shards) // most]
    source_N = shards.source_numbers(np.arange(len(shards)))
    least = max(1, most // (4 * len(shards.sources)))
    for source in range(len(shards.sources)):
        own = np.flatnonzero(source_N == source)
        if np.isin(chosen[0], own).sum() < least:
            chosen.append(own[np.arange(least) * len(own) // least])
    return np.unique(np.concatenate(chosen))


class Texts:
    """What one rank reads.

    held_out: its part of the held-out texts, tokenised once; None without any. judge: which these
    are.

    Raises:
        UserError: shards that do not fit the recipe or the ranks, held-out ones that are trained
            on.
    """

    def __init__(self, recipe: RecoveryRecipe, encoder: TextEncoder, ranks: Ranks) -> None:
        self.recipe, self.encoder, self.ranks = recipe, encoder, ranks
        data = recipe.data
        check_lanes_feed(data.lanes, ranks.world_size)
        self.shards = self._open(data.shards)
        self.order = self._order(data.weights)
        self.batches = self._texts(self.shards, self.order, seed=recipe.seed)
        self.sources = self.batches.sources
        self.domains: DomainWeights | None = None
        self.held_out: TextBatch | None = None
        self.held_out_sources: list[str] = []
        self.judge: dict[str, Any] = {}
        if recipe.eval.shards:
            self._hold_out()
        if data.update_every:
            self._check_updates()

    # -- reading ------------------------------------------------------------------------------

    def load(self, first: int, stop: int) -> Iterator[TextBatch]:
        """The batches of these steps; each with the weights that hold when it is asked for."""
        every = self.recipe.data.update_every or stop
        while first < stop:
            until = min(stop, (first // every + 1) * every)
            yield from load_ahead(self.batches, range(first, until), self.recipe.data.workers)
            first = until

    def _open(self, folders: list[Any]) -> ShardSet:
        data = self.recipe.data
        return ShardSet(folders, PieceCache(data.cache, int(data.cache_gb * 2**30)))

    def _order(self, weights: Mapping[str, float]) -> LaneOrder | Mixture:
        data = self.recipe.data
        return training_order(
            self.shards,
            batch_size=self.recipe.train.batch_texts,
            seed=self.recipe.seed,
            weights=weights,
            one_source=False,
            language_alpha=data.language_alpha,
            lanes=data.lanes,
            block=data.block,
            window=data.window,
        )

    def _texts(self, shards: ShardSet, order: Any, *, seed: int) -> RankTexts:
        return RankTexts(
            shards,
            order,
            self.encoder,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=seed,
            max_tokens=self.recipe.data.length,
            on_bad=self.recipe.data.on_bad,
        )

    def _hold_out(self) -> None:
        chosen = self.recipe.eval
        check_held_out(chosen.shards, self.shards)
        shards = self._open(chosen.shards)
        order = _Listed(_spread(shards, chosen.max_texts))
        texts = self._texts(shards, order, seed=0)  # the same windows, whatever the run's seed
        self.held_out, self.held_out_sources = texts[0], texts.sources
        for bad in self.held_out.bad:
            console.print(f"eval: left out: {bad.message}", markup=False)
        self.judge = {
            "shards": shards.sha256,
            "max_texts": chosen.max_texts,
            "length": self.recipe.data.length,
        }

    # -- weights that follow the losses ---------------------------------------------------------

    def _check_updates(self) -> None:
        unknown = [name for name in self.sources if name not in self.held_out_sources]
        if unknown:
            raise UserError(
                f"data.update_every: source {unknown[0]} has no held-out texts in eval.shards "
                f"(those have {', '.join(self.held_out_sources)}); shard some under that name"
            )
        for name, records in self._records().items():
            if records < self.recipe.train.batch_texts:
                raise UserError(
                    f"data.update_every may give a source a whole batch, but {name} has "
                    f"{records:,} records, fewer than train.batch_texts "
                    f"{self.recipe.train.batch_texts:,}; lower that, or set data.update_every 0"
                )

    def _records(self) -> dict[str, int]:
        counts = dict.fromkeys(self.sources, 0)
        for shard in self.shards.shards:
            counts[shard.source or "(none)"] += shard.records
        return counts

    def follow(self, reference: Mapping[str, float]) -> None:
        """From the first step on let the weights follow how far each source is from its reference,
        nats a token.

        Raises:
            UserError: a source whose held-out texts say nothing.
        """
        if silent := [name for name in self.sources if name not in reference]:
            raise UserError(
                f"eval.shards: no held-out text of source {silent[0]} has two tokens; give longer "
                "ones"
            )
        order = self.order
        if isinstance(order, Mixture):
            names = [group.name for group in order.groups]
            shares = dict(zip(names, order.shares_G.tolist(), strict=True))
        else:
            shares = {name: float(count) for name, count in self._records().items()}
        self.domains = self._weights(reference, shares)
        self._reorder(None, 0)

    def _weights(
        self, reference: Mapping[str, float], shares: Mapping[str, float] | None = None
    ) -> DomainWeights:
        data = self.recipe.data
        return DomainWeights(
            self.sources, reference, weights=shares, clip=data.clip_gaps, floor=data.floor
        )

    @property
    def is_mixed(self) -> bool:
        """Whether sources are drawn by weight, so that the checkpoint holds their positions."""
        return bool(self.recipe.data.update_every) or isinstance(self.order, Mixture)

    def observe(self, sums_S: Sequence[float], counts_S: Sequence[int]) -> None:
        """Count a step's cross-entropy and predictions by source."""
        if self.domains is not None:
            for name, loss, count in zip(self.sources, sums_S, counts_S, strict=True):
                self.domains.observe(name, loss, count)

    def update(self, done: int) -> None:
        """Set new weights after so many steps, where the recipe says so."""
        every = self.recipe.data.update_every
        if self.domains is not None and done % every == 0:
            assert isinstance(self.order, Mixture)
            self.domains.update()
            self._reorder(self.order.state(done), done)

    def _reorder(self, state: Mapping[str, Any] | None, step: int) -> list[str]:
        if self.domains is not None:
            named = {"" if n == "(none)" else n: w for n, w in self.domains.weights.items()}
            self.order = self._order(named)
            self.batches.order = self.order
        if state is not None and isinstance(self.order, Mixture):
            return self.order.resume(state, step)
        return []

    # -- a checkpoint's part ------------------------------------------------------------------

    def state(self, done: int) -> dict[str, Any]:
        """Plain values; the position of an order without a mixture is the step."""
        return {
            "order": self.order.state(done) if isinstance(self.order, Mixture) else None,
            "domains": self.domains.state() if self.domains else None,
        }

    def resume(self, state: Mapping[str, Any], step: int) -> list[str]:
        """Go on from what `state` gave; return what is not as it was."""
        if state["domains"] is not None and self.recipe.data.update_every:
            before = set(state["domains"]["weights"])
            if before != set(self.sources):
                raise UserError(
                    "data.shards: this run's sources were "
                    f"{', '.join(sorted(before))}, now they are {', '.join(self.sources)}, and "
                    "data.update_every weighs what it began with; give another output"
                )
            self.domains = self._weights(state["domains"]["reference"])
            self.domains.load(state["domains"])
        return self._reorder(state["order"], step)
