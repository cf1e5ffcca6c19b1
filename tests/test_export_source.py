"""`drama export` takes the model that a run, a checkpoint or a folder stands for, and only that."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file

from drama.checkpoint import _digest
from drama.cli import main
from drama.encoder import Encoder
from drama.errors import UserError
from drama.export_source import export_source, find_source
from drama.testing import run_deepspeed, tiny_llama

TRAIN = Path(__file__).parents[1] / "launchers" / "train.py"
STEPS = 9  # of the fixture `world`


@pytest.fixture(scope="module")
def finished(world):
    return world / "whole"


@pytest.fixture
def run(finished, tmp_path):
    """A copy to damage."""
    return shutil.copytree(finished, tmp_path / "run")


def checkpoints(run):
    return sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))


def engine_weights(checkpoint):
    """The float32 weights of a checkpoint by DeepSpeed's own tool, without our code."""
    zero = checkpoint / "zero"
    if list(zero.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")):
        found = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="zero")
    else:  # stage 0
        found = torch.load(zero / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    return {name.removeprefix("backbone."): w.float() for name, w in found.items()}


def assert_exported(folder, checkpoint):
    weights, want = load_file(folder / "model.safetensors"), engine_weights(checkpoint)
    assert weights.keys() == want.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, want[name]), name


def export_to(folder, *arguments):
    result = CliRunner().invoke(main, ["export", *map(str, arguments), "--out", str(folder)])
    return result.exit_code, " ".join(result.stderr.split())


def test_a_finished_run_gives_the_weights_of_its_training(finished, tmp_path):
    code, said = export_to(tmp_path / "out", finished, "--check")
    assert code == 0, said
    assert "written" in said
    assert "largest difference to our embeddings" in said
    assert_exported(tmp_path / "out", checkpoints(finished)[-1])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| steps | {STEPS} |" in card
    # the card at the end of training knows the run too
    assert f"| steps | {STEPS} |" in (finished / "model" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_every_stage_gives_the_weights_of_its_training(world, tmp_path, stage):
    """On two ranks; finished, then as a run that was stopped at its first checkpoint."""
    run = tmp_path / "run"
    done = run_deepspeed(
        TRAIN, "--recipe", str(world / "recipe.yaml"), "--set", f"output={run}",
        "--set", f"train.deepspeed={stage}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = checkpoints(run)
    export_source(run, tmp_path / "whole")
    assert_exported(tmp_path / "whole", last)
    export_source(first, tmp_path / "early")
    assert_exported(tmp_path / "early", first)
    shutil.rmtree(run / "model")
    shutil.rmtree(last)
    export_source(run, tmp_path / "stopped")
    assert_exported(tmp_path / "stopped", first)


def test_a_run_that_is_not_finished_gives_its_newest_sound_checkpoint(run, tmp_path):
    first, last = checkpoints(run)
    shutil.rmtree(run / "model")
    (last / "model" / "config.json").write_text("{}")
    code, said = export_to(tmp_path / "out", run)
    assert code == 0, said
    assert f"{last.name} is damaged and left alone: model/config.json cut" in said
    assert f"is not finished: its newest sound checkpoint, {first.name}, is taken" in said
    assert_exported(tmp_path / "out", first)
    step = int(first.name.removeprefix("step-"))
    assert f"| steps | {step} |" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_that_goes_on_is_not_exported_as_it_was(run):
    """model/ is of the end; the newest checkpoint of a run that was prolonged is beyond it."""
    last = checkpoints(run)[-1]
    state = json.loads((last / "state.json").read_text())
    state["extra"]["pace"][0] = 2 * STEPS
    state["digest"] = _digest(state)
    (last / "state.json").write_text(json.dumps(state))
    assert find_source(run).model == last / "model"


def test_a_checkpoint_is_verified(run, tmp_path):
    last = checkpoints(run)[-1]
    code, said = export_to(tmp_path / "out", last)
    assert code == 0, said
    assert_exported(tmp_path / "out", last)
    weights = last / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    code, said = export_to(tmp_path / "again", last)
    assert code == 2
    assert f"{last} is damaged: model/model.safetensors cut, changed or missing" in said
    assert not (tmp_path / "again").exists()
    (last / "state.json").unlink()
    code, said = export_to(tmp_path / "again", last)
    assert (code, "is damaged: state.json cut" in said) == (2, True)


def test_best(run, tmp_path):
    code, said = export_to(tmp_path / "out", run, "--best")
    assert (code, "has no best model (best/ is missing)" in said) == (2, True)
    shutil.copytree(checkpoints(run)[0] / "model", run / "best")
    (run / "best.json").write_text(json.dumps({"step": 8}))
    code, said = export_to(tmp_path / "out", run, "--best", "--dim", "32")
    assert code == 0, said
    assert "| steps | 8 |" in (tmp_path / "out" / "README.md").read_text()
    assert Encoder.from_pretrained(tmp_path / "out").dim == 32
    # a folder of the run is known to be of it
    assert find_source(run / "best").step == 8
    for wrong in (checkpoints(run)[0], run / "model"):
        code, said = export_to(tmp_path / "other", wrong, "--best")
        assert (code, "--best" in said) == (2, True)


def test_nothing_to_export(tmp_path, run):
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="holds no model to export"):
        find_source(run)
    with pytest.raises(UserError, match="gone: not a model folder"):
        export_source(tmp_path / "gone", tmp_path / "out")


def test_nothing_else_is_replaced(run, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    tiny_llama(tmp_path / "llm")
    export_source(run, tmp_path / "published")
    (tmp_path / "published" / ".git").mkdir()
    for out, message in (
        (run, "would replace"), (run / "model", "would replace"), (tmp_path, "would replace"),
        (tmp_path / "notes", "holds files that are no retriever"), (tmp_path / "file", "is a file"),
        (tmp_path / "llm", "no modules.json"), (tmp_path / "published", "is a checkout of git"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            export_source(run, out)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    # an older export is replaced, and RUN/other may be written
    export_source(run, run / "exported")
    export_source(run, run / "exported", dtype=torch.bfloat16)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["name"] in (run / "exported" / "README.md").read_text()
