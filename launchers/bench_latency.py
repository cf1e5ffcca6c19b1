"""Measure how long a query waits, text to vector, beside sentence-transformers and onnxruntime.

    python launchers/bench_latency.py                        # 6x384, minutes
    python launchers/bench_latency.py --shape drama-base --seconds 20
    python launchers/bench_latency.py --quick                # every way once: under a minute

A random retriever is written and opened in everything that is installed: `pip install
sentence-transformers onnx onnxruntime onnxscript`. Vectors that are off get no time; ways run in
turn. Rows go to benchmarks/latency.csv as they are measured. docs/speed.md has what came of it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from drama.console import console, help_text, quiet_libraries
from drama.errors import exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"
CSV = ROOT / "benchmarks" / "latency.csv"


@click.command(help=help_text(__doc__))
@click.option("--shape", type=click.Choice(["6x384", "drama-base"]), default="6x384")
@click.option("--batches", default="1,8,32", show_default=True, help="Texts at once.")
@click.option("--lengths", default="8,32,128,512", show_default=True, help="Tokens of each.")
@click.option("--pairs", type=click.Path(path_type=Path), default=PAIRS, show_default="the demo's")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), show_default="SmolLM2's", help="Its folder."
)
@click.option("--seconds", default=10.0, show_default=True, help="Time for one case's rounds.")
@click.option("--rounds", default=200, show_default=True, help="At most, of one case.")
@click.option("--quick", is_flag=True, help="A tiny model; writes only where --out says so.")
@click.option(
    "--out", type=click.Path(path_type=Path), show_default="benchmarks/latency.csv", help="CSV."
)
def main(
    shape: str,
    batches: str,
    lengths: str,
    pairs: Path,
    tokenizer: Path | None,
    seconds: float,
    rounds: int,
    quick: bool,
    out: Path | None,
) -> None:
    """Time every batch and length."""
    with exit_on_user_error("bench_latency"):
        quiet_libraries()
        import torch

        from drama.bench.latency import measure
        from drama.bench.models import SHAPES, random_retriever
        from drama.bench.retrievers import graphs_for
        from drama.bench.rows import Rows, whole_numbers

        batch_sizes = whole_numbers(batches, "--batches")
        token_counts = whole_numbers(lengths, "--lengths")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = "tiny" if quick else shape
        rows, target = Rows(f"latency {name}", device), out if out or quick else CSV
        with tempfile.TemporaryDirectory() as scratch:
            folder, _ = random_retriever(
                Path(scratch), SHAPES[name], tokenizer, onnx=graphs_for(device)
            )
            measure(
                folder,
                pairs,
                device,
                rows,
                batches=[1, 3] if quick else batch_sizes,
                lengths=[8, 32] if quick else token_counts,
                seconds=0.0 if quick else seconds,
                rounds=3 if quick else rounds,
                note=lambda line: console.print(line, highlight=False),
                save=lambda: rows.write(target) if target else None,
            )


if __name__ == "__main__":
    main()
