"""Started by `deepspeed`: a few steps of one pruning recipe after the other, what they did as JSON.

usage: prune_ranks.py RECIPE OUT NAME=KEY=VALUE[;KEY=VALUE...]...
"""

import json
import sys
from pathlib import Path

from drama.console import quiet_libraries
from drama.distributed import Ranks
from drama.prune.learn import Pruner
from drama.prune.recipe import PruneRecipe


def main(path: Path, out: Path, runs: list[str]) -> None:
    quiet_libraries()
    with Ranks.start() as ranks:
        found = {}
        for run in runs:
            name, _, settings = run.partition("=")
            overrides = [*settings.split(";"), f"output={out / name}"]
            pruner = Pruner(PruneRecipe.load(path, overrides), ranks)
            pruner.run()
            found[name] = {k: x.tolist() for k, x in pruner.masks.state().items()}
        if ranks.is_main:
            (out / "masks.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
