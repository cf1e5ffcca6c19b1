"""Two ranks learn masks in [good, bad, good] steps, and the same with the bad one left out by hand.

The masks' gradients of the bad step are no numbers on rank 1, the weights' are sound.

usage: bad_masks.py RECIPE FOLDER KEY=VALUE...   -> FOLDER/found.json
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drama import checkpoint
from drama.console import quiet_libraries
from drama.distributed import Ranks
from drama.prune.alive import Alive
from drama.prune.learn import Pruner
from drama.prune.recipe import PruneRecipe


def run(recipe: PruneRecipe, ranks: Ranks, *, by_hand: bool) -> dict[str, Any]:
    pruner, real, norms = Pruner(recipe, ranks), Alive.gradients, []
    pruner.begin()

    def gradients(self: Alive) -> Tensor:
        found = real(self)
        if ranks.rank == 1:
            found[-1] = math.inf
        return found

    for step in range(3):
        if step == 1 and by_hand:
            pruner.text.batch(step, pruner.domains.weights, recipe.train.batch_rows)
            pruner.engine.lr_scheduler.step()
            continue
        Alive.gradients = gradients if step == 1 else real  # type: ignore[method-assign]
        norms.append(pruner.step(step).grad_norm)
    Alive.gradients = real  # type: ignore[method-assign]
    return {
        "norms": norms,
        "weights": checkpoint.full_state_dict(pruner.engine, pruner.model.lm),
        "masks": pruner.closing.state(),
        "domains": pruner.domains.state(),
        "drawn": pruner.text.drawn,
        "rate": pruner.engine.get_lr(),
    }


def main(path: Path, folder: Path, settings: list[str]) -> None:
    quiet_libraries()
    with Ranks.start() as ranks:
        got, want = (
            run(PruneRecipe.load(path, [*settings, f"output={folder / name}"]), ranks, by_hand=hand)
            for name, hand in (("left-out", False), ("by-hand", True))
        )
        bad = got["norms"].pop(1)
        same: dict[str, bool] = {}
        for group in ("weights", "masks"):
            same |= {n: torch.equal(x, got[group][n]) for n, x in want[group].items()}
        same |= {key: got[key] == want[key] for key in ("norms", "domains", "drawn", "rate")}
        if ranks.is_main:
            (folder / "found.json").write_text(json.dumps({"bad": str(bad), "same": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
