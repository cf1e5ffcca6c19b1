"""Which checkpoints are whole, and which stay."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from drama.checkpoint import STATE, faults, save, whole_checkpoints


def write(folder: Path, step: int, keep_last: int = 2, flat_until: int = 0) -> None:
    """A checkpoint of an engine that writes one file."""

    def save_checkpoint(path: str, **_: object) -> None:
        (Path(path) / "zero").mkdir()
        (Path(path) / "zero" / "weights.pt").write_bytes(b"weights")

    engine = SimpleNamespace(global_rank=0, world_size=1, save_checkpoint=save_checkpoint)
    save(
        *(engine, folder, step),
        inputs={}, extra={}, keep_last=keep_last, flat_until=flat_until,
        write_model=lambda path: path.mkdir(),
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    return [path.name for path in whole_checkpoints(folder)]


def test_the_last_ones_stay(tmp_path):
    for step in (8, 9, 10):
        write(tmp_path, step)
    assert names(tmp_path) == ["step-9", "step-10"]
    assert len(list(tmp_path.iterdir())) == 2


def test_the_newest_of_the_flat_part_stays_too(tmp_path):
    for step in range(1, 9):
        write(tmp_path, step, flat_until=4)
    assert names(tmp_path) == ["step-4", "step-7", "step-8"]


def test_what_a_run_left_behind_goes_when_it_went_on_from_an_earlier_one(tmp_path):
    """Else the new checkpoint would be the oldest, and the first to be removed."""
    for step in (4, 8, 9):
        write(tmp_path, step, keep_last=3)
    write(tmp_path, 5, keep_last=1)
    assert names(tmp_path) == ["step-5"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 3}', None])
def test_one_without_a_readable_state_is_not_whole(tmp_path, content):
    for step in (2, 4):
        write(tmp_path, step)
    state = tmp_path / "step-4" / STATE
    if content is None:
        state.unlink()
    else:
        state.write_text(content)
    assert names(tmp_path) == ["step-2"]
    assert faults(tmp_path / "step-4") == [STATE]


def test_one_with_a_file_of_another_size_is_not_whole(tmp_path):
    write(tmp_path, 2)
    (tmp_path / "step-2" / "zero" / "weights.pt").write_bytes(b"weigh")
    assert faults(tmp_path / "step-2") == ["zero/weights.pt"]
    assert json.loads((tmp_path / "step-2" / STATE).read_text())["step"] == 2
    (tmp_path / "step-x").mkdir()  # somebody else's
    assert names(tmp_path) == []
