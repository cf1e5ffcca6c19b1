"""Training in which a rank gets into trouble at step 5.

usage: trouble.py RECIPE kill|stop|loader|slow RANK [KEY=VALUE...]
"""

import os
import signal
import sys
import time
from typing import Any

from drama import watchdog
from drama.console import quiet_libraries
from drama.data.batches import RankBatches
from drama.errors import exit_on_user_error
from drama.gradcache import GradCache
from drama.recipe import Recipe
from drama.trainer import Trainer, train

STEP = 5


def main(path: str, what: str, rank: int, overrides: list[str]) -> None:
    mine = int(os.environ["RANK"]) == rank
    real_replay, real_read, real_evaluate = (
        GradCache._replay, RankBatches.__getitem__, Trainer._evaluate,
    )  # fmt: skip
    steps = [0]

    def replay(self: GradCache, *args: Any) -> None:
        if mine and steps[0] == STEP and what in ("kill", "stop"):
            time.sleep(3)  # it says where it is once a second
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        steps[0] += 1
        real_replay(self, *args)

    def read(self: RankBatches, step: int) -> Any:
        if mine and step == STEP and what == "loader":
            time.sleep(3600)
        return real_read(self, step)

    def evaluate(self: Trainer, done: int) -> Any:
        if mine and done == STEP and what == "slow":
            time.sleep(8)
        return real_evaluate(self, done)

    GradCache._replay, RankBatches.__getitem__ = replay, read  # type: ignore[method-assign]
    Trainer._evaluate = evaluate  # type: ignore[method-assign]
    watchdog.SILENT_S = 5.0
    quiet_libraries()
    with exit_on_user_error("train"):
        train(Recipe.load(path, overrides))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
