"""Started by `deepspeed` on two ranks: one run after the other, each with another JSON.

usage: ds_configs.py RECIPE OUT NAME...
"""

import sys
from pathlib import Path

from drama.console import quiet_libraries
from drama.distributed import Ranks
from drama.recipe import Recipe
from drama.trainer import Trainer


def main(path: Path, out: Path, names: list[str]) -> None:
    quiet_libraries()
    with Ranks.start() as ranks:
        for name in names:
            settings = [f"train.deepspeed={name}", f"output={out / name}", "train.steps=20"]
            Trainer(Recipe.load(path, settings), ranks).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
