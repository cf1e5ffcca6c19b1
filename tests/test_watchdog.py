"""A rank that dies or hangs ends all ranks with a line that names it; a slow one does not."""

import re
from pathlib import Path

import pytest

from drama.checkpoint import faults, whole_checkpoints
from drama.testing import run_deepspeed

WORKER = Path(__file__).parent / "workers" / "trouble.py"
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("what", "rank", "how", "phase"),
    [
        pytest.param("kill", 0, "has died;", "step", marks=slow),
        ("kill", 1, "has died;", "step"),
        pytest.param("stop", 0, "is silent for", "step", marks=slow),
        pytest.param("stop", 1, "is silent for", "step", marks=slow),
        pytest.param("loader", 0, "hangs", "data", marks=slow),
        pytest.param("loader", 1, "hangs", "data", marks=slow),
    ],
)
def test_a_rank_in_trouble_is_named_and_all_end(world, tmp_path, what, rank, how, phase):
    run = tmp_path / "run"
    done = run_deepspeed(
        WORKER, str(world / "recipe.yaml"), what, str(rank), f"output={run}",
        f"train.stuck_after={8 if how == 'hangs' else 30}", "train.save_every=4",
        "data.workers=0", timeout=240,
    )  # fmt: skip
    assert done.returncode != 0
    said = done.stdout + done.stderr
    lines = re.findall(r"watchdog: rank \d: (.*)", said)
    assert lines, said[-3000:]
    for line in lines:
        assert line.startswith(f"rank {rank} on "), line
        assert how in line, line
        assert f"last in step 5, {phase}," in line, line
    (saved,) = whole_checkpoints(run / "checkpoints")
    assert saved.name == "step-4"
    assert not faults(saved)


def test_a_slow_evaluation_is_no_hang(world, tmp_path):
    done = run_deepspeed(
        WORKER, str(world / "recipe.yaml"), "slow", "1", f"output={tmp_path / 'run'}",
        "train.stuck_after=4", "train.steps=6", "data.workers=0", timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "watchdog" not in done.stdout + done.stderr
