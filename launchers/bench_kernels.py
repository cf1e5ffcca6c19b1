"""Measure the InfoNCE kernel beside everything else that computes it, on whatever is here.

    python launchers/bench_kernels.py                  # the grid of this device: minutes
    python launchers/bench_kernels.py --quick          # the same grid, small: a dry run, a minute

Correctness first: every provider's gradients are held against float64, and one that is off gets no
time. Candidates run in turn. Rows go to benchmarks/kernels.csv as they are measured; rows of other
devices stay there. What is installed is measured: sentence-transformers everywhere, and on a GPU
`pip install inf-cl cut-cross-entropy liger-kernel`.
"""

from __future__ import annotations

from pathlib import Path

import click

from drama.console import console, help_text, progress, quiet_libraries
from drama.errors import exit_on_user_error

SHOWN = "ms", "fraction of floor", "relative gradient error", "failed", "out of memory"
CSV = Path(__file__).resolve().parents[1] / "benchmarks" / "kernels.csv"


@click.command(help=help_text(__doc__))
@click.option("--quick", is_flag=True, help="Small shapes; writes only where --out says so.")
@click.option("--seconds", default=8.0, show_default=True, help="Time for one case's rounds.")
@click.option(
    "--out", type=click.Path(path_type=Path), show_default="benchmarks/kernels.csv", help="CSV."
)
def main(quick: bool, seconds: float, out: Path | None) -> None:
    """Run the grid of this device."""
    with exit_on_user_error("bench_kernels"):
        quiet_libraries()
        import torch

        from drama.bench.infonce import cases, measure
        from drama.bench.rows import Rows

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        rows = Rows("infonce", device)
        out = out if out or quick else CSV
        grid = cases(device, quick)
        with progress() as bar:
            task = bar.add_task("cases", total=len(grid), note="")
            for case in grid:
                bar.update(task, note=f"{case} {case.mode}")
                before = len(rows.rows)
                measure(case, dtype, device, rows, 0.0 if quick else seconds)
                for row in rows.rows[before:]:
                    if row["metric"] in SHOWN:
                        console.print(
                            f"{case}  {row['mode']}  {row['provider']}: "
                            f"{row['median']} {row['metric']}",
                            highlight=False,
                        )
                if out:
                    rows.write(out)  # after each case: a stopped run keeps what it has
                bar.advance(task)


if __name__ == "__main__":
    main()
