"""Measure the kernels beside everything else that computes the same, on whatever is here.

    python launchers/bench_kernels.py                  # the grids of this device: minutes
    python launchers/bench_kernels.py --quick          # small grids: a dry run, a minute
    python launchers/bench_kernels.py --kernel pool --seconds 1
    python launchers/bench_kernels.py --minutes 8      # begins no case later

Correctness first: every provider's gradients are held against float64, and one that is off gets no
time. Candidates run in turn. Rows go to benchmarks/kernels.csv as they are measured; rows of other
cases and devices stay there. What is installed is measured: sentence-transformers everywhere, and
on a GPU `pip install inf-cl cut-cross-entropy liger-kernel`.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from pathlib import Path

import click

from drama.console import console, help_text, progress, quiet_libraries
from drama.errors import exit_on_user_error

SHOWN = "ms", "GB/s", "fraction of floor", "relative gradient error", "failed", "out of memory"
MODULES = {"infonce": "infonce", "pool": "pooling", "linear_loss": "linear_loss"}
CSV = Path(__file__).resolve().parents[1] / "benchmarks" / "kernels.csv"


@click.command(help=help_text(__doc__))
@click.option(
    "--kernel",
    type=click.Choice([*MODULES, "all"]),
    default="all",
    show_default=True,
    help="Which.",
)
@click.option("--quick", is_flag=True, help="Small shapes; writes only where --out says so.")
@click.option("--seconds", default=8.0, show_default=True, help="Time for one case's rounds.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Begin no case later; those left out are named.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), show_default="benchmarks/kernels.csv", help="CSV."
)
def main(kernel: str, quick: bool, seconds: float, minutes: float | None, out: Path | None) -> None:
    """Run the grids of this device."""
    with exit_on_user_error("bench_kernels"):
        quiet_libraries()
        import torch

        from drama.bench.rows import Rows

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        out = out if out or quick else CSV
        wanted = list(MODULES) if kernel == "all" else [kernel]
        benches = [importlib.import_module(f"drama.bench.{MODULES[name]}") for name in wanted]
        grid = [(bench, case) for bench in benches for case in bench.cases(device, quick)]
        collected = {case.kernel: Rows(case.kernel, device) for _, case in grid}
        end = time.monotonic() + 60 * minutes if minutes else math.inf
        left: list[str] = []
        with progress() as bar:
            task = bar.add_task("cases", total=len(grid), note="")
            for bench, case in grid:
                if time.monotonic() > end:
                    left.append(f"{case.kernel} {case} {case.mode}")
                    continue
                bar.update(task, note=f"{case.kernel} {case} {case.mode}")
                rows = collected[case.kernel]
                before = len(rows.rows)
                # what fails outside of a provider, as where its data find no memory
                with rows.failures("all", case.mode, str(case), {"dtype": str(dtype)}):
                    bench.measure(case, dtype, device, rows, 0.0 if quick else seconds)
                for row in rows.rows[before:]:
                    if row["metric"] in SHOWN:
                        why = json.loads(row["config"]).get("error")
                        figure = (
                            f"{row['metric']}: {why}" if why else f"{row['median']} {row['metric']}"
                        )
                        console.print(
                            f"{case.kernel}  {case}  {row['mode']}  {row['provider']}: {figure}",
                            highlight=False, markup=False, soft_wrap=True,
                        )  # fmt: skip
                if out:
                    rows.write(out)  # after each case: a stopped run keeps what it has
                bar.advance(task)
        if left:
            console.print(
                f"{minutes:g} minutes are over; not measured: {'; '.join(left)}",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
