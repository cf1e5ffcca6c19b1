"""Figures of systems on datasets: means, intervals, differences to a baseline, averages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from drama.retrieve.datasets import Dataset, Facts
from drama.retrieve.measures import PerQuery
from drama.retrieve.published import Published
from drama.retrieve.significance import DRAWS, LEVEL, Sample, estimate, holm, p_value


@dataclass(frozen=True)
class Comparison:
    """A system minus the baseline: the mean difference, its interval, and how likely chance alone
    gives one as large; `p_holm` is corrected for all tests of the metric."""

    difference: float
    low: float
    high: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class SystemResult:
    """One system's figures by metric. `dim` is the width of its vectors, None without vectors."""

    spec: str
    dim: int | None
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    against: dict[str, Comparison]  # empty for the baseline, and where there is none


@dataclass(frozen=True)
class Scores:
    """One system on one dataset, query by query."""

    spec: str
    dim: int | None
    per_query: PerQuery


@dataclass(frozen=True)
class DatasetResult:
    """All systems on one dataset. Metrics are means over the queries that the qrels judge."""

    split: str
    group: str
    lang: str
    num_documents: int
    num_queries: int
    num_judgements: int
    num_unknown_documents: int  # judgements of documents that are not in the corpus
    systems: dict[str, SystemResult]
    published: Published


@dataclass(frozen=True)
class Results:
    """Everything of an evaluation. `systems` holds the means over the datasets; of one dataset,
    its own figures. The first metric is the headline."""

    dataset: str  # the name of the one dataset, of the suite, or of all of them
    split: str
    metrics: tuple[str, ...]
    depth: int  # of the rankings
    baseline: str | None
    num_documents: int
    num_queries: int
    systems: dict[str, SystemResult]
    published: Published  # for the average of a suite
    groups: dict[str, dict[str, SystemResult]]  # means by group, where there are several
    datasets: dict[str, DatasetResult]
    draws: int = DRAWS
    level: float = LEVEL

    def to_json(self) -> str:
        """The JSON text of all fields."""
        return json.dumps(asdict(self), indent=1) + "\n"


def gather(
    name: str,
    datasets: Sequence[Dataset],
    facts: Mapping[str, Facts],
    scores: Mapping[str, Mapping[str, Scores]],
    beside: Mapping[str, Published],
    *,
    metrics: Sequence[str],
    depth: int,
    baseline: str | None,
    seed: int,
) -> Results:
    """Work out means, intervals and differences.

    Args:
        facts: by dataset.
        scores: by dataset and system; every system on every dataset.
        beside: published figures by dataset, and under `name` of the average.
    """
    columns = _Columns(list(scores[datasets[0].name]), list(metrics), baseline)
    samples = {d.name: columns.sample(scores[d.name], d.name, seed) for d in datasets}
    members: dict[str, list[str]] = {}
    for dataset in datasets:
        members.setdefault(dataset.group, []).append(dataset.name)
    grouped = len(members) > 1
    single = columns.results({d.name: [samples[d.name]] for d in datasets}, scores)
    groups = columns.results(
        {group: [samples[name] for name in names] for group, names in members.items() if group},
        scores,
    )
    (average,) = columns.results({"": list(samples.values())}, scores).values()
    results = {
        d.name: DatasetResult(
            split=d.split,
            group=d.group,
            lang=d.lang,
            num_documents=facts[d.name].num_documents,
            num_queries=facts[d.name].num_queries,
            num_judgements=facts[d.name].num_judgements,
            num_unknown_documents=facts[d.name].num_unknown,
            systems=single[d.name],
            published=beside.get(d.name, {}),
        )
        for d in datasets
    }
    splits = {d.split for d in datasets}
    return Results(
        dataset=name,
        split=splits.pop() if len(splits) == 1 else "",
        metrics=tuple(metrics),
        depth=depth,
        baseline=baseline,
        num_documents=sum(fact.num_documents for fact in facts.values()),
        num_queries=sum(fact.num_queries for fact in facts.values()),
        systems=average,
        published=beside.get(name, {}),
        groups=groups if grouped else {},
        datasets=results,
    )


class _Columns:
    """The columns of a sample: every system's metrics, then their differences to the baseline."""

    def __init__(self, systems: list[str], metrics: list[str], baseline: str | None) -> None:
        self.systems, self.metrics, self.baseline = systems, metrics, baseline
        others = [s for s in systems if baseline is not None and s != baseline]
        keys = [(s, m, kind) for kind, names in (("", systems), ("-", others)) for s in names
                for m in metrics]  # fmt: skip
        self.place = {key: number for number, key in enumerate(keys)}
        self.others = others

    def sample(self, scores: Mapping[str, Scores], name: str, seed: int) -> Sample:
        def values(system: str, metric: str) -> np.ndarray:
            return np.array(list(scores[system].per_query[metric].values()))

        columns = [
            values(s, m) - values(self.baseline, m) if kind and self.baseline else values(s, m)
            for s, m, kind in self.place
        ]
        return Sample.of(np.stack(columns, axis=1), name, seed)

    def results(
        self,
        scopes: Mapping[str, Sequence[Sample]],
        scores: Mapping[str, Mapping[str, Scores]],
    ) -> dict[str, dict[str, SystemResult]]:
        """By scope (a dataset, or several averaged) and system; p values are corrected over all
        scopes and systems given."""
        found: dict[str, dict[str, SystemResult]] = {}
        for scope, samples in scopes.items():
            of = scores.get(scope) or next(iter(scores.values()))
            found[scope] = {s: self._result(s, of[s], samples) for s in self.systems}
        for metric in self.metrics:
            corrected = holm(
                {(scope, s): found[scope][s].against[metric].p
                 for scope in found for s in self.others}
            )  # fmt: skip
            for (scope, s), p_holm in corrected.items():
                against = found[scope][s].against
                against[metric] = replace(against[metric], p_holm=p_holm)
        return found

    def _result(self, name: str, scores: Scores, samples: Sequence[Sample]) -> SystemResult:
        own = {m: estimate(samples, self.place[name, m, ""]) for m in self.metrics}
        against = {}
        for metric in self.metrics if name in self.others else ():
            column = self.place[name, metric, "-"]
            found, p = estimate(samples, column), p_value(samples, column)
            against[metric] = Comparison(found.value, found.low, found.high, p, p)
        return SystemResult(
            spec=scores.spec,
            dim=scores.dim,
            metrics={metric: found.value for metric, found in own.items()},
            intervals={metric: (found.low, found.high) for metric, found in own.items()},
            against=against,
        )


def scores_to_json(scores: Scores, inputs: Mapping[str, Any]) -> str:
    """The JSON text of scores, with what they are a function of."""
    return json.dumps({"inputs": inputs, **asdict(scores)}, indent=1) + "\n"
