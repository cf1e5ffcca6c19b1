"""Which checkpoints are whole, and which stay."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drama.checkpoint import STATE, Keep, faults, load, missing, save, whole_checkpoints
from drama.distributed import Ranks
from drama.errors import UserError
from drama.recipe import Recipe
from drama.resume import named_start, sound_checkpoints

ALONE = Ranks(0, 1, torch.device("cpu"))
RECIPE = Recipe.from_tree(
    {
        "name": "tiny",
        "output": "runs/tiny",
        "model": {"path": "model"},
        "data": {"shards": ["shards"]},
        "train": {"steps": 9, "batch_size": 64},
    }
)


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
        recipe=RECIPE, inputs={"shards": "abc"}, extra={"seen": {3: (0.1, 2)}},
        keep=Keep(last, **keep),
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


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(tmp_path, monkeypatch):
    """Half of it would stay for good, and every start would warn of a damaged checkpoint."""
    for step in (2, 4):
        write(tmp_path, step)
    real = shutil.rmtree

    def killed(path: Path, **options: object) -> None:
        (path / "zero" / "weights.pt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 6)
    monkeypatch.setattr(shutil, "rmtree", real)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-2.old", "step-4", "step-6"]
    assert [path.name for path in sound_checkpoints(tmp_path, ALONE)] == ["step-6", "step-4"]
    assert len(list(tmp_path.iterdir())) == 2


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


def test_a_folder_that_was_renamed_is_not_taken_for_a_later_step(tmp_path):
    """It would go on with the data of the step that its name says."""
    for step in (2, 4):
        write(tmp_path, step)
    (tmp_path / "step-2").rename(tmp_path / "step-6")
    assert faults(tmp_path / "step-6") == [STATE]
    assert [path.name for path in sound_checkpoints(tmp_path, ALONE)] == ["step-4"]


def test_a_file_that_cannot_be_read_is_named():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        write(folder, 2)
        (folder / "step-2" / "zero" / "weights.pt").chmod(0)
        if was_root := os.geteuid() == 0:  # who may read everything
            os.seteuid(65534)
        try:
            assert faults(folder / "step-2") == ["zero/weights.pt"]
        finally:
            if was_root:
                os.seteuid(0)


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


def test_one_of_another_recipe_or_of_other_inputs_is_refused_and_named(tmp_path):
    """As where somebody has copied it into the folder of another run."""
    write(tmp_path, 2)
    engine, path = SimpleNamespace(world_size=1), tmp_path / "step-2"
    faster = RECIPE.with_values(train__lr=0.5)
    with pytest.raises(UserError, match=r"step-2 holds a run with train\.lr = 0\.0002, .* 0\.5;"):
        load(engine, path, recipe=faster, free={}, inputs={"shards": "abc"})
    with pytest.raises(UserError, match="step-2 was trained on another shards"):
        load(engine, path, recipe=faster, free={"train": {"lr"}}, inputs={"shards": "def"})
    moved = RECIPE.with_values(name="other", output=tmp_path)
    with pytest.raises(UserError, match="step-2 was trained on another shards"):
        load(engine, path, recipe=moved, free={}, inputs={"shards": "def"})


def test_a_run_begins_from_a_named_checkpoint_only_until_it_has_its_own(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other" / "checkpoints"
    write(other, 4)
    named = str(other / "step-4")
    assert named_start(run, "auto") is named_start(run, "none") is None
    assert named_start(run, named) == other / "step-4"
    write(run / "checkpoints", 6)
    assert named_start(run, named) is None  # a job that is started again with its command
    assert named_start(run, "auto") is None
    with pytest.raises(UserError, match=r"--resume none: .*run holds 1 .*the newest is step-6"):
        named_start(run, "none")
    own = run / "checkpoints" / "step-6"
    with pytest.raises(UserError, match=r"step-6: a run goes on from its newest .*another output"):
        named_start(run, str(own))


def test_what_is_no_checkpoint_or_a_damaged_one_cannot_be_named(tmp_path):
    write(tmp_path, 4)
    for wrong in (tmp_path, tmp_path / "step-5", "newest"):
        with pytest.raises(UserError, match=f"--resume {wrong}: no checkpoint; give auto, none"):
            named_start(tmp_path / "run", str(wrong))
    (tmp_path / "step-4" / "zero" / "weights.pt").unlink()
    with pytest.raises(UserError, match=r"step-4: zero/weights\.pt cut, changed or missing"):
        named_start(tmp_path / "run", str(tmp_path / "step-4"))
