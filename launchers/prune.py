"""Prune a language model by learned masks, as a recipe says.

    deepspeed launchers/prune.py --recipe recipes/prune-learned.yaml               # all GPUs here
    deepspeed --hostfile hosts launchers/prune.py --recipe recipes/prune-learned.yaml  # cluster
    deepspeed --num_gpus 2 launchers/prune.py --recipe recipes/prune-learned.yaml  # two CPU ranks
    python launchers/prune.py --recipe recipes/prune-learned.yaml                  # one process

Started again with the same recipe, a run goes on from its newest checkpoint. For a cut in minutes
without training, see `drama prune --help`.
"""

from __future__ import annotations

from pathlib import Path

import click

from drama.console import console, help_text, quiet_libraries
from drama.errors import exit_on_user_error
from drama.prune.recipe import PruneRecipe


@click.command(help=help_text(__doc__), context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--recipe", "path", type=click.Path(path_type=Path), required=True)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="For example train.lr=3e-4; several times.",
)
@click.option("--local_rank", type=int, default=0, hidden=True, help="passed by the launcher")
def main(path: Path, overrides: tuple[str, ...], local_rank: int) -> None:
    """Prune as the recipe says."""
    with exit_on_user_error("prune"):
        recipe = PruneRecipe.load(path, overrides)
        quiet_libraries()
        from drama.prune.learn import learn  # slow imports after the quick checks

        console.print(f"[bold]done[/]: {learn(recipe)}", highlight=False)


if __name__ == "__main__":
    main()
