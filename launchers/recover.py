"""Bring a pruned language model back by continued pre-training, as a recipe says.

    deepspeed launchers/recover.py --recipe recipes/recover.yaml                   # all GPUs here
    deepspeed --hostfile hosts launchers/recover.py --recipe recipes/recover.yaml  # a cluster
    deepspeed --num_gpus 2 launchers/recover.py --recipe recipes/recover.yaml      # two CPU ranks
    python launchers/recover.py --recipe recipes/recover.yaml                      # one process

A recipe with `rounds` (recipes/prune-iterated.yaml) cuts and recovers in turn. Started again with
the same recipe, a run goes on from its newest checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import click

from drama.console import console, help_text, quiet_libraries
from drama.errors import exit_on_user_error
from drama.prune.recovery_recipe import RecoveryRecipe


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
    """Recover as the recipe says."""
    with exit_on_user_error("recover"):
        recipe = RecoveryRecipe.load(path, overrides)
        quiet_libraries()
        from drama.prune.rounds import recover  # slow imports after the quick checks

        console.print(f"[bold]done[/]: {recover(recipe)}", highlight=False)


if __name__ == "__main__":
    main()
