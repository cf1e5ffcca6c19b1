"""Which domain the next batches come from: dynamic weights after Sheared LLaMA.

After Xia et al. 2023 (arXiv 2310.06694, section 2.2): a domain whose loss is still far from what it
was before pruning gets more of the batch,

    w_i <- w_i exp(gap_i) / sum,   gap_i = max(loss_i - reference_i, 0),

then is mixed with a small uniform share. The released code leaves the max out, so that a domain
that is already better than its reference shrinks; both are here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


class DomainWeights:
    """Weights of domains, summing to 1, from the losses of the batches that were drawn.

    weights: to begin with, any scale; default equal. reference: nats per token of every domain
    before pruning.
    """

    def __init__(
        self,
        names: Sequence[str],
        reference: Mapping[str, float],
        *,
        weights: Mapping[str, float] | None = None,
        clip: bool = True,
        floor: float = 1e-4,
    ) -> None:
        start = {name: (weights or {}).get(name, 1.0) for name in names}
        total = sum(start.values())
        self.weights = {name: weight / total for name, weight in start.items()}
        self.reference, self.clip, self.floor = dict(reference), clip, floor
        self._gaps: dict[str, float] = {}
        self._sums = dict.fromkeys(names, 0.0)
        self._counts = dict.fromkeys(names, 0)

    def observe(self, name: str, loss_sum: float, rows: int) -> None:
        """Count rows of a domain, and the sum of their losses, since the last update."""
        self._sums[name] += loss_sum
        self._counts[name] += rows

    def update(self) -> dict[str, float]:
        """New weights from what was observed since the last update.

        A domain that no batch drew from keeps its last gap; one never seen is taken for average.
        """
        for name, count in self._counts.items():
            if count:
                gap = self._sums[name] / count - self.reference[name]
                self._gaps[name] = max(gap, 0.0) if self.clip else gap
        if self._gaps:
            mean = sum(self._gaps.values()) / len(self._gaps)
            logs = {n: math.log(w) + self._gaps.get(n, mean) for n, w in self.weights.items()}
            top = max(logs.values())
            grown = {name: math.exp(x - top) for name, x in logs.items()}
            total, uniform = sum(grown.values()), self.floor / len(grown)
            self.weights = {n: (1 - self.floor) * x / total + uniform for n, x in grown.items()}
        self._sums = dict.fromkeys(self._sums, 0.0)
        self._counts = dict.fromkeys(self._counts, 0)
        return self.weights

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "weights": self.weights,
            "reference": self.reference,
            "gaps": self._gaps,
            "sums": self._sums,
            "counts": self._counts,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.weights, self.reference = dict(state["weights"]), dict(state["reference"])
        self._gaps, self._sums = dict(state["gaps"]), dict(state["sums"])
        self._counts = dict(state["counts"])
