"""A run that is stopped and started again, and a folder that holds one run at a time."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from drama import resume
from drama.distributed import Ranks, free_port
from drama.errors import UserError
from drama.files import locked
from drama.resume import LOCK, alone_in
from drama.testing import read_metrics, run_alone, run_deepspeed

TRAIN = Path(__file__).parents[1] / "launchers" / "train.py"
STEPS = 9  # of the fixture `world`

ALONE = Ranks(0, 1, torch.device("cpu"))
HOLDER = """
import sys, time
from drama.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(run: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process in the folder: a lock of this process is none against itself."""
    run.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run / LOCK), str(seconds)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_waits_for_the_first(tmp_path, capsys):
    with holder(tmp_path / "run", 1.0), alone_in(tmp_path / "run", ALONE):
        pass
    assert f"another run is in {tmp_path / 'run'}; waiting for its end" in capsys.readouterr().err


def test_a_second_run_is_refused_where_the_first_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "LEAVING_S", 0.5)
    with holder(tmp_path / "run", 60.0) as other:
        with (
            pytest.raises(UserError, match=f"{tmp_path / 'run'}: another job is writing there"),
            alone_in(tmp_path / "run", ALONE),
        ):
            pass
        other.kill()


def test_a_run_that_never_began_leaves_no_folder(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="refused"), alone_in(run, ALONE):
        raise UserError("refused")
    assert not run.exists()
    with alone_in(run, ALONE):
        (run / "recipe.yaml").touch()
    assert (run / "recipe.yaml").exists()
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"output .*file/run cannot be written: .*; choose another"),
        alone_in(tmp_path / "file" / "run", ALONE),
    ):
        pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("drama.files.fcntl.lockf", refuse)
    with locked(tmp_path / LOCK):
        pass


def start_until(world: Path, run: Path, num_steps: int) -> subprocess.Popen[str]:
    """Two ranks that train, and have taken so many steps in all."""
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2",
        "--master_port", str(free_port()), str(TRAIN),
        "--recipe", str(world / "recipe.yaml"), "--set", f"output={run}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and len(read_metrics(run)) >= num_steps:
            break
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be stopped"
    return process


def test_stopped_and_killed_and_started_again_it_gives_the_same_losses_to_the_last_bit(world):
    """SIGTERM between two checkpoints, then `kill -9` of both ranks at once."""
    run = world / "killed"
    process = start_until(world, run, 1)
    for child in psutil.Process(process.pid).children(recursive=True):
        command = " ".join(child.cmdline())
        if (
            "train.py" in command and "deepspeed.launcher" not in command
        ):  # the ranks and their readers
            child.terminate()
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    (stopped,) = re.findall(r"stopped by a signal after step (\d)", said)
    saved = [path.name for path in (run / "checkpoints").iterdir()]
    assert f"step-{stopped}" in saved
    assert len(read_metrics(run)) == int(stopped) < STEPS

    process = start_until(world, run, 6)
    os.killpg(process.pid, signal.SIGKILL)
    said, _ = process.communicate()
    assert f"resumed at step {stopped}" in said
    done = run_deepspeed(TRAIN, "--recipe", str(world / "recipe.yaml"), "--set", f"output={run}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resumed at step" in done.stdout + done.stderr
    losses = [
        [line["loss_by_prefix"] for line in read_metrics(folder)]
        for folder in (run, world / "whole")
    ]
    assert losses[0] == losses[1]
    weights = [load_file(r / "model" / "model.safetensors") for r in (run, world / "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_start_waits_until_it_has(world):
    run = world / "interrupted"
    command = [sys.executable, str(TRAIN), "--recipe", str(world / "recipe.yaml")]
    command += ["--set", f"output={run}", "--set", "train.save_every=100"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        while not (run / "metrics.jsonl").is_file() or not read_metrics(run):
            assert first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)
        second = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        said = first.communicate(timeout=60)[1]
    assert first.returncode == 0, said[-3000:]
    (step,) = re.findall(r"stopped by a signal after step (\d)", said)
    assert int(step) < STEPS
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"resumed at step {step}" in second.stderr
    assert len(read_metrics(run)) == STEPS


@pytest.mark.parametrize("deepspeed", [pytest.param("zero0", marks=pytest.mark.slow), "zero2"])
def test_a_finished_run_goes_on_from_its_checkpoint_alone(world, deepspeed):
    """Weights and optimizer come from the files: the losses equal an unbroken longer run's."""
    options = [
        "--recipe", str(world / "recipe.yaml"), "--set", "train.schedule=constant",
        "--set", f"train.deepspeed={deepspeed}", "--set", "train.warmup_ratio=0",
        "--set", "data.workers=0",
        "--set", f"train.precision={'bf16' if deepspeed == 'zero2' else 'fp32'}",
    ]  # fmt: skip
    unbroken, cut = world / f"unbroken-{deepspeed}", world / f"cut-{deepspeed}"
    for run, steps in ((unbroken, 4), (cut, 2)):
        done = run_alone(TRAIN, *options, "--set", f"output={run}", "--set", f"train.steps={steps}")
        assert done.returncode == 0, done.stderr[-3000:]
    done = run_alone(TRAIN, *options, "--set", f"output={cut}", "--set", "train.steps=4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step 2" in done.stderr
    assert [x["loss"] for x in read_metrics(cut)] == [x["loss"] for x in read_metrics(unbroken)]
    norms = [x["grad_norm"] for x in read_metrics(unbroken)]
    np.testing.assert_allclose(norms[0], read_metrics(world / "whole")[0]["grad_norm"], rtol=0.03)
