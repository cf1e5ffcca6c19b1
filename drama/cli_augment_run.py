"""The command that runs a whole augmentation from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click


@click.command()
@click.option(
    "--recipe", "path", type=click.Path(path_type=Path), required=True, metavar="FILE.yaml"
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Such as documents=1000 or corpora.web.share=2.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and what it costs, and end.")
def run(path: Path, overrides: Sequence[str], dry_run: bool) -> None:
    """Run a whole recipe: corpora by share, all kinds of records, pairs, shards.

    All inputs are checked first; then a table says how many calls and tokens each kind will take,
    and what they cost at the recipe's prices. Everything goes into the recipe's output folder.
    Whatever ended it, the same command goes on, and nothing is paid twice.

    \b
    drama augment run --recipe recipes/augment-drama.yaml --dry-run
    drama augment run --recipe recipes/augment-drama.yaml --set llm.max_tokens_total=0
    drama augment run --recipe recipes/augment-drama.yaml

    The second line does all that needs no language model (reading, encoding, crops, mining) and
    ends: for a teacher and a model that share a GPU.
    """
    from drama.augment.recipe import AugmentRecipe
    from drama.augment.run import augment, show_plan

    (show_plan if dry_run else augment)(AugmentRecipe.load(path, overrides))


COMMANDS = (run,)
