"""Measure the InfoNCE kernel beside everything else that computes it, on whatever is here.

    python launchers/bench_kernels.py                  # the grid of this device: minutes
    python launchers/bench_kernels.py --quick          # a dry run of every provider: seconds

Correctness first: a provider whose gradient is off gets no time. Candidates run in turn, rows go to
benchmarks/kernels.csv, rows of other devices stay there.
"""

from __future__ import annotations

from pathlib import Path

import click

from drama.console import console, progress, quiet_libraries
from drama.errors import exit_on_user_error

CSV = Path(__file__).resolve().parents[1] / "benchmarks" / "kernels.csv"


@click.command(help="Time InfoNCE and its peers; writes one CSV row a figure.")
@click.option("--quick", is_flag=True, help="Small shapes only; prints, does not write.")
@click.option("--seconds", default=12.0, show_default=True, help="Time for one case's rounds.")
@click.option("--out", type=click.Path(path_type=Path), default=CSV, show_default="kernels.csv")
def main(quick: bool, seconds: float, out: Path) -> None:
    """Run the grid of this device."""
    with exit_on_user_error("bench_kernels"):
        quiet_libraries()
        import torch

        from drama.bench.infonce import cases, measure
        from drama.bench.rows import Rows

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        rows = Rows("infonce", device)
        grid = cases(device, quick)
        with progress() as bar:
            task = bar.add_task("cases", total=len(grid), note="")
            for case in grid:
                bar.update(task, note=f"{case} {case.mode}")
                before = len(rows.rows)
                measure(case, dtype, device, rows, 1.0 if quick else seconds)
                for row in rows.rows[before:]:
                    if row["metric"] in ("ms", "fraction of floor", "relative gradient error"):
                        console.print(
                            f"{case}  {row['mode']}  {row['provider']}: "
                            f"{row['median']} {row['metric']}",
                            highlight=False,
                        )
                if not quick:
                    rows.write(out)  # after each case: a stopped run keeps what it has
                bar.advance(task)


if __name__ == "__main__":
    main()
