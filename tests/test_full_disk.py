"""A file system that is full while a run saves: the last checkpoint stays whole, and it is said."""

import subprocess
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from drama.checkpoint import Keep, faults, save, whole_checkpoints
from drama.data.sources import read_source
from drama.data.writer import write_shards
from drama.encoder import Encoder
from drama.errors import UserError
from drama.export import export
from drama.export_source import export_source
from drama.recipe import Recipe
from drama.testing import read_metrics, run_alone, run_deepspeed, tiny_llama

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "launchers" / "train.py"
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def mounted(tmp_path):
    """Makes a file system of its own, of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int, inodes: int = 0) -> Path:
        options = f"size={size},nr_inodes={inodes}"  # 0: as many as there is room for
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small file system takes the right to mount one: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(world, mounted):
    """With room for one checkpoint and a half."""
    return mounted(int(1.5 * size_of(world / "whole" / "checkpoints" / "step-9")) + 300_000)


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


def test_not_even_the_folder_of_checkpoints_fits(mounted):
    """A disk without room for one more name, at the first save of a run."""
    folder = mounted(1_000_000, inodes=1) / "checkpoints"
    engine = SimpleNamespace(global_rank=0, world_size=1)
    recipe = Recipe.from_tree(
        {
            "name": "tiny", "output": "runs/tiny", "model": {"path": "model"},
            "data": {"shards": ["shards"]}, "train": {"steps": 9, "batch_size": 64},
        }
    )  # fmt: skip
    with pytest.raises(UserError, match=r"step-2: the checkpoint cannot be written, the disk is f"):
        save(
            *(engine, folder, 2),
            recipe=recipe, inputs={}, extra={}, keep=Keep(2), write_model=lambda path: path.mkdir(),
        )  # fmt: skip


@pytest.mark.slow
def test_the_model_at_the_end_does_not_fit(world, mounted):
    """The last checkpoint does: with room made, the same command writes the model alone."""
    whole = world / "whole"
    checkpoint, model = size_of(whole / "checkpoints" / "step-9"), size_of(whole / "model")
    disk = mounted(checkpoint + 2 * model + 300_000)
    (disk / "ballast").write_bytes(b"\0" * int(1.6 * model))
    options = ["--recipe", str(world / "recipe.yaml"), "--set", f"output={disk / 'run'}",
               "--set", "train.save_every=9", "--set", "data.workers=0"]  # fmt: skip
    done = run_deepspeed(TRAIN, *options)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said[-3000:]
    assert "Traceback" not in said
    (line,) = [x for x in said.splitlines() if x.startswith("train: error:")]
    assert f"{disk / 'run' / 'model'}: the model cannot be written, the disk is full" in line
    assert "make room and start again" in line
    assert not [path.name for path in (disk / "run").iterdir() if "model" in path.name]
    (saved,) = whole_checkpoints(disk / "run" / "checkpoints")
    assert not faults(saved)
    (disk / "ballast").unlink()
    done = run_deepspeed(TRAIN, *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ours, theirs = (folder / "model" / "model.safetensors" for folder in (disk / "run", whole))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_the_best_model_does_not_fit_and_training_goes_on(world, mounted, tmp_path):
    """It is said, half of it is not left, and the best one stays to be found."""
    write_shards(islice(read_source(PAIRS), 160, 192), tmp_path / "held-out")
    model = size_of(world / "whole" / "model")
    run = mounted(int(0.6 * model) + 100_000) / "run"
    done = run_alone(
        TRAIN, "--recipe", str(world / "recipe.yaml"), "--set", f"output={run}",
        "--set", "train.save_every=9", "--set", "data.workers=0", "--set", "eval.every=4",
        "--set", f"eval.shards=[{tmp_path / 'held-out'}]", "--set", "train.on_full_disk=go_on",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    said = f"warning: {run / 'best'}: the model cannot be written, the disk is full; training"
    assert done.stderr.count(said) == 2  # after 4 and 8 steps; the last one has to be written
    assert "Traceback" not in done.stderr
    assert (
        f"{run / 'best'}: the model cannot be written, the disk is full; checkpoints stay"
        in (done.stderr.splitlines()[-1])
    )
    assert not [path.name for path in run.iterdir() if "best" in path.name]
    assert len(read_metrics(run)) == 8


@pytest.mark.parametrize("part", ["weights", "graph of 8 bits"])
def test_an_export_that_does_not_fit_says_so_in_one_line(exported, mounted, part):
    source, folder = exported
    graph = size_of(folder / "onnx")
    plain = size_of(folder) - graph
    disk = mounted(plain // 2 if part == "weights" else plain + 2 * graph)
    with pytest.raises(UserError, match=rf"^{disk}/out: the disk is full, nothing is written"):
        export_source(source, disk / "out", onnx="int8")
    assert list(disk.iterdir()) == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and its folder with a graph."""
    folder = tmp_path_factory.mktemp("exported")
    source = tiny_llama(folder / "source", num_hidden_layers=1)
    return source, export(Encoder.from_pretrained(source), folder / "out", onnx="float32")
