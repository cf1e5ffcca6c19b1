"""One run at a time in a folder, and nothing left of one that never began."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drama import resume
from drama.distributed import Ranks
from drama.errors import UserError
from drama.files import locked
from drama.resume import LOCK, alone_in

ALONE = Ranks(0, 1, torch.device("cpu"))
HOLDER = """
import sys, time
from pathlib import Path
from drama.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
Path(sys.argv[1]).with_name("left").touch()
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
