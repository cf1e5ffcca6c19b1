"""Evaluate retrieval systems on test sets: runs, metrics as trec_eval counts them, how sure they
are, and a report.

OUT/evaluation.json, .md, .svg  figures, tables, bars
OUT/DATASET/runs/NAME.trec      the rankings
OUT/DATASET/scores/NAME.json    figures per query; what a repeated call takes over
OUT/DATASET/vectors/NAME/       a model's vectors, at full width; a repeated call takes them over
OUT/DATASET/beir/               the set in BEIR's layout, where it comes in another one
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from drama.console import console
from drama.errors import UserError, nearest
from drama.figures import evaluation_figures, svg
from drama.files import replacing
from drama.retrieve.datasets import (
    Dataset,
    Facts,
    beir_folder,
    check_names,
    find_datasets,
    read_facts,
    read_judged,
)
from drama.retrieve.measures import METRICS, check_metrics, cutoff, score
from drama.retrieve.published import Published, published
from drama.retrieve.results import Results, Scores, gather, scores_to_json
from drama.retrieve.run import write_run
from drama.retrieve.suite import published_sizes
from drama.retrieve.systems import System, check_systems, run_system
from drama.retrieve.tables import markdown

DEPTH = 100  # of rankings, where no metric looks deeper
FORMAT_VERSION = 1

Where = str | Path | Dataset


def evaluate(
    datasets: Where | Sequence[Where],
    systems: Mapping[str, str | Path],
    *,
    split: str | None = None,
    metrics: Sequence[str] = METRICS,
    against: str | Path | None = None,
    out: Path | None = None,
    dim: int | None = None,
    max_tokens: int | None = None,
    name: str | None = None,
    drop_vectors: bool = False,
    seed: int = 0,
) -> Results:
    """Run each system over the judged queries of each test set and score it.

    Started again with the same `out`, it takes over what has been scored with the same data, the
    same system and the same options.

    Args:
        datasets: folders of test sets (see `datasets.py`), or sets of a suite.
        systems: name -> "bm25", a model folder, an index folder over the set's corpus, or a TREC
            run file; {dataset} in a path stands for the set's name.
        split: the judgements to use; default test, of MIRACL dev.
        metrics: nDCG@K, Recall@K, MRR@K, MAP@K; the first is the headline.
        against: the system that the others are compared with, by name, or a run file to compare
            with; default BM25 where it is among the systems.
        out: where everything is kept (see the top of the file); None keeps nothing.
        dim: cut dense vectors to this width (Matryoshka); an index must have it already.
        max_tokens: where a model folder's documents are cut; default the model's.
        name: of the whole; default the dataset's, or that of the folder of several.
        drop_vectors: remove a set's vectors once it is scored.
        seed: of the resampling.

    Raises:
        UserError: faulty data, a name or a spec that is no system, an index over another corpus or
            of another width, an unknown metric.
    """
    metrics = check_metrics(metrics)
    entries = {name: System(name, str(spec), dim, max_tokens) for name, spec in systems.items()}
    baseline = _baseline(entries, against)
    check_systems(list(entries.values()), [])
    found = _found(datasets, split)
    check_systems(list(entries.values()), [dataset.name for dataset in found])
    depth = max(DEPTH, *map(cutoff, metrics))
    keep = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    facts: dict[str, Facts] = {}
    scores: dict[str, dict[str, Scores]] = {}
    with keep as place:
        for number, dataset in enumerate(found, 1):
            home = Path(place) / dataset.name
            folder = beir_folder(dataset, home)
            cache = home / "facts.json" if out is not None else None
            facts[dataset.name] = read_facts(folder, dataset.split, cache)
            scores[dataset.name] = {
                system.name: _scored(
                    system,
                    dataset,
                    folder,
                    home,
                    {
                        "format": FORMAT_VERSION,
                        "dataset": facts[dataset.name].sha256,
                        "metrics": list(metrics),
                        "depth": depth,
                    },
                    f"{number}/{len(found)} {dataset.name}" if len(found) > 1 else dataset.name,
                )
                for system in entries.values()
            }
            if drop_vectors:
                shutil.rmtree(home / "vectors", ignore_errors=True)
    name = name or _common_name(found)
    results = gather(
        name,
        found,
        facts,
        scores,
        _beside(name, found, facts),
        metrics=metrics,
        depth=depth,
        baseline=baseline,
        seed=seed,
    )
    if out is not None:
        _write(results, Path(out))
    return results


def _found(datasets: Where | Sequence[Where], split: str | None) -> list[Dataset]:
    places = [datasets] if isinstance(datasets, str | Path | Dataset) else list(datasets)
    if not places:
        raise UserError("no test set to evaluate on; give a BEIR folder, or a suite and its root")
    found = [
        dataset
        for place in places
        for dataset in ([place] if isinstance(place, Dataset) else find_datasets(place, split))
    ]
    check_names(found)
    return found


def _common_name(datasets: Sequence[Dataset]) -> str:
    groups = {dataset.group for dataset in datasets}
    if len(datasets) > 1 and len(groups) == 1 and groups != {""}:
        return groups.pop()
    return ", ".join(d.name for d in datasets[:3]) + (", ..." if len(datasets) > 3 else "")


def _baseline(systems: dict[str, System], against: str | Path | None) -> str | None:
    """The name of the system to compare with; a run file becomes one more system."""
    if against is None:
        lexical = [name for name, system in systems.items() if system.spec == "bm25"]
        return lexical[0] if lexical and len(systems) > 1 else None
    if str(against) in systems:
        return str(against)
    if not Path(against).is_file() and "{dataset}" not in str(against):
        raise UserError(
            f"--against {against}: no system of that name{nearest(str(against), systems)} and no "
            f"run file; the systems are {', '.join(systems) or 'none'}"
        )
    name = Path(against).stem
    if name in systems:
        raise UserError(
            f"--against {against}: a system is called {name} already; give the run as a system, "
            "--system NAME=FILE --against NAME"
        )
    systems[name] = System(name, str(against))
    return name


def _scored(
    system: System, dataset: Dataset, folder: Path, home: Path, inputs: dict[str, Any], title: str
) -> Scores:
    """Take scores over or work them out; the file of scores comes last, and vouches for the run."""
    here = system.at(dataset.name)
    inputs = {**inputs, "system": here.inputs()}
    path = home / "scores" / f"{system.name}.json"
    begin, metric = time.perf_counter(), inputs["metrics"][0]
    if (stored := _stored(path, inputs)) is not None:
        scores = replace(stored, spec=system.spec)
        _say(title, system.name, metric, scores, "as before")
        return scores
    queries, qrels = read_judged(folder, dataset.split)
    vectors = home / "vectors" / system.name
    run, width = run_system(here, folder, queries, vectors, inputs["depth"])
    if missing := [query_id for query_id in qrels if query_id not in run]:
        console.print(
            f"{here.spec}: {len(missing):,} of {len(qrels):,} judged queries have no results "
            f"('{missing[0]}' first); they score 0",
            soft_wrap=True,
            markup=False,
        )
    write_run(run, home / "runs" / f"{system.name}.trec", tag=system.name)
    scores = Scores(system.spec, width, score(qrels, run, inputs["metrics"]))
    with replacing(path) as temporary:
        temporary.write_text(scores_to_json(scores, inputs), encoding="utf-8")
    _say(title, system.name, metric, scores, f"{time.perf_counter() - begin:,.0f} s")
    return scores


def _stored(path: Path, inputs: dict[str, Any]) -> Scores | None:
    """The scores in a file; None where it is absent, of other inputs, damaged or incomplete."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        same = stored.pop("inputs") == inputs
        scores = Scores(**stored)
        whole = all(scores.per_query[metric] for metric in inputs["metrics"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return scores if same and whole else None


def _say(title: str, system: str, metric: str, scores: Scores, how: str) -> None:
    value = fmean(scores.per_query[metric].values())
    console.print(f"{title}: {system}, {metric} {value:.4f}, {how}", markup=False, highlight=False)


def _beside(
    name: str, datasets: Sequence[Dataset], facts: Mapping[str, Facts]
) -> dict[str, Published]:
    """Published figures by data set, left out where ours is not of the published size."""
    sizes, found = published_sizes(), {}
    for dataset in datasets:
        here = facts[dataset.name].num_queries, facts[dataset.name].num_documents
        theirs = (dataset.queries, dataset.documents)
        theirs = theirs if any(theirs) else sizes.get(dataset.name, here)
        figures = published(dataset.name, dataset.split)
        if all(abs(x - y) <= y / 100 for x, y in zip(here, theirs, strict=True)):
            found[dataset.name] = figures
        elif figures:
            console.print(
                f"{dataset.name}: published figures are of {theirs[0]:,} queries and "
                f"{theirs[1]:,} documents, these of {here[0]:,} and {here[1]:,}; left out",
                markup=False,
            )
    if len(found) == len(datasets) > 1:
        found[name] = published(name, datasets[0].split)
    return found


def _write(results: Results, out: Path) -> None:
    for name, text in (
        ("evaluation.svg", svg(evaluation_figures(asdict(results))[-1])),
        ("evaluation.md", markdown(results)),
        ("evaluation.json", results.to_json()),
    ):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
