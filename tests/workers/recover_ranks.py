"""Started by `deepspeed`: one recovery after the other in the same processes.

usage: recover_ranks.py RECIPE OUT NAME=KEY=VALUE[;KEY=VALUE...]...

A name that comes again goes on from the checkpoint before its newest one.
"""

import shutil
import sys
from functools import partial
from pathlib import Path

from drama import checkpoint
from drama.console import quiet_libraries
from drama.distributed import Ranks
from drama.prune.recovery import Recoverer
from drama.prune.recovery_recipe import RecoveryRecipe


def forget_last(run: Path) -> None:
    if found := checkpoint.whole_checkpoints(run / "checkpoints"):
        shutil.rmtree(found[-1])
        shutil.rmtree(run / "model")


def main(path: Path, out: Path, runs: list[str]) -> None:
    quiet_libraries()
    with Ranks.start() as ranks:
        for run in runs:
            name, _, settings = run.partition("=")
            overrides = [*filter(None, settings.split(";")), f"output={out / name}"]
            ranks.on_main(partial(forget_last, out / name))
            Recoverer(RecoveryRecipe.load(path, overrides), ranks).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
