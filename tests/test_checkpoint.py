"""Which checkpoints are whole, and which stay."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drama.checkpoint import STATE, Keep, faults, missing, save, whole_checkpoints
from drama.distributed import Ranks
from drama.errors import UserError
from drama.resume import sound_checkpoints


def write(folder: Path, step: int, last: int = 2, **keep: int) -> None:
    """A checkpoint of an engine that writes one file."""

    def save_checkpoint(path: str, **_: object) -> None:
        (Path(path) / "zero").mkdir()
        (Path(path) / "zero" / "weights.pt").write_bytes(b"weights")

    engine = SimpleNamespace(
        global_rank=0,
        world_size=1,
        save_checkpoint=save_checkpoint,
        checkpoint_engine=SimpleNamespace(save=None),
    )
    save(
        *(engine, folder, step),
        inputs={}, extra={"seen": {3: (0.1, 2)}}, keep=Keep(last, **keep),
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


def test_those_of_every_so_many_steps_stay_for_good(tmp_path):
    for step in (2, 3, 4, 6, 8, 9, 10):
        write(tmp_path, step, last=1, every=4)
    assert names(tmp_path) == ["step-4", "step-8", "step-10"]


def test_what_a_run_left_behind_goes_when_it_went_on_from_an_earlier_one(tmp_path):
    """Else the new checkpoint would be the oldest, and the first to be removed."""
    for step in (4, 8, 9):
        write(tmp_path, step, last=3)
    write(tmp_path, 5, last=1)
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
    assert missing(tmp_path / "step-4") == [STATE]


def test_one_with_a_file_of_another_size_is_not_whole(tmp_path):
    write(tmp_path, 2)
    (tmp_path / "step-2" / "zero" / "weights.pt").write_bytes(b"weigh")
    assert missing(tmp_path / "step-2") == ["zero/weights.pt"]
    assert json.loads((tmp_path / "step-2" / STATE).read_text())["step"] == 2
    (tmp_path / "step-x").mkdir()  # somebody else's
    assert names(tmp_path) == []


ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("name", ["zero/weights.pt", STATE])
def test_every_flipped_bit_is_found_and_the_checkpoint_before_it_taken(tmp_path, capfd, name):
    for step in (2, 4):
        write(tmp_path, step)
    path = tmp_path / "step-4" / name
    content = path.read_bytes()
    assert [p.name for p in sound_checkpoints(tmp_path, ALONE)] == ["step-4", "step-2"]
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        assert faults(tmp_path / "step-4") == [name]
    assert [p.name for p in sound_checkpoints(tmp_path, ALONE)] == ["step-2"]
    assert f"step-4 is damaged and left alone: {name} cut, changed" in capfd.readouterr().err
    (tmp_path / "step-2" / STATE).unlink()
    with pytest.raises(UserError, match=r"no sound checkpoint \(step-2: state.json cut"):
        list(sound_checkpoints(tmp_path, ALONE))
