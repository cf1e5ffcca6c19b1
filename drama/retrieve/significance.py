"""How sure a mean over queries is, and whether two systems differ: resampling over queries.

* Intervals: the bias-corrected and accelerated bootstrap (Efron 1987, "Better bootstrap confidence
  intervals"). Queries are drawn with replacement inside each dataset; an average over datasets is
  the plain mean of their means, so its bootstrap is stratified by dataset.
* Differences: the paired randomisation test (Fisher; Smucker, Allan, Carterette 2007, "A comparison
  of statistical significance tests for information retrieval evaluation"): under the hypothesis of
  no difference each query's difference may as well have the other sign.
* Many tests of one metric are corrected together (Holm 1979).

All systems of a dataset share its draws, so differences are paired too. The draws depend on the
seed and the dataset's name alone.

Q queries, C columns (one a figure), R draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
CELLS = 4_000_000  # of a block of draws
TINY = 1e-12  # sums of equal numbers in another order differ by less

K = TypeVar("K", bound=Hashable)
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Sample:
    """Columns of per-query values of one dataset, with the means of their resamples.

    `flipped_RC` holds the means with random signs: a test of the columns against 0.
    """

    values_QC: np.ndarray
    means_RC: np.ndarray
    flipped_RC: np.ndarray

    @classmethod
    def of(cls, values_QC: np.ndarray, name: str, seed: int = 0, draws: int = DRAWS) -> Sample:
        """Draw for a dataset's values."""
        values_QC = np.asarray(values_QC, np.float64)
        source = np.random.default_rng([seed, zlib.crc32(name.encode())])
        means_RC = np.concatenate(
            [_drawn(values_QC, num, source) for num in _blocks(values_QC, draws)]
        )
        flipped = [_flipped(values_QC, num, source) for num in _blocks(values_QC, draws)]
        return cls(values_QC, means_RC, np.concatenate(flipped))


@dataclass(frozen=True)
class Estimate:
    """A mean, and the interval that holds the true one with `LEVEL` confidence."""

    value: float
    low: float
    high: float


def estimate(samples: Sequence[Sample], column: int) -> Estimate:
    """The mean over datasets of a column's means over queries, and its interval."""
    columns = [sample.values_QC[:, column] for sample in samples]
    point = float(np.mean([values_Q.mean() for values_Q in columns]))
    means_R = np.mean([sample.means_RC[:, column] for sample in samples], axis=0)
    # what each query adds to the average: the empirical influence function
    influence = np.concatenate([(x - x.mean()) / (len(x) * len(columns)) for x in columns])
    return Estimate(point, *_bca(point, means_R, influence))


def p_value(samples: Sequence[Sample], column: int) -> float:
    """How often random signs give a mean at least as far from 0 as the observed one, two-sided.

    The observed signs count as one of the draws, so it is never 0.
    """
    point = np.mean([sample.values_QC[:, column].mean() for sample in samples])
    flipped_R = np.mean([sample.flipped_RC[:, column] for sample in samples], axis=0)
    as_far = np.count_nonzero(np.abs(flipped_R) >= abs(point) - TINY)
    return float((1 + as_far) / (1 + len(flipped_R)))


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """Step-down corrected p values: below a level where the family-wise error rate is."""
    ordered = sorted(p_values, key=lambda key: p_values[key])
    corrected: dict[K, float] = {}
    highest = 0.0
    for rank, key in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * p_values[key]))
        corrected[key] = highest
    return {key: corrected[key] for key in p_values}


def _bca(point: float, means_R: np.ndarray, influence: np.ndarray) -> tuple[float, float]:
    squares = float(np.square(influence).sum())
    if squares < TINY**2:
        return point, point  # all queries score alike: nothing to resample
    below = np.count_nonzero(means_R < point - TINY) + np.count_nonzero(means_R <= point + TINY)
    draws = len(means_R)
    share = min(max(below / (2 * draws), 1 / (draws + 1)), draws / (draws + 1))
    bias = _NORMAL.inv_cdf(share)
    acceleration = float((influence**3).sum()) / (6 * squares**1.5)
    shares = []
    for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
        shifted = bias + _NORMAL.inv_cdf(tail)
        shares.append(_NORMAL.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = np.quantile(means_R, shares)
    return float(low), float(high)


def _drawn(values_QC: np.ndarray, num: int, source: np.random.Generator) -> np.ndarray:
    """Means [num, C] of `num` resamples of the queries."""
    size = len(values_QC)
    rows = source.integers(size, size=(num, size)) + size * np.arange(num)[:, None]
    counts = np.bincount(rows.ravel(), minlength=num * size).reshape(num, size)
    means: np.ndarray = counts.astype(np.float64) @ values_QC / size
    return means


def _flipped(values_QC: np.ndarray, num: int, source: np.random.Generator) -> np.ndarray:
    """Means [num, C] with a random sign for each query."""
    signs = source.integers(2, size=(num, len(values_QC)), dtype=np.int8) * 2.0 - 1
    means: np.ndarray = signs @ values_QC / len(values_QC)
    return means


def _blocks(values_QC: np.ndarray, draws: int) -> list[int]:
    size = max(1, CELLS // len(values_QC))
    return [min(size, draws - start) for start in range(0, draws, size)]
