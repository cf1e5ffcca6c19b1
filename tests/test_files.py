from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drama.errors import UserError
from drama.files import recovered, replacing, replacing_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_halfway(target: Path, fault: type[BaseException]) -> None:
    with replacing(target) as temporary:
        temporary.write_text("half")
        raise fault


def stop_halfway_in_folder(target: Path, fault: type[BaseException]) -> None:
    with replacing_folder(target) as temporary:
        (temporary / "a").write_text("half")
        raise fault


def test_a_file_is_replaced_and_parents_are_made(tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "file.txt"
    for text in ("first", "second"):
        with replacing(target) as temporary:
            assert temporary.parent == target.parent  # a rename does not cross disks
            temporary.write_text(text)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == text
    assert names(target.parent) == ["file.txt"]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_an_error_keeps_the_old_file(tmp_path: Path, fault: type[BaseException]) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(fault):
        stop_halfway(target, fault)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_an_error_before_the_first_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        stop_halfway(tmp_path / "file.txt", RuntimeError)
    assert names(tmp_path) == []


def test_a_file_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert target.read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "folder"
    with replacing_folder(target) as temporary:
        (temporary / "a").write_text("1")
        (temporary / "only-old").write_text("1")
        assert not target.exists()
    with replacing_folder(target) as temporary:
        assert names(temporary) == []
        (temporary / "a").write_text("2")
        assert names(target) == ["a", "only-old"]
    assert names(target) == ["a"]
    assert (target / "a").read_text() == "2"
    assert names(target.parent) == ["folder"]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_an_error_keeps_the_old_folder(tmp_path: Path, fault: type[BaseException]) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(fault):
        stop_halfway_in_folder(target, fault)
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["folder"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_place_that_takes_no_folder_is_named() -> None:
    with (
        pytest.raises(UserError, match="no folder can be made in /proc"),
        replacing_folder("/proc/model"),
    ):
        pytest.fail("nothing is there to write to")


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(FileNotFoundError), replacing_folder(target) as temporary:
        temporary.rmdir()
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_what_a_killed_process_with_this_number_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / f".folder.partial-{os.getpid()}"
    left.mkdir()
    (left / "stale").write_text("half")
    with replacing_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("new")
    assert names(tmp_path / "folder") == ["a"]
    assert names(tmp_path) == ["folder"]


def test_a_file_that_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    """Of this machine only, and not of one that runs."""
    killed = (
        "import os, sys\nfrom drama.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), 9)"
    )
    for name in ("a [1].json", "b.json"):
        done = subprocess.run([sys.executable, "-c", killed, str(tmp_path / name)], timeout=60)
        assert done.returncode == -9
    left_a, left_b = sorted(tmp_path.iterdir())
    runs = left_a.with_name(left_a.name.rpartition("-")[0] + f"-{os.getppid()}")
    elsewhere = tmp_path / ".a [1].json.partial-elsewhere-999999999"
    for path in (runs, elsewhere):
        path.write_text("somebody's")
    with replacing(tmp_path / "a [1].json") as temporary:
        temporary.write_text("new")
    left = {runs.name, elsewhere.name, left_b.name, "a [1].json"}
    assert {path.name for path in tmp_path.iterdir()} == left


KILLED = """
import os, sys
from pathlib import Path
from drama.files import replacing_folder

real, renames = os.replace, []

def replace(source, target):
    if renames:
        os._exit(1)
    renames.append(real(source, target))

os.replace = replace
with replacing_folder(sys.argv[1]) as temporary:
    (temporary / "a").write_text("new")
"""


def test_the_old_folder_is_back_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "a").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False, timeout=60)
    assert done.returncode == 1
    assert not target.exists()
    recovered(target)
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["folder"]
    subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False, timeout=60)
    with pytest.raises(RuntimeError):
        stop_halfway_in_folder(target, RuntimeError)
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_what_a_running_process_writes_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".folder.partial-{os.getppid()}"
    other.mkdir()
    foreign = tmp_path / ".folder.old-mine"
    foreign.mkdir()
    with replacing_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("new")
    assert names(tmp_path) == sorted([other.name, foreign.name, "folder"])
