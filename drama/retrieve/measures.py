"""Metrics of a run, counted by trec_eval's own code through ir-measures.

A judged query that the run lacks scores 0, and means are taken over the judged queries: what
`trec_eval -c` does, and what BEIR and MIRACL publish.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import ir_measures
from ir_measures import AP, RR, Measure, R, nDCG

from drama.errors import UserError, nearest
from drama.retrieve.run import Run

METRICS = ("nDCG@10", "Recall@10", "Recall@100", "MRR@10", "MAP@100")
MAX_CUTOFF = 1000  # TREC's depth

Qrels = dict[str, dict[str, int]]  # query id -> document id -> grade
PerQuery = dict[str, dict[str, float]]  # metric -> query id -> value

_KINDS = {"nDCG": nDCG, "Recall": R, "MRR": RR, "MAP": AP}


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """The metrics in our spelling, without repetitions; the first one is the headline.

    Raises:
        UserError: none, an unknown one, or a cutoff that is not 1 to 1,000.
    """
    if not names:
        raise UserError("no metric; give one such as nDCG@10")
    return tuple(dict.fromkeys(_spelled(name) for name in names))


def cutoff(metric: str) -> int:
    """The deepest rank that a metric looks at."""
    return int(metric.partition("@")[2])


def score(qrels: Qrels, run: Run, metrics: Sequence[str] = METRICS) -> PerQuery:
    """Per-query figures: metric -> query id -> value, for every judged query.

    nDCG is with linear gain. MRR@K takes trec_eval's reciprocal rank where the rank is at most K.
    """
    values: PerQuery = {metric: dict.fromkeys(qrels, 0.0) for metric in metrics}
    names: dict[Measure, list[str]] = {}
    for metric in metrics:
        kind = metric.partition("@")[0]
        measure = RR if kind == "MRR" else _KINDS[kind] @ cutoff(metric)
        names.setdefault(measure, []).append(metric)
    for found in ir_measures.pytrec_eval.iter_calc(list(names), qrels, run):
        for metric in names[found.measure]:
            beyond = found.measure == RR and found.value and round(1 / found.value) > cutoff(metric)
            values[metric][found.query_id] = 0.0 if beyond else float(found.value)
    return values


def _spelled(name: str) -> str:
    kind, _, depth = name.partition("@")
    spellings = {known.lower(): known for known in _KINDS}
    if kind.lower() not in spellings or not re.fullmatch(r"[1-9]\d*", depth):
        choices = [f"{known}@{depth or 10}" for known in _KINDS]
        raise UserError(
            f"unknown metric '{name}'{nearest(name, choices)}; there are nDCG@K, Recall@K, MRR@K "
            "and MAP@K, such as nDCG@10"
        )
    if int(depth) > MAX_CUTOFF:
        raise UserError(f"metric '{name}': the deepest rank is {MAX_CUTOFF:,}")
    return f"{spellings[kind.lower()]}@{int(depth)}"
