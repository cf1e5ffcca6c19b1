"""Pauses and patience, by a clock of the test's own."""

from __future__ import annotations

from email.utils import formatdate

import pytest

from drama.augment.endpoint import Trouble, _seconds
from drama.augment.patience import Limits, Patience
from drama.errors import UserError

LIMITS = Limits(first_pause_s=1.0, max_pause_s=10.0, patience_s=100.0)


def patience() -> Patience:
    return Patience(LIMITS, "http://server/v1", "see to it")


def test_pauses_double_up_to_their_bound_and_differ() -> None:
    trouble = Trouble("HTTP 500")
    for failures, longest in [(1, 1.0), (2, 2.0), (4, 8.0), (5, 10.0), (5000, 10.0)]:
        pauses = {patience().pause(trouble, failures, 0.0) for _ in range(100)}
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
        assert len(pauses) > 50


def test_the_server_s_own_wish_holds_for_all() -> None:
    of_all = patience()
    assert of_all.pause(Trouble("HTTP 429", wait_s=40.0), 1, 1000.0) >= 40.0
    assert of_all.pause_until == 1040.0
    of_all.pause(Trouble("HTTP 429", wait_s=5.0), 1, 1001.0)
    assert of_all.pause_until == 1040.0


def test_patience_begins_with_the_trouble_and_ends_with_an_answer() -> None:
    of_all = patience()
    of_all.pause(Trouble("no connection"), 1, 1000.0)
    assert of_all.pause(Trouble("no connection"), 9, 1099.0) <= 1.0  # the last try comes in time
    of_all.is_well()
    of_all.pause(Trouble("no connection"), 1, 1200.0)
    with pytest.raises(UserError, match=r"http://server/v1 has given no answer for 100 s \(no con"):
        of_all.pause(Trouble("no connection"), 9, 1300.0)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("", 0.0), ("7", 7.0), ("-7", 0.0), ("soon", 0.0), ("nan", 0.0), ("inf", 0.0)],
)
def test_a_retry_after_is_read(header: str, seconds: float) -> None:
    assert _seconds(header) == seconds


def test_a_retry_after_may_be_a_date() -> None:
    assert _seconds(formatdate(usegmt=True)) <= 1.0
    assert _seconds("Fri, 01 Jan 2100 00:00:00 GMT") > 1e9
    assert _seconds("Fri, 01 Jan 1999 00:00:00 GMT") == 0.0
