"""Train a retriever from a recipe.

    deepspeed launchers/train.py --recipe recipes/demo.yaml                   # all GPUs here
    deepspeed --hostfile hosts launchers/train.py --recipe recipes/demo.yaml  # a cluster
    deepspeed --num_gpus 2 launchers/train.py --recipe recipes/demo.yaml      # two CPU ranks
    python launchers/train.py --recipe recipes/demo.yaml                      # one process

Started again with the same recipe, a run goes on from its newest checkpoint. With
`--resume OTHER/checkpoints/step-N` it begins from that of another run with the same recipe.
"""

from __future__ import annotations

from pathlib import Path

import click

from drama.console import console, quiet_libraries
from drama.errors import exit_on_user_error
from drama.recipe import Recipe


@click.command(help="Train a retriever as the recipe says; a stopped run goes on where it was.")
@click.option("--recipe", "path", type=click.Path(path_type=Path), required=True)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="For example train.lr=3e-4."
)
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|none|CHECKPOINT",
    help="auto: from the run's newest whole checkpoint, if there is one. none: refuse to go on "
    "with a run. CHECKPOINT: begin from that of another run, such as runs/a/checkpoints/step-500, "
    "in a new output.",
)
@click.option("--local_rank", type=int, default=0, hidden=True, help="passed by the launcher")
def main(path: Path, overrides: tuple[str, ...], resume: str, local_rank: int) -> None:
    """Train as the recipe says."""
    with exit_on_user_error("train"):
        recipe = Recipe.load(path, overrides)
        quiet_libraries()
        from drama.trainer import train  # slow imports after the quick checks

        console.print(f"[bold]done[/]: {train(recipe, resume)}", highlight=False)


if __name__ == "__main__":
    main()
