"""Train with kills and resumes beside the same training left alone, and compare.

    python launchers/soak.py                              # 2,000 steps, two CPU ranks
    python launchers/soak.py --steps 240 --gaps 10-40     # a small one

Losses have to be equal to the last bit, memory within 2 % from step 200 on; nothing may be left:
no process, no file descriptor, no shared memory. Rows go to benchmarks/soak.csv, the figure to
docs/soak.svg; the exit code is 1 where a promise is broken. The runs and their logs stay in --out.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import click

from drama.console import console, help_text, quiet_libraries
from drama.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"
LAUNCHER = ROOT / "launchers" / "train.py"
FOLDER = click.Path(path_type=Path)


@click.command(help=help_text(__doc__), context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--steps", default=2000, show_default=True)
@click.option(
    "--gaps", default="20-200", show_default=True, help="Steps from one kill to the next."
)
@click.option("--seed", default=0, show_default=True, help="Of the kills.")
@click.option("--out", type=FOLDER, default="runs/soak", show_default=True, help="A new folder.")
@click.option("--csv", type=FOLDER, default=ROOT / "benchmarks" / "soak.csv",
              show_default="soak.csv")  # fmt: skip
@click.option("--figure", "drawing", type=FOLDER, default=ROOT / "docs" / "soak.svg",
              show_default="soak.svg")  # fmt: skip
def main(steps: int, gaps: str, seed: int, out: Path, csv: Path, drawing: Path) -> None:
    """Run both trainings and hold them against each other."""
    with exit_on_user_error("soak"):
        low, dash, high = gaps.partition("-")
        if not (dash and low.isdigit() and high.isdigit() and 0 < int(low) <= int(high)):
            raise UserError(f"--gaps {gaps} is no range of steps; for example 20-200")
        if out.exists():
            raise UserError(f"--out {out} exists; give a new folder, a soak begins at step 0")
        quiet_libraries()
        import torch

        from drama.bench.rows import Rows
        from drama.bench.soak import Soaked, add_rows, broken_promises, figure, prepare
        from drama.figures import svg
        from drama.files import replacing

        path = prepare(out.resolve(), PAIRS, steps)
        disturbed, alone = (
            Soaked(path, LAUNCHER, path.parent / name) for name in ("disturbed", "undisturbed")
        )
        disturbed.run(random.Random(seed), (int(low), int(high)))
        alone.run(None, (0, 0))
        broken = broken_promises(disturbed, alone)
        rows = Rows("soak", torch.device("cpu"))
        add_rows(rows, disturbed, alone, broken)
        rows.write(csv)
        with replacing(drawing) as temporary:
            temporary.write_text(svg(figure(disturbed, alone)), encoding="utf-8")
    for line in broken:
        console.print(f"[red]broken:[/] {line}", soft_wrap=True, highlight=False)
    if not broken:
        console.print(f"{len(disturbed.kills)} kills in {steps:,} steps, nothing broken")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
