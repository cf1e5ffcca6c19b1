"""Where a run begins, how long it is, and when it has to stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from drama import checkpoint
from drama.console import console
from drama.distributed import Ranks
from drama.errors import UserError
from drama.files import locked
from drama.optimizer import Pace
from drama.settings import Schedule

LOCK = ".lock"
LEAVING_S = 60.0  # a run that was told to end may still save, though its launcher is gone


@contextmanager
def alone_in(output: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other runs out of the folder `output` while this one is there. A collective.

    Raises:
        UserError: another run is there, and still is after a minute; or no folder can be made.
    """
    new = ranks.is_main and not output.exists()
    with ExitStack() as stack:

        def hold() -> None:
            try:
                output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(output / LOCK))
            except UserError:
                console.print(
                    f"another run is in {output}; waiting for its end, {LEAVING_S:.0f} s at most",
                    markup=False, soft_wrap=True, highlight=False,
                )  # fmt: skip
                stack.enter_context(locked(output / LOCK, LEAVING_S))
            except OSError as error:
                raise UserError(
                    f"output {output} cannot be written: {error.strerror}; choose another"
                ) from None

        ranks.on_main(hold)
        try:
            yield
        finally:
            with suppress(OSError):
                if new and [path.name for path in output.iterdir()] == [LOCK]:
                    (output / LOCK).unlink()
                    output.rmdir()


def count_steps(steps: int | None, epochs: float | None, batches_per_epoch: int) -> int:
    """Steps of a recipe that gives one of the two."""
    if steps is not None:
        return steps
    assert epochs is not None
    return max(1, math.ceil(epochs * batches_per_epoch))


def named_start(output: Path, resume: str) -> Path | None:
    """The checkpoint of another run that a run without any of its own is to begin from.

    resume: "auto", "none" (refuse to go on with anything), or that checkpoint's folder. Once the
    run has a checkpoint the same command goes on from there.

    Raises:
        UserError: no checkpoint there; one of this very run, whose later ones would be lost; or
            "none" where the run has some.
    """
    own = checkpoint.all_checkpoints(output / "checkpoints")
    if resume == "none" and own:
        raise UserError(
            f"--resume none: {output} holds {len(own)} checkpoints, the newest is {own[-1].name}; "
            "give another output, or leave --resume out to go on"
        )
    if resume in ("auto", "none"):
        return None
    path = Path(resume)
    if path.resolve().parent == (output / "checkpoints").resolve():
        raise UserError(
            f"--resume {path}: a run goes on from its newest checkpoint; give another output to "
            "go on from this one, nothing is removed then"
        )
    if path not in checkpoint.all_checkpoints(path.parent):
        raise UserError(
            f"--resume {path}: no checkpoint; give auto, none or a folder such as "
            "RUN/checkpoints/step-500"
        )
    if names := checkpoint.missing(path):
        raise UserError(
            f"--resume {path}: {', '.join(names[:3])} cut, changed or missing; name another"
        )
    return None if own else path


def choose_start(
    output: Path, train: Schedule, num_steps: int, ranks: Ranks, *, named: Path | None = None
) -> tuple[Path | None, Pace]:
    """The newest sound checkpoint from which the recipe's learning rates go on, and the pace.

    A run that was prolonged leaves its decay out: it goes on from the flat part. A collective.
    named: of another run, the only one to go on from.

    Raises:
        UserError: there are checkpoints, but none to go on from.
    """
    newest = None
    for path in sound_checkpoints(output / "checkpoints", ranks, named):
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
            f"{named or output} was a run of {earlier.num_steps} steps, and all its checkpoints "
            f"lie where the learning rates of {num_steps} steps are others; give "
            f"{earlier.num_steps} steps again, or another output"
        )
    return None, Pace.of(train, num_steps)


def sound_checkpoints(folder: Path, ranks: Ranks, named: Path | None = None) -> Iterator[Path]:
    """Checkpoints that hold what was written, newest first; those that do not are named. What a
    killed run has left half written or half removed goes.

    Every file of a checkpoint is read before it is given; a collective. named: instead of all that
    are in the folder.

    Raises:
        UserError: there are checkpoints, but not one is sound.
    """
    found, faulty = [named] if named else checkpoint.all_checkpoints(folder), ""
    num_sound = 0
    if ranks.is_main:
        checkpoint.tidy(folder)
    for path in reversed(found):
        names: list[str] = []

        def read(path: Path = path, names: list[str] = names) -> None:
            names.extend(checkpoint.faults(path))

        ranks.on_main(read)
        if not ranks.sum(len(names)):
            num_sound += 1
            yield path
            continue
        faulty = f"{', '.join(names[:3])} cut, changed, missing or not its own"
        console.print(
            f"warning: {path} is damaged and left alone: {faulty}",
            style="yellow", markup=False, soft_wrap=True, highlight=False,
        )  # fmt: skip
    if found and not num_sound:
        raise UserError(
            f"{named or folder} holds no sound checkpoint ({found[0].name}: {faulty}); "
            + ("name another" if named else "remove it to train from the beginning")
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
