"""Where a run begins, how long it is, and when it has to stop."""

from __future__ import annotations

import math
from pathlib import Path

from drama import checkpoint
from drama.console import console
from drama.distributed import Ranks
from drama.errors import UserError
from drama.optimizer import Pace
from drama.settings import Schedule


def count_steps(steps: int | None, epochs: float | None, batches_per_epoch: int) -> int:
    """Steps of a recipe that gives one of the two."""
    if steps is not None:
        return steps
    assert epochs is not None
    return max(1, math.ceil(epochs * batches_per_epoch))


def choose_start(output: Path, train: Schedule, num_steps: int) -> tuple[Path | None, Pace]:
    """The newest whole checkpoint from which the recipe's learning rates go on, and the pace.

    A run that was prolonged leaves its decay out: it goes on from the flat part.

    Raises:
        UserError: there are checkpoints, but none to go on from.
    """
    found = checkpoint.whole_checkpoints(output / "checkpoints")
    for path in reversed(found):
        state = checkpoint.read_state(path)
        earlier = Pace(*state["extra"]["pace"])
        pace = Pace.of(train, num_steps, earlier.warmup)
        if pace.follows(earlier, state["step"]):
            if path != found[-1]:
                console.print(
                    f"going on from {path.name}, the newest checkpoint before the learning "
                    f"rates of {earlier.num_steps} and of {num_steps} steps part"
                )
            return path, pace
    if found:
        raise UserError(
            f"{output} was a run of {earlier.num_steps} steps, and all its checkpoints lie "
            f"where the learning rates of {num_steps} steps are others; give "
            f"{earlier.num_steps} steps again, or another output"
        )
    return None, Pace.of(train, num_steps)


def prolongable(train: Schedule) -> set[str]:
    """Keys of `train` that may differ when a run goes on, where its rates do not look at the end
    all along."""
    return {"steps", "epochs"} if train.schedule in ("wsd", "constant") else set()


def check_finite(
    ranks: Ranks, output: Path, step: int, rate: str = "", /, **figures: float
) -> None:
    """Stop a run that has diverged before its weights are written anywhere: what was saved earlier
    is all that is left of it. A collective. rate: another key of the recipe that may be too high.

    Raises:
        UserError: a figure of this step is no number, on whichever rank.
    """
    wrong = [f"{name} {value}" for name, value in figures.items() if not math.isfinite(value)]
    if not ranks.sum(len(wrong)):
        return
    saved = checkpoint.whole_checkpoints(output / "checkpoints")
    raise UserError(
        f"step {step} diverged ({', '.join(wrong) or 'on another rank'}) and nothing of it is "
        f"saved; the last good checkpoint: {saved[-1] if saved else 'none yet'}; lower train.lr"
        f"{f' or {rate}' if rate else ''}, or lengthen the warm-up, in another output"
    )
