"""Training whose loss or held-out loss is no number from one step on.

usage: diverge.py RECIPE step|evaluation FIRST [KEY=VALUE...]
"""

import math
import sys
from dataclasses import replace
from typing import Any

from drama.console import quiet_libraries
from drama.errors import exit_on_user_error
from drama.gradcache import GradCache
from drama.loss import ContrastiveLoss
from drama.recipe import Recipe
from drama.trainer import train


def main(path: str, what: str, first: int, overrides: list[str]) -> None:
    real_step, real_evaluate, steps = GradCache.step, GradCache.evaluate, [0]
    real_loss = ContrastiveLoss.__call__

    def step(self: GradCache, batch: Any) -> Any:
        steps[0] += 1
        if what == "step" and steps[0] > first:
            ContrastiveLoss.__call__ = loss  # type: ignore[method-assign]
        output = real_step(self, batch)
        ContrastiveLoss.__call__ = real_loss  # type: ignore[method-assign]
        return output

    def loss(self: ContrastiveLoss, *arguments: Any) -> Any:
        return replace(real_loss(self, *arguments), loss=math.nan)

    def evaluate(self: GradCache, batch: Any) -> float:
        diverged = what == "evaluation" and steps[0] > first
        return math.nan if diverged else real_evaluate(self, batch)

    GradCache.step, GradCache.evaluate = step, evaluate  # type: ignore[method-assign]
    quiet_libraries()
    with exit_on_user_error("train"):
        train(Recipe.load(path, overrides))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
