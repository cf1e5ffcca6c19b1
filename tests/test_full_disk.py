"""A file system that is full while a run saves: the last checkpoint stays whole, and it is said."""

import subprocess
from pathlib import Path

import pytest

from drama.checkpoint import faults, whole_checkpoints
from drama.testing import read_metrics, run_deepspeed

TRAIN = Path(__file__).parents[1] / "launchers" / "train.py"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def small_disk(world, tmp_path):
    """A file system of its own, with room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = int(1.5 * size_of(world / "whole" / "checkpoints" / "step-9")) + 300_000
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system takes the right to mount one: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("ballast", "on_full_disk", "saved"),
    [
        (0, "go_on", ["step-2"]),  # known before it is written
        pytest.param(0, "stop", ["step-2"], marks=pytest.mark.slow),
        pytest.param(0.8, "go_on", [], marks=pytest.mark.slow),  # found out while it is written
    ],
)
def test_the_last_checkpoint_stays_whole(world, small_disk, ballast, on_full_disk, saved):
    run = small_disk / "run"
    room = size_of(world / "whole" / "checkpoints" / "step-9")
    (small_disk / "ballast").write_bytes(b"\0" * int(ballast * room))
    done = run_deepspeed(
        TRAIN, "--recipe", str(world / "recipe.yaml"), "--set", f"output={run}",
        "--set", "train.save_every=2", "--set", "train.steps=6", "--set", "data.workers=0",
        "--set", f"train.on_full_disk={on_full_disk}",
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 2, said[-3000:]
    assert "Traceback" not in said
    (line,) = [x for x in said.splitlines() if x.startswith("train: error:")]
    assert "the disk is full" in line
    assert "are free" in line
    at = "step-6" if on_full_disk == "go_on" else "step-4"
    assert f"{run / 'checkpoints' / at}:" in line
    found = whole_checkpoints(run / "checkpoints")
    assert [path.name for path in found] == saved
    assert not any(faults(path) for path in found)
    assert [path.name for path in (run / "checkpoints").iterdir()] == saved
    going_on = said.count("training goes on and tries again")
    assert going_on == ({0: 1, 0.8: 2}[ballast] if on_full_disk == "go_on" else 0)
    assert len(read_metrics(run)) == (6 if on_full_disk == "go_on" else 4)
