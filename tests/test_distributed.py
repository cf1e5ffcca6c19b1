"""Joining the ranks: what a stopped compile leaves behind must not stop the next run."""

import os

import pytest

from drama.distributed import _is_open, _prepare_extensions, free_port


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


def test_free_ports_are_ports():
    assert 1024 <= free_port() < 65536
