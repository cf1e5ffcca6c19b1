"""Checkpoints and model folders of a real run that came to harm: each is refused by the name of the
file, and a run falls back on the newest one that is whole."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from drama.average import average_checkpoints
from drama.checkpoint import STATE, faults
from drama.distributed import Ranks
from drama.encoder import Encoder
from drama.errors import UserError
from drama.export import export
from drama.hf import SUMS, model_sha256
from drama.prune.output import write_model
from drama.prune.source import find_llm, load_llm
from drama.resume import sound_checkpoints

ALONE = Ranks(0, 1, torch.device("cpu"))
OF_A_CHECKPOINT = (
    "zero/zero_pp_rank_0_mp_rank_00_model_states.pt",
    "zero/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "model/model.safetensors",
    "model/config.json",
    STATE,
)
OF_A_MODEL = ("model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json")


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    """One bit, where a safetensors file has numbers and a JSON file text."""
    content = bytearray(path.read_bytes())
    content[-len(content) // 3] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


HARMS = (cut, flip, empty, remove)


@pytest.fixture
def run(world, tmp_path) -> Path:
    shutil.copytree(world / "whole", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", OF_A_CHECKPOINT)
@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_checkpoint_is_named_and_the_one_before_taken(run, capfd, harm, name):
    newest = run / "checkpoints" / "step-9"
    harm(newest / name)
    assert faults(newest) == [name]
    sound = sound_checkpoints(run / "checkpoints", ALONE)
    assert [path.name for path in sound] == ["step-8"]
    said = capfd.readouterr().err
    assert f"{newest} is damaged and left alone: {name} cut, changed, missing" in said


def test_a_file_too_many_where_deepspeed_looks_is_a_fault(run):
    """DeepSpeed finds its files by pattern: a third rank's would be read."""
    newest = run / "checkpoints" / "step-9"
    extra = newest / "zero" / "zero_pp_rank_2_mp_rank_00_model_states.pt"
    shutil.copy(newest / OF_A_CHECKPOINT[0], extra)
    assert faults(newest) == [f"zero/{extra.name}"]
    extra.unlink()
    (newest / "model" / "notes.txt").write_text("ours")
    assert faults(newest) == []


@pytest.mark.parametrize("name", OF_A_MODEL)
@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_model_folder_is_refused_by_the_name_of_the_file(run, harm, name):
    folder = run / "model"
    harm(folder / name)
    what = "is missing" if harm is remove else "is cut or changed"
    with pytest.raises(UserError) as error:
        Encoder.from_pretrained(folder)
    assert f"{folder}: {name} {what}" in str(error.value)
    assert f"remove {folder / SUMS}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flip_that_nothing_else_would_notice(run):
    """The list is what finds it: without one the folder loads, as other people's do."""
    flip(run / "model" / "model.safetensors")
    (run / "model" / SUMS).unlink()
    Encoder.from_pretrained(run / "model")


@pytest.mark.parametrize("harm", [cut, empty])
def test_a_list_that_came_to_harm_is_refused(run, harm):
    harm(run / "model" / SUMS)
    with pytest.raises(UserError, match=f"model: {SUMS} is cut or changed"):
        Encoder.from_pretrained(run / "model")


def test_a_card_may_be_edited_and_notes_added(run):
    before = model_sha256(run / "model")
    (run / "model" / "README.md").write_text("mine")
    (run / "model" / "notes.txt").write_text("mine too")
    Encoder.from_pretrained(run / "model")
    assert model_sha256(run / "model") == before


def test_the_list_is_what_sha256sum_reads(run):
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS],
        cwd=run / "model", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "model.safetensors: OK" in done.stdout


def test_an_export_and_a_pruned_model_have_lists_too(world, run, tmp_path):
    export(Encoder.from_pretrained(run / "model"), tmp_path / "exported", dtype=torch.bfloat16)
    model, tokenizer = load_llm(world / "backbone")
    write_model(model, tokenizer, {"model": "tiny"}, tmp_path / "pruned")
    find_llm(tmp_path / "pruned")
    for name in ("exported", "pruned"):
        flip(tmp_path / name / "model.safetensors")
    with pytest.raises(UserError, match=r"exported: model\.safetensors is cut or changed"):
        Encoder.from_pretrained(tmp_path / "exported")
    with pytest.raises(UserError, match=r"pruned: model\.safetensors is cut or changed"):
        find_llm(tmp_path / "pruned")


def test_a_mean_is_not_taken_over_harmed_weights(run, tmp_path):
    average_checkpoints(run, 2, tmp_path / "mean")
    flip(run / "checkpoints" / "step-8" / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"step-8/model: model\.safetensors is cut or changed"):
        average_checkpoints(run, 2, tmp_path / "mean")
