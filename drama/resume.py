"""Where a run begins, how long it is, and when it has to stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
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


def choose_start(
    output: Path, train: Schedule, num_steps: int, ranks: Ranks
) -> tuple[Path | None, Pace]:
    """The newest sound checkpoint from which the recipe's learning rates go on, and the pace.

    A run that was prolonged leaves its decay out: it goes on from the flat part. A collective.

    Raises:
        UserError: there are checkpoints, but none to go on from.
    """
    newest = None
    for path in sound_checkpoints(output / "checkpoints", ranks):
        newest = newest or path
        state = checkpoint.read_state(path)
        earlier = Pace(*state["extra"]["pace"])
        pace = Pace.of(train, num_steps, earlier.warmup)
        if pace.follows(earlier, state["step"]):
            if path != newest:
                console.print(
                    f"going on from {path.name}, the newest checkpoint before the learning "
                    f"rates of {earlier.num_steps} and of {num_steps} steps part"
                )
            return path, pace
    if newest:
        raise UserError(
            f"{output} was a run of {earlier.num_steps} steps, and all its checkpoints lie "
            f"where the learning rates of {num_steps} steps are others; give "
            f"{earlier.num_steps} steps again, or another output"
        )
    return None, Pace.of(train, num_steps)


def sound_checkpoints(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """Checkpoints that hold what was written, newest first; those that do not are named.

    Every file of a checkpoint is read before it is given; a collective.

    Raises:
        UserError: there are checkpoints, but not one is sound.
    """
    found, faulty = checkpoint.all_checkpoints(folder), ""
    num_sound = 0
    for path in reversed(found):
        names: list[str] = []

        def read(path: Path = path, names: list[str] = names) -> None:
            names.extend(checkpoint.faults(path))

        ranks.on_main(read)
        if not ranks.sum(len(names)):
            num_sound += 1
            yield path
            continue
        faulty = f"{path.name}: {', '.join(names[:3])}"
        console.print(
            f"[yellow]warning:[/] {path} is damaged and left alone: {', '.join(names[:3])} "
            "cut, changed or missing",
            soft_wrap=True,
            highlight=False,
        )
    if found and not num_sound:
        raise UserError(
            f"{folder} holds no sound checkpoint ({faulty} cut, changed or missing); remove it to "
            "train from the beginning"
        )


def prolongable(train: Schedule) -> set[str]:
    """Keys of `train` that may differ when a run goes on, where its rates do not look at the end
    all along."""
    return {"steps", "epochs"} if train.schedule in ("wsd", "constant") else set()


def check_finite(ranks: Ranks, output: Path, step: int, /, **figures: float) -> None:
    """Stop a run whose evaluation is no number before its weights are written anywhere: what was
    saved earlier is all that is left of it. A collective.

    Raises:
        UserError: a figure is no number, on whichever rank.
    """
    wrong = [f"{name} {value}" for name, value in figures.items() if not math.isfinite(value)]
    if not ranks.sum(len(wrong)):
        return
    saved = checkpoint.whole_checkpoints(output / "checkpoints")
    raise UserError(
        f"step {step} diverged ({', '.join(wrong) or 'on another rank'}) and nothing of it is "
        f"saved; the last good checkpoint: {saved[-1] if saved else 'none yet'}; lower train.lr, "
        "or lengthen the warm-up, in another output"
    )
