"""`drama evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from drama.console import console
from drama.errors import UserError

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("datasets", type=FOLDER, nargs=-1)
@click.option(
    "--system",
    "--model",
    "systems",
    multiple=True,
    required=True,
    metavar="[NAME=]SPEC",
    help="bm25, a model folder, an index folder or a TREC run file; give it several times.",
)
@click.option("--suite", help="beir-13, miracl-18, mldr-13, or a YAML of your own.")
@click.option(
    "--root", type=FOLDER, default=Path("."), show_default=True, help="Where its folders are."
)
@click.option("--download", is_flag=True, help="Fetch the suite from the Hugging Face hub first.")
@click.option("--split", help="Judgements to use.  [default: test, of MIRACL dev]")
@click.option("--metric", "metrics", multiple=True, help="nDCG@K, Recall@K, MRR@K or MAP@K.")
@click.option("--against", metavar="NAME|RUN", help="Compare with it.  [default: bm25]")
@click.option("--out", type=FOLDER, help="Keep runs, vectors and figures here, and go on there.")
@click.option("--dim", type=click.IntRange(1), help="Cut vectors to this width (Matryoshka).")
@click.option("--max-tokens", type=click.IntRange(2), help="Cut documents here (model folders).")
@click.option("--drop-vectors", is_flag=True, help="Remove a set's vectors once it is scored.")
@click.option("--json", "as_json", is_flag=True, help="Results as JSON on stdout.")
def evaluate(
    datasets: Sequence[Path],
    systems: Sequence[str],
    suite: str | None,
    root: Path,
    download: bool,
    split: str | None,
    metrics: Sequence[str],
    as_json: bool,
    **options: Any,
) -> None:
    """Score retrievers on test sets: nDCG@10, Recall, MRR, MAP, and how sure the figures are.

    DATASETS are BEIR folders, folders of one a language, or MIRACL and MLDR as the hub has them.

    \b
    drama evaluate data/demo/scifact --model runs/demo/retriever
    drama evaluate scifact fiqa --system bm25 --system ours=./retriever --out results
    drama evaluate --suite beir-13 --root ./beir --model ./retriever --out results
    drama evaluate scifact --system new=a.trec --against old.trec

    Stopped and started again with the same --out, it goes on with what is not scored yet.
    """
    from drama.retrieve.evaluate import evaluate as run
    from drama.retrieve.measures import METRICS
    from drama.retrieve.suite import download as fetch
    from drama.retrieve.suite import load_suite, suite_datasets
    from drama.retrieve.tables import tables

    places: list[Any] = list(datasets)
    chosen = load_suite(suite) if suite else None
    if download and chosen is None:
        raise UserError("--download fetches a suite; name one with --suite")
    specs = _named(systems)
    if chosen:
        if download:
            fetch(chosen, root, split)
        places += suite_datasets(chosen, root, split)
        metrics = metrics or (chosen.metric, *METRICS)
        options["name"] = chosen.name if not datasets else None
    results = run(places, specs, split=split, metrics=metrics or METRICS, **options)
    if as_json:
        click.echo(results.to_json())
        return
    for table in tables(results):
        console.print(table)
    if options["out"]:
        console.print(f"{options['out']}/evaluation.md: the whole report", soft_wrap=True,
                      markup=False)  # fmt: skip


def _named(systems: Sequence[str]) -> dict[str, str]:
    specs: dict[str, str] = {}
    for system in systems:
        name, equals, spec = system.partition("=")
        spec = spec if equals else name
        name = name if equals else Path(name).name
        if name in specs:
            raise UserError(f"two systems are called {name}; name them: --system NAME=SPEC")
        specs[name] = spec
    return specs


COMMANDS = (evaluate,)
