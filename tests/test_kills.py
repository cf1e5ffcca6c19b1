"""Training on two ranks, killed at chosen moments and started again: the same run to the last bit.

The moments are found by what lies in the run folder, while the ranks stand still: a checkpoint is
written as .step-N.partial/{zero, model, state.json}, renamed, and then the old ones are removed.
"""

import os
from itertools import islice
from pathlib import Path

import pytest
import yaml

from drama import checkpoint
from drama.data.sources import read_source
from drama.data.writer import write_shards
from drama.killing import Job, deepspeed_command, digests, steps_done
from drama.recipe import Recipe
from drama.testing import read_metrics

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "launchers" / "train.py"
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"
CLOCKS = ("metrics.jsonl", "tensorboard/*", "model/README.md")
EXACT = ("step", "loss", "loss_by_prefix", "grad_norm", "lr", "tokens", "evaluation")
KEPT, STEPS = 2, 40


def in_zero(run: Path) -> bool:
    """Within the writing of DeepSpeed's files, or just after it."""
    written = [set(path.parts) for path in partial(run)]
    return any("zero" in names for names in written) and not any(
        "model" in names or checkpoint.STATE in names for names in written
    )


def in_model(run: Path) -> bool:
    """After DeepSpeed's files, before state.json: what is there cannot be told to be whole."""
    names = {path.name for path in partial(run)}
    return "model.safetensors" in names and checkpoint.STATE not in names


def before_the_rename(run: Path) -> bool:
    return any(path.name == checkpoint.STATE for path in partial(run))


def before_the_removal(run: Path) -> bool:
    """One more checkpoint than stay."""
    return len(checkpoint.all_checkpoints(run / "checkpoints")) > KEPT


def in_an_evaluation(run: Path) -> bool:
    """While the best model is written."""
    return any(run.glob(".best.partial-*"))


def partial(run: Path) -> list[Path]:
    """What there is of a checkpoint that is being written."""
    found = []
    for folder in (run / "checkpoints").glob(".step-*.partial"):
        for where, _, files in os.walk(folder):
            found += [(Path(where) / name).relative_to(folder) for name in files]
    return found


IN_THE_SAVE = (in_zero, in_model, before_the_rename, before_the_removal)


def killed(command: list[str], run: Path, logs: Path, moment, rank: int | None) -> None:
    with Job(command, logs / f"{moment.__name__}.log") as job:
        job.kill_at(lambda: moment(run), rank)


def losses(run: Path) -> list[dict[str, object]]:
    return [{name: line.get(name) for name in EXACT} for line in read_metrics(run)]


@pytest.mark.slow
def test_rank_1_killed_inside_the_save(world: Path, tmp_path: Path) -> None:
    """The main rank stands between DeepSpeed's files and state.json."""
    run = world / "killed-in-the-save"
    arguments = ("--recipe", str(world / "recipe.yaml"), "--set", f"output={run}")
    # the run that was left alone took what the memory of its moment allowed
    first = Recipe.load(world / "whole" / "recipe.yaml").step.grad_reduction
    other = ("--set", f"step.grad_reduction={first}")  # the second start finds it in the run
    killed(deepspeed_command(TRAIN, *arguments, *other), run, tmp_path, in_model, 1)
    # the step of the kill is no checkpoint, whatever was written of it
    at = steps_done(run)
    assert all(checkpoint.step_of(p) < at for p in checkpoint.all_checkpoints(run / "checkpoints"))
    with Job(deepspeed_command(TRAIN, *arguments), tmp_path / "again.log") as job:
        assert job.ended() == 0, job.said()
    assert losses(run) == losses(world / "whole")
    # the card says the hours, and the recipe with its output
    ours, whole = (digests(path / "model", ("README.md",)) for path in (run, world / "whole"))
    assert ours == whole
    assert not list(run.rglob("*.partial*"))


@pytest.fixture(scope="module", params=["zero1", "zero3"])
def undisturbed(request, world, tmp_path_factory) -> tuple[list[str], Path, Path]:
    """A command, its run folder, and what it gives when it is left alone."""
    folder = tmp_path_factory.mktemp(request.param)
    write_shards(islice(read_source(PAIRS), 160, 192), folder / "held-out")
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    recipe["output"] = str(folder / "run")
    recipe["train"] |= {
        "steps": STEPS, "save_every": 2, "keep_last": KEPT, "deepspeed": request.param,
    }  # fmt: skip
    recipe["step"] = {"grad_reduction": "step"}  # not by the memory of the moment
    recipe["eval"] = {"every": 3, "shards": [str(folder / "held-out")]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = deepspeed_command(TRAIN, "--recipe", str(folder / "recipe.yaml"))
    with Job(command, folder / "whole.log") as job:
        assert job.ended() == 0, job.said()
    os.rename(folder / "run", folder / "whole")
    return command, folder / "run", folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, None])
def test_killed_at_every_moment(undisturbed, tmp_path, rank) -> None:
    """One run, killed in a step, inside the save and in an evaluation; then left to end."""
    command, run, whole = undisturbed
    if run.exists():
        os.rename(run, tmp_path / "of-the-test-before")

    def in_a_step(run: Path) -> bool:
        return steps_done(run) >= 5 and not partial(run)

    for moment in (in_a_step, *IN_THE_SAVE, in_an_evaluation):
        killed(command, run, tmp_path, moment, rank)
    with Job(command, tmp_path / "last.log") as job:
        assert job.ended() == 0, job.said()
        assert "resumed at step" in job.said()
    assert losses(run) == losses(whole)
    assert digests(run, CLOCKS) == digests(whole, CLOCKS)
