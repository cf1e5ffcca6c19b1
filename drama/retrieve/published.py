"""Figures that others published, from `published.csv`; docs/results shows the same file.

A row is one figure: dataset (or suite, for its average), split, system, metric, value from 0 to 1,
source, note. What a source misprints has a note, which says whether the row is
as printed or put right: table 8 has the rows of mE5-base and mE5-large swapped, here they are not.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("published.csv")
BESIDE = ("BM25", "Drama 0.1B", "Drama 0.3B", "Drama 1B")  # what tables show beside ours

Published = dict[str, dict[str, float]]  # metric -> system -> value


def published(dataset: str, split: str) -> Published:
    """What is published for a dataset, or for the average of a suite."""
    found: Published = {}
    for row in _rows():
        if (row["dataset"], row["split"]) == (dataset, split):
            found.setdefault(row["metric"], {})[row["system"]] = float(row["value"])
    return found


@cache
def _rows() -> tuple[dict[str, str], ...]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))
