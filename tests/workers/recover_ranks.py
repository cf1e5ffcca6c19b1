"""Started by `deepspeed`: one recovery after the other in the same processes.

usage: recover_ranks.py RECIPE OUT NAME=KEY=VALUE[;KEY=VALUE...]...
"""

import sys
from pathlib import Path

from drama.console import quiet_libraries
from drama.distributed import Ranks
from drama.prune.recovery import Recoverer
from drama.prune.recovery_recipe import RecoveryRecipe


def main(path: Path, out: Path, runs: list[str]) -> None:
    quiet_libraries()
    with Ranks.start() as ranks:
        for run in runs:
            name, _, settings = run.partition("=")
            overrides = [*filter(None, settings.split(";")), f"output={out / name}"]
            Recoverer(RecoveryRecipe.load(path, overrides), ranks).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
