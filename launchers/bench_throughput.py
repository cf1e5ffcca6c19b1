"""Measure the training step beside sentence-transformers' cached loss, on whatever is here; with
--encode a corpus in place of it, and the types of index.

    python launchers/bench_throughput.py                            # 6x384; half an hour on a CPU
    python launchers/bench_throughput.py --shape drama-base --batches 128
    python launchers/bench_throughput.py --memory                   # bytes a token, seconds
    python launchers/bench_throughput.py --quick                    # every way once: a minute
    python launchers/bench_throughput.py --encode                   # texts to vectors, and search
    python launchers/bench_throughput.py --encode --quick

First both sweep their chunk size at the smallest batch; then the best of each runs at every batch,
and ours with each feature off at the smallest. Rows go to benchmarks/throughput.csv as they are
measured, those of --encode to benchmarks/encode.csv.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from drama.console import console, help_text, quiet_libraries
from drama.errors import exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"
CSV = ROOT / "benchmarks" / "throughput.csv"
ENCODE_CSV = ROOT / "benchmarks" / "encode.csv"


@click.command(help=help_text(__doc__))
@click.option("--shape", type=click.Choice(["6x384", "drama-base"]), default="6x384")
@click.option("--batches", default="128,512", show_default=True, help="Pairs of a step.")
@click.option("--pairs", type=click.Path(path_type=Path), default=PAIRS, show_default="the demo's")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), show_default="SmolLM2's", help="Its folder."
)
@click.option("--max-tokens", default=512, show_default=True, help="Of a document.")
@click.option("--rounds", default=3, show_default=True, help="Turns of every way.")
@click.option("--ablation/--no-ablation", default=True, help="Also ours without each feature.")
@click.option("--alone", is_flag=True, help="Ours without sentence-transformers.")
@click.option("--quick", is_flag=True, help="16 pairs once; prints, does not write.")
@click.option("--memory", is_flag=True, help="Only count what graphs of the paper's sizes take.")
@click.option("--encode", is_flag=True, help="Measure encoding and search; no training.")
@click.option("--seconds", default=60.0, show_default=True, help="Time for a case of --encode.")
@click.option(
    "--out", type=click.Path(path_type=Path), show_default="throughput.csv, encode.csv", help="CSV."
)
def main(
    shape: str,
    batches: str,
    pairs: Path,
    tokenizer: Path | None,
    max_tokens: int,
    rounds: int,
    ablation: bool,
    alone: bool,
    quick: bool,
    memory: bool,
    encode: bool,
    seconds: float,
    out: Path | None,
) -> None:
    """Sweep, then compare at every batch."""
    with exit_on_user_error("bench_throughput"):
        quiet_libraries()
        if encode:
            target = out if out or quick else ENCODE_CSV
            _encode("tiny" if quick else shape, pairs, tokenizer, 0.0 if quick else seconds, target)
            return
        from drama.bench import graphs
        from drama.bench import throughput as bench
        from drama.bench.models import SHAPES, random_retriever
        from drama.bench.rows import Rows, whole_numbers
        from drama.distributed import Ranks

        out = out or CSV
        sizes = [16] if quick else sorted(whole_numbers(batches, "--batches"))
        if quick:
            rounds, max_tokens = 1, 64
        with Ranks.start() as ranks, tempfile.TemporaryDirectory() as scratch:
            device = ranks.device
            if memory:
                counts = Rows("graph", device)
                graphs.measure(counts)
                counts.write(out)
                return
            rows = Rows(f"step {shape}", device)
            budgets = [4096, 8192] if device.type == "cpu" else [65536, 131072]
            mini = [32, 64] if device.type == "cpu" else [128, 512]
            folder, encoder = random_retriever(Path(scratch) / "model", SHAPES[shape], tokenizer)
            whole = bench.read_pairs(encoder, pairs, sizes[-1], 64, max_tokens)

            def run(
                ways: Sequence[bench.Way], size: int, rounds: int, part: str
            ) -> dict[str, float]:
                batch = bench.first_pairs(whole, size)
                note = f"{shape}, {size} pairs, {batch.num_tokens:,} tokens"
                console.rule(note, align="left")
                speeds = bench.measure(
                    *(ways, batch, folder, device, rows),
                    shape=shape,
                    rounds=rounds,
                    max_tokens=max_tokens,
                    part=part,
                    note=lambda line: console.print(line, highlight=False),
                )
                if not quick:
                    rows.write(out)  # after each batch: a stopped run keeps what it has
                return speeds

            our_ways = [bench.Ours(token_budget=b) for b in budgets]
            if device.type == "cuda":
                our_ways += [bench.Ours(token_budget=b, fused="compile") for b in budgets]
            their_ways: list[bench.Theirs] = []
            if not alone:
                their_ways += [bench.Theirs(n) for n in mini]
                their_ways += [bench.Theirs(num_tokens=b) for b in budgets]
            speeds = run([*our_ways, *their_ways], sizes[0], 1, "sweep")
            ours = bench.fastest(speeds, our_ways)
            best: list[bench.Way] = [
                ours,
                *([bench.fastest(speeds, their_ways)] if their_ways else []),
            ]
            for size in sizes:
                found = run(best, size, rounds, "compared")
                for theirs in best[1:]:
                    ratio = found[str(ours)] / found[str(theirs)]
                    console.print(
                        f"[bold]{size} pairs: {ratio:.2f} times theirs[/]", highlight=False
                    )
            if ablation:
                run([ours, *bench.ablation(ours)], sizes[0], rounds, "ablation")


def _encode(
    shape: str, pairs: Path, tokenizer: Path | None, seconds: float, out: Path | None
) -> None:
    """Texts to vectors in every way that is here, then the index types."""
    import torch

    from drama.bench import encoding, indexing
    from drama.bench.models import SHAPES, random_retriever
    from drama.bench.retrievers import graphs_for
    from drama.bench.rows import Rows

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, index_rows = Rows(f"encode {shape}", device), Rows("index", torch.device("cpu"))

    def note(line: str) -> None:
        console.print(line, highlight=False)

    def save() -> None:
        if out:
            rows.write(out)

    with tempfile.TemporaryDirectory() as scratch:
        folder, _ = random_retriever(
            Path(scratch), SHAPES[shape], tokenizer, onnx=graphs_for(device)
        )
        size = encoding.size_for(device, quick=shape == "tiny")
        encoding.run(folder, pairs, device, rows, size=size, seconds=seconds, note=note, save=save)
    indexing.measure(
        size.documents, SHAPES[shape]["hidden"], index_rows, seconds=seconds, note=note
    )
    if out:
        index_rows.write(out)


if __name__ == "__main__":
    main()
