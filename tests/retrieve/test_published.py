"""The published figures: whole, sourced, and consistent with the averages they come with."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from drama.retrieve.published import BESIDE, TABLE, published
from drama.retrieve.suite import load_suite, shipped_suites

ROOT = Path(__file__).parents[2]


def rows() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_of_the_docs_is_the_one_that_ships():
    assert (ROOT / "docs" / "results" / "published.csv").read_bytes() == TABLE.read_bytes()


def test_every_figure_has_a_source_and_stands_once():
    keys = [(r["dataset"], r["split"], r["system"], r["metric"]) for r in rows()]
    assert len(keys) == len(set(keys)) > 600
    for row in rows():
        assert row["source"]
        assert 0 < float(row["value"]) < 1


@pytest.mark.parametrize("suite", shipped_suites())
def test_a_suites_figures_average_to_what_the_paper_says(suite: str):
    """Figures have one digit after the point of a percentage, so means agree to 0.001."""
    loaded = load_suite(suite)
    average = published(suite, loaded.split)["nDCG@10"]
    sets = [published(e.name, e.split or loaded.split) for e in loaded.datasets]
    assert set(BESIDE) <= average.keys()
    checked = 0
    for system, value in average.items():
        figures = [found["nDCG@10"].get(system) for found in sets]
        if None in figures:
            assert figures == [None] * len(figures), system  # only its average is published
            continue
        odd = any(
            "average to" in row["note"] for row in rows()
            if (row["dataset"], row["system"]) == (suite, system)
        )  # fmt: skip
        agrees = sum(figures) / len(figures) == pytest.approx(value, abs=0.0011)
        assert agrees != odd, system
        checked += 1
    assert checked >= 9


def test_figures_of_another_split_are_not_taken():
    assert published("scifact", "train") == {}
    assert published("scifact", "test")["nDCG@10"]["BM25"] == 0.679
    assert published("miracl-18", "dev")["nDCG@10"]["Drama 0.1B"] == 0.704
