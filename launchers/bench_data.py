"""Measure reading of training data beside webdataset, mosaicml-streaming and datasets.

    python launchers/bench_data.py                    # 200,000 records: about half an hour
    python launchers/bench_data.py --records 4000     # everything once, in small

The records are the demo's pairs, numbered. Each figure is of one process on one core; the order of
the libraries changes with every round. The files (some gigabytes) are kept in --scratch if given.
Rows go to benchmarks/data.csv.
"""

from __future__ import annotations

import random
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from drama.console import console, help_text, quiet_libraries
from drama.errors import exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"
MANY = 10_000_000
CSV = ROOT / "benchmarks" / "data.csv"


@click.command(help=help_text(__doc__))
@click.option("--records", type=click.IntRange(4000), default=200_000, show_default=True)
@click.option("--pairs", type=click.Path(path_type=Path), default=PAIRS, show_default="the demo's")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Whose tokenizer to use. Default: one token a byte.",
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=8.0, show_default=True, help="Of one measurement of speed.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Keep the files here.")
@click.option("--out", type=click.Path(path_type=Path), default=CSV, show_default="data.csv")
def main(
    records: int,
    pairs: Path,
    model: Path | None,
    rounds: int,
    seconds: float,
    scratch: Path | None,
    out: Path,
) -> None:
    """Speed, then resuming, then kills."""
    with exit_on_user_error("bench_data"), ExitStack() as stack:
        quiet_libraries()
        import torch

        from drama.bench import data as bench
        from drama.bench.rows import Rows
        from drama.testing import byte_tokenizer

        folder = scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if model is None:
            model = folder / "tokenizer"
            byte_tokenizer().save_pretrained(model)
        library = bench.library
        rows = Rows("data", torch.device("cpu"))
        sizes = {"whole": records, "small": min(records, 20_000)}
        for name, count in sizes.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            bench.prepare(pairs, model, folder / name, count)
        whole, chance, ways = folder / "whole", random.Random(0), list(bench.ways())

        runs = [("speed", way, kind) for way in ways for kind in bench.KINDS]
        runs += [("batches", "ours, batches", kind) for kind in bench.KINDS]
        figures: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _ in range(rounds):
            chance.shuffle(runs)
            for task, way, kind in runs:
                more = {"way": way} if task == "speed" else {"model": model}
                found = bench.alone(task, kind=kind, folder=whole, seconds=seconds, **more)
                figures.setdefault((way, kind), []).append(found)
        for (way, kind), several in sorted(figures.items()):
            for metric in several[0]:
                values = [figure[metric] for figure in several]
                if any(values):
                    rows.add(way, kind, metric, f"{records} records", values, library(way))
                    console.print(f"{way}, {kind}: {metric} {bench.mean_and_spread(values)}")
        rows.write(out)

        bench.link_many(whole / "ours-text", MANY // records, folder / "many" / "ours-text")
        places = [(way, share, whole, records) for way in ways for share in (0.01, 0.5, 0.99)]
        places.append(("ours", 0.99, folder / "many", MANY // records * records))
        for way, share, at, count in places:
            if way == "datasets":
                bench.alone("save_state", folder=at, share=share)
            what = {"way": way, "kind": "text", "folder": at, "share": share}
            several = [bench.alone("resume", **what) for _ in range(rounds)]
            for metric in several[0]:
                values = [figure[metric] for figure in several]
                about = f"{share:.0%} of {count} records"
                rows.add(way, "resume", f"seconds to the {metric}", about, values, library(way))
                console.print(f"{way}, {about}: {metric} {bench.mean_and_spread(values)} s")
        rows.write(out)

        for way in ways:
            found = bench.alone("spread", way=way, folder=whole)
            config = library(way) | {"at random": found["at random"]}
            rows.add(way, "shuffle", "runs of 200 in a batch", "", [found["runs"]], config)
            console.print(f"{way}: {found['runs']:.0f} runs, at random {found['at random']:.0f}")

        with tempfile.TemporaryDirectory() as kills:
            for way in ways:
                for metric, value in bench.killed(way, folder / "small", Path(kills)).items():
                    about = f"{sizes['small']} records, 2 then 3 ranks"
                    counted = f"records {metric}"
                    rows.add(way, "kill -9", counted, about, [value], library(way))
                    console.print(f"{way}, killed: {value:,} records {metric}")
        rows.write(out)


if __name__ == "__main__":
    main()
