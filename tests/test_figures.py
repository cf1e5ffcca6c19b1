"""Histograms: a bar's height is the count of what lies under it."""

import random
from collections import Counter
from xml.etree import ElementTree

import pytest

from drama.data.writer import bucket
from drama.figures import lengths_histogram, numbers_histogram, svg


def bars(figure):
    """(left, right, height) of every bar that has a height."""
    (axes,) = figure.axes
    boxes = [patch.get_bbox() for patch in axes.patches]
    return [(box.x0, box.x1, box.height) for box in boxes if box.height]


@pytest.mark.parametrize("most", [1, 5, 3000])
def test_lengths_stand_between_their_powers_of_two(most):
    lengths = [random.Random(n).randint(0, most) for n in range(500)]
    figure = lengths_histogram(Counter(map(bucket, lengths)), "characters", "queries")
    (axes,) = figure.axes
    ticks = [int(label.get_text().replace(",", "")) for label in axes.get_xticklabels()]
    for left, right, height in bars(figure):
        low, high = ticks[int(left)], ticks[round(right + 0.4)]
        assert high == 2 * low or (low, high) == (0, 1)
        assert height == sum(low < x <= high or (low, x) == (0, 0) for x in lengths)
    assert sum(height for *_, height in bars(figure)) == 500
    ElementTree.fromstring(svg(figure))


@pytest.mark.parametrize("most", [0, 3, 59, 1000])
def test_numbers_have_a_bar_each_or_share_one(most):
    numbers = [random.Random(n).randint(0, most) for n in range(500)]
    figure = numbers_histogram(Counter(numbers), "rank", "queries")
    drawn = bars(figure)
    assert len(drawn) <= 60
    width = 1 if most < 60 else 17
    assert ("17 a bar" in figure.axes[0].get_xlabel()) == (width == 17)
    for left, right, height in drawn:
        middle = (left + right) / 2
        assert height == sum(abs(x - middle) < width / 2 for x in numbers)
    assert sum(height for *_, height in drawn) == 500


def test_what_is_beyond_stands_apart():
    figure = numbers_histogram({1: 5, 3: 2}, "rank", "queries", ("deeper", 1234))
    *inside, (left, right, height) = bars(figure)
    assert [round((a + b) / 2) for a, b, _ in inside] == [1, 3]
    assert left > 4
    assert height == 1234
    assert right <= figure.axes[0].get_xlim()[1]
    assert "deeper 1,234" in svg(figure)
    assert [int(tick) for tick in figure.axes[0].get_xticks()] == [1, 2, 3]
    (alone,) = bars(numbers_histogram({1: 0}, "rank", "queries", ("deeper", 7)))
    assert alone[2] == 7
