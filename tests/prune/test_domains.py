from __future__ import annotations

import json
import math

import pytest

from drama.prune.domains import DomainWeights

NAMES = ["a", "b", "c"]
REFERENCE = {"a": 2.0, "b": 3.0, "c": 1.0}


def test_weights_grow_with_the_gap_to_the_reference() -> None:
    """By hand: gaps 1, 0.5 and -0.4, the last one clipped or not."""
    for clip, last in ((True, 0.0), (False, -0.4)):
        domains = DomainWeights(
            NAMES, REFERENCE, weights={"a": 1, "b": 2, "c": 1}, clip=clip, floor=0.06
        )
        assert domains.weights == {"a": 0.25, "b": 0.5, "c": 0.25}
        domains.observe("a", 5.0, 2)
        domains.observe("a", 4.0, 1)
        domains.observe("b", 3.5, 1)
        domains.observe("c", 1.2, 2)
        grown = [0.25 * math.exp(1.0), 0.5 * math.exp(0.5), 0.25 * math.exp(last)]
        expected = [0.94 * x / sum(grown) + 0.02 for x in grown]
        assert list(domains.update().values()) == pytest.approx(expected, rel=1e-12)
        assert sum(domains.weights.values()) == pytest.approx(1, rel=1e-12)


def test_a_domain_that_was_not_drawn_is_never_nan() -> None:
    domains = DomainWeights(NAMES, REFERENCE, floor=0.0)
    domains.observe("a", 3.0, 1)
    domains.observe("b", 4.0, 1)
    domains.observe("c", 0.0, 0)
    weights = domains.update()  # c was never seen: as the average of the others, which is 1
    assert list(weights.values()) == pytest.approx([1 / 3] * 3)
    domains.observe("c", 2.5, 1)
    domains.update()  # a and b keep their last gap of 1, c has 1.5
    grown = [math.exp(1), math.exp(1), math.exp(1.5)]
    assert list(domains.weights.values()) == pytest.approx([x / sum(grown) for x in grown])
    before = dict(DomainWeights(NAMES, REFERENCE).weights)
    assert DomainWeights(NAMES, REFERENCE).update() == before  # nothing seen at all


def test_huge_gaps_do_not_overflow() -> None:
    domains = DomainWeights(["a", "b"], {"a": 0.0, "b": 0.0}, floor=1e-4)
    domains.observe("a", 5000.0, 1)
    domains.observe("b", 1.0, 1)
    for _ in range(3):
        domains.update()
    assert domains.weights["a"] == pytest.approx(1 - 5e-5)
    assert domains.weights["b"] == pytest.approx(5e-5)


def test_state_goes_through_json_and_goes_on_the_same() -> None:
    domains = DomainWeights(NAMES, REFERENCE)
    domains.observe("a", 7.0, 2)
    domains.update()
    domains.observe("b", 7.0, 2)
    other = DomainWeights(NAMES, dict.fromkeys(NAMES, 0.0))
    other.load(json.loads(json.dumps(domains.state())))
    assert other.update() == domains.update()
