"""Compare recoveries of one pruned model with and without its parent, at equal tokens, over seeds.

    drama prune LLM --to layers=22,hidden=480,heads=6,ffn=1152 --calibration TEXT --out cut
    drama shard de=de.jsonl en=en.jsonl ... --tokenizer cut --out shards/text
    drama shard de=de.held.jsonl en=en.held.jsonl ... --tokenizer cut --out shards/held-out
    python launchers/compare_recovery.py --recipe recipes/recover.yaml --set model.path=cut ...

Runs lie under the recipe's output, one folder an arm and seed, and those that are done are not run
again. Rows go to benchmarks/recovery_quality.csv, the figure to docs/recovery.svg.
"""

from __future__ import annotations

from pathlib import Path

import click

from drama.console import console, help_text, quiet_libraries
from drama.errors import UserError, exit_on_user_error
from drama.prune.recovery_recipe import RecoveryRecipe

ROOT = Path(__file__).resolve().parents[1]
CSV = ROOT / "benchmarks" / "recovery_quality.csv"
FIGURE = ROOT / "docs" / "recovery.svg"
FOLDER = click.Path(path_type=Path)


@click.command(help=help_text(__doc__), context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--recipe", "path", type=FOLDER, required=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Several times.")
@click.option("--arm", "arms", multiple=True, help="Default: all. Several times.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--out", type=FOLDER, default=CSV, show_default="recovery_quality.csv")
@click.option("--figure", type=FOLDER, default=FIGURE, show_default="docs/recovery.svg")
def main(
    path: Path,
    overrides: tuple[str, ...],
    arms: tuple[str, ...],
    seeds: int,
    out: Path,
    figure: Path,
) -> None:
    """Run every arm with every seed."""
    with exit_on_user_error("compare_recovery"):
        recipe = RecoveryRecipe.load(path, overrides)
        if recipe.model.parent is None or not recipe.eval.shards:
            raise UserError(f"{path}: a comparison needs model.parent and eval.shards")
        quiet_libraries()
        from drama.bench.recovery_quality import ARMS, compare, loss_of_parent
        from drama.bench.rows import Rows
        from drama.distributed import Ranks
        from drama.figures import over_seeds, svg
        from drama.files import replacing

        if unknown := [arm for arm in arms if arm not in ARMS]:
            raise UserError(f"--arm '{unknown[0]}' is none of {', '.join(ARMS)}")
        chosen = arms or tuple(ARMS)
        with Ranks.start() as ranks:
            rows = Rows("recovery quality", ranks.device)
            curves = compare(recipe, ranks, chosen, range(seeds), rows)
            if not ranks.is_main:
                return
            for arm, runs in curves.items():
                last = ", ".join(f"{run[-1][1]:.3f}" for run in runs)
                console.print(f"{arm}: {last} nats a token", highlight=False)
            rows.write(out)
            drawn = over_seeds(
                f"{recipe.name}: held-out loss",
                curves,
                x_label="tokens",
                y_label="nats a token",
                level=("parent", loss_of_parent(recipe, chosen[0], 0)),
            )
            with replacing(figure) as temporary:
                temporary.write_text(svg(drawn), encoding="utf-8")


if __name__ == "__main__":
    main()
