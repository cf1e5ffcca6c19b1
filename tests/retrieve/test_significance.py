"""Against scipy, which implements the same methods on its own, and against simulations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from drama.retrieve.significance import LEVEL, Sample, estimate, holm, p_value


def skewed(seed: int, size: int, columns: int = 1) -> np.ndarray:
    """Values like those of nDCG: many zeros, some ones."""
    source = np.random.default_rng(seed)
    return np.round(source.beta(0.4, 0.5, size=(size, columns)), 2)


def sample(values: np.ndarray, name: str = "set", draws: int = 10_000) -> Sample:
    return Sample.of(values.reshape(len(values), -1), name, draws=draws)


@pytest.mark.parametrize(("seed", "size"), [(0, 30), (1, 100), (2, 300)])
def test_the_interval_equals_scipys_bca(seed: int, size: int):
    values = skewed(seed, size)[:, 0] ** 3
    found = estimate([sample(values)], 0)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", confidence_level=LEVEL,
        rng=np.random.default_rng(9),
    ).confidence_interval  # fmt: skip
    spread = values.std() / np.sqrt(size)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(theirs.low, abs=0.07 * spread)  # both are drawn
    assert found.high == pytest.approx(theirs.high, abs=0.07 * spread)
    # it is not the symmetric interval of the normal law: that lies further off
    assert abs(theirs.high - (values.mean() + 1.96 * spread)) > 0.07 * spread or size > 50


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    truth = 0.4 / 0.9  # of a beta(0.4, 0.5)
    source = np.random.default_rng(4)
    trials = source.beta(0.4, 0.5, size=(60, 600))
    drawn = sample(trials, draws=1000)  # each column is one trial
    found = [estimate([drawn], column) for column in range(trials.shape[1])]
    share = np.mean([e.low <= truth <= e.high for e in found])
    # three standard errors of a share of 600
    assert share == pytest.approx(LEVEL, abs=3 * (LEVEL * (1 - LEVEL) / 600) ** 0.5)


def test_the_interval_of_a_mean_over_datasets():
    """Its width is that of independent means averaged: the root of the summed variances."""
    sets = [skewed(seed, size)[:, 0] for seed, size in ((0, 400), (1, 250), (2, 900))]
    found = estimate([sample(x, f"set {i}") for i, x in enumerate(sets)], 0)
    assert found.value == pytest.approx(np.mean([x.mean() for x in sets]))
    spread = np.sqrt(sum(x.var() / len(x) for x in sets)) / len(sets)
    assert found.low == pytest.approx(found.value - 1.96 * spread, abs=0.1 * spread)
    assert found.high == pytest.approx(found.value + 1.96 * spread, abs=0.1 * spread)


def test_the_p_value_equals_all_sign_flips_counted():
    values = np.array([0.5, 0.3, -0.1, 0.2, 0.0, 0.4, 0.25, -0.05, 0.1, 0.3])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(values))))
    exact = np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12)
    assert p_value([sample(values)], 0) == pytest.approx(exact, abs=4 * (exact / 10_000) ** 0.5)


def test_the_p_value_equals_scipys():
    values = skewed(3, 60, 2)
    difference = values[:, 0] - values[:, 1]
    theirs = scipy.stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=20_000,
        rng=np.random.default_rng(5),
    ).pvalue  # fmt: skip
    assert 0.01 < theirs < 0.9
    assert p_value([sample(difference)], 0) == pytest.approx(theirs, abs=0.02)


def test_p_values_are_even_where_nothing_differs():
    source = np.random.default_rng(6)
    trials = source.beta(0.4, 0.5, size=(50, 500)) - source.beta(0.4, 0.5, size=(50, 500))
    drawn = sample(trials, draws=1000)
    p = np.array([p_value([drawn], column) for column in range(trials.shape[1])])
    for level in (0.05, 0.2, 0.5):
        assert np.mean(p <= level) == pytest.approx(
            level, abs=3.5 * (level * (1 - level) / 500) ** 0.5
        )


@pytest.mark.parametrize("seed", [7, 8])
def test_the_p_value_of_a_mean_over_datasets(seed: int):
    """That of the normal law, which the sum of 12 x 80 differences follows."""
    source = np.random.default_rng(seed)
    sets = [source.normal(0.03, 0.25, 80) for _ in range(12)]
    drawn = [sample(values, f"set {i}") for i, values in enumerate(sets)]
    spread = np.sqrt(sum((x**2).mean() / len(x) for x in sets)) / len(sets)
    z = np.mean([x.mean() for x in sets]) / spread
    assert p_value(drawn, 0) == pytest.approx(2 * scipy.stats.norm.sf(z), abs=0.01)
    assert min(p_value([one], 0) for one in drawn[:5]) > 0.01


def test_systems_of_a_dataset_are_resampled_together():
    values = skewed(8, 100, 2)
    drawn = sample(np.column_stack([values, values[:, 0] - values[:, 1]]))
    np.testing.assert_allclose(
        drawn.means_RC[:, 2], drawn.means_RC[:, 0] - drawn.means_RC[:, 1], atol=1e-12
    )


def test_draws_depend_on_seed_and_name_alone():
    values = skewed(9, 50, 3)
    alone = sample(values[:, :1]).means_RC[:, 0]
    np.testing.assert_allclose(alone, sample(values).means_RC[:, 0], atol=1e-12)
    assert not np.array_equal(sample(values).means_RC, sample(values, "other").means_RC)
    other = Sample.of(values, "set", seed=1)
    assert not np.array_equal(sample(values).means_RC, other.means_RC)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_queries_that_all_score_alike(value: float):
    drawn = sample(np.full(30, value))
    found = estimate([drawn], 0)
    assert (found.low, found.high) == (found.value, found.value) == pytest.approx((value, value))
    assert p_value([sample(np.zeros(30))], 0) == 1.0


def test_one_query():
    found = estimate([sample(np.array([0.3]))], 0)
    assert (found.low, found.value, found.high) == pytest.approx((0.3, 0.3, 0.3))


def test_holm_done_by_hand():
    """Ordered: .01 * 4, .02 * 3, .03 * 2, .04 * 1, and never below the one before."""
    p = {"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02}
    expected = {"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06}
    assert holm(p) == pytest.approx(expected)
    assert list(holm(p)) == list(p)
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
