"""Joining the ranks: what a stopped compile leaves behind must not stop the next run."""

import hashlib
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from drama.distributed import (
    Ranks,
    _check_alone,
    _gloo_runs,
    _is_open,
    _let_gloo_finish,
    _prepare_extensions,
    free_port,
)
from drama.errors import UserError


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "deepspeed_shm_comm").mkdir()
    return tmp_path / "deepspeed_shm_comm"


def test_a_lock_that_nobody_holds_is_dropped(extensions):
    lock = extensions / "lock"
    lock.touch()
    _prepare_extensions(local_rank=1)  # only one rank of a machine cleans up
    assert lock.exists()
    _prepare_extensions(local_rank=0)
    assert not lock.exists()


def test_a_lock_that_is_held_stays(extensions):
    """As torch holds it: created and kept open until the compile is done."""
    lock = extensions / "lock"
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)
    try:
        assert _is_open(lock)
        _prepare_extensions(local_rank=0)
        assert lock.exists()
    finally:
        os.close(descriptor)
    assert not _is_open(lock)


@pytest.mark.parametrize(
    ("program", "variables"),
    [
        ("srun", {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}),
        ("srun", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}),
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}),
        ("mpirun", {"PMI_SIZE": "2", "PMI_RANK": "0"}),
    ],
)
def test_tasks_without_a_launcher_of_ranks_are_refused(monkeypatch, program, variables):
    """Two of them would train into one folder."""
    monkeypatch.delenv("RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{program} started 2 tasks.*torchrun"), Ranks.start():
        pass
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # a batch script
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_one_task_is_alone(variables):
    _check_alone(variables)


def test_free_ports_are_ports():
    assert 1024 <= free_port() < 65536


def test_buffers_that_a_killed_run_left_are_dropped(extensions):
    """A mapped one stays, and so does one that may be about to be mapped."""
    names = (f"deepspeed_allreduce_buffer_{os.getuid()}_test-{kind}_1_0" for kind in "abc")
    left, mapped, young = (Path("/dev/shm") / name for name in names)
    try:
        for path in (left, mapped, young):
            path.write_bytes(bytes(4096))
        for path in (left, mapped):
            os.utime(path, (0, 0))
        with mapped.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            _prepare_extensions(local_rank=0)
        assert not left.exists()
        assert mapped.exists()
        assert young.exists()
    finally:
        for path in (left, mapped, young):
            path.unlink(missing_ok=True)


def test_the_end_waits_for_threads_of_gloo():
    """Not before such a thread sleeps may the interpreter end."""
    named, done, go_on = threading.Event(), threading.Event(), threading.Event()
    work = bytes(50_000_000)

    def run():
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("pt_gloo_runloop")
        named.set()
        hashlib.sha256(work).digest()  # without the interpreter's lock
        done.set()
        go_on.wait()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert named.wait(10)
        _let_gloo_finish()
        assert done.is_set()
        time.sleep(0.1)
        assert not _gloo_runs(), "a thread that waits is none to wait for"
    finally:
        go_on.set()
        thread.join()


def test_gloos_threads_have_the_name_that_is_looked_for(tmp_path):
    """Torch names them; were it to rename them, nobody would be waited for."""
    code = (
        "import torch, torch.distributed as dist, time; from pathlib import Path\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, "
        "world_size=1)\n"
        "dist.all_reduce(torch.ones(1)); time.sleep(0.5)\n"
        "print(*(p.read_text().strip() for p in Path('/proc/self/task').glob('*/comm')))\n"
        "dist.destroy_process_group()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pt_gloo_runloop" in done.stdout.split()
