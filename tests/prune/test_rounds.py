from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.sources import Source
from drama.distributed import Ranks
from drama.errors import UserError
from drama.prune.output import REPORT_NAME
from drama.prune.parent import align
from drama.prune.recovery_recipe import RecoveryRecipe
from drama.prune.rounds import _in_rounds
from drama.prune.shape import Shape
from drama.testing import read_metrics, run_deepspeed, tiny_llama

ALONE = Ranks(0, 1, torch.device("cpu"))
LAUNCHER = Path(__file__).parents[2] / "launchers" / "recover.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny whole model, texts, and a recipe that cuts it twice on two ranks; run once."""
    folder = tmp_path_factory.mktemp("rounds")
    tiny_llama(folder / "whole")
    text = "\n\n".join(f"def f{i}(x): return x * {i}" for i in range(400))
    (folder / "code.txt").write_text(text)
    shard_sources([Source.parse(folder / "code.txt")], folder / "shards", ShardingOptions())
    recipe = {
        "name": "rounds",
        "output": str(folder / "run"),
        "model": {"path": str(folder / "whole"), "parent": str(folder / "whole")},
        "rounds": {
            "calibration": str(folder / "code.txt"),
            "calibration_tokens": 2048,
            "cuts": [{"to": "hidden=48,heads=4,ffn=64", "steps": 3},
                     {"to": "layers=2,hidden=32,heads=2,ffn=48"}],
        },
        "data": {"shards": [str(folder / "shards")], "length": 48, "lanes": 8, "workers": 0},
        "loss": {"kl": 1.0, "hidden": 1.0},
        "train": {"batch_texts": 8, "steps": 2, "token_budget": 256, "precision": "fp32",
                  "deepspeed": "zero3"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_deepspeed(LAUNCHER, "--recipe", str(folder / "recipe.yaml"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text())
    return found


def test_every_round_cuts_the_last_ones_model(world: Path) -> None:
    run = world / "run"
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 32)
    first, second = run / "round-1", run / "round-2"
    assert facts(first / "cut")["model"] == str(world / "whole")
    assert facts(second / "cut")["model"] == str(first / "model")
    assert [len(read_metrics(folder)) for folder in (first, second)] == [3, 2]
    (recovery,) = facts(run / "model")["recoveries"]
    assert recovery["parent"] == str(world / "whole")
    a, b = (folder / "model.safetensors" for folder in (run / "model", second / "model"))
    assert a.read_bytes() == b.read_bytes()


def test_the_second_round_is_aligned_with_the_whole_model(world: Path) -> None:
    """Through both cuts, by what their pruning.json say."""
    run, config = world / "run", AutoConfig.from_pretrained(world / "whole")
    found = align(run / "round-2" / "cut", 2, Shape.of(config))
    plans = [facts(run / f"round-{number}" / "cut")["plan"] for number in (1, 2)]
    assert found.channels == tuple(plans[0]["hidden"][i] for i in plans[1]["hidden"])
    assert found.pairs == ((0, plans[1]["layers"][1] - 1), (1, 2))
    assert all(line["hidden"] > 0 for line in read_metrics(run / "round-2"))


def test_what_is_done_is_not_done_again(world: Path) -> None:
    """A run that was stopped after the first round's recovery and in the second one's cut."""
    run = world / "run"
    before = {
        path: path.stat().st_mtime_ns
        for path in (run / "round-1" / "model" / REPORT_NAME, run / "round-2" / "cut" / REPORT_NAME)
    }
    kept = (run / "round-2" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "round-2" / "model")
    done = run_deepspeed(LAUNCHER, "--recipe", str(world / "recipe.yaml"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (run / "round-2" / "model" / "model.safetensors").read_bytes() == kept


@pytest.mark.parametrize("finished", [False, True])
def test_a_round_is_not_continued_under_another_recipe(world: Path, finished: bool) -> None:
    overrides = ["train.lr=1e-2"]
    if not finished:  # the last round goes on, the first one is done
        shutil.rmtree(world / "run" / "round-2" / "model", ignore_errors=True)
    with pytest.raises(UserError, match=r"round-1 holds a run with train\.lr"):
        _in_rounds(RecoveryRecipe.load(world / "recipe.yaml", overrides), ALONE)


def test_another_calibration_text_is_noticed(world: Path) -> None:
    path = world / "code.txt"
    kept = path.read_text()
    path.write_text(kept + "\n\nmore")
    with pytest.raises(UserError, match=r"begun with another rounds\.calibration"):
        _in_rounds(RecoveryRecipe.load(world / "recipe.yaml"), ALONE)
    path.write_text(kept)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rounds.cuts", "[{to: 'layers=2'}, {to: 'layers=2'}]", r"rounds\.cuts\.1\.to 'layers=2'"),
        ("rounds.cuts", "[{to: 'layers=2'}, {to: 'layers=3'}]", "layers=3"),
        ("rounds.calibration", "nothing.txt", r"nothing\.txt does not exist"),
        ("seed", "1", "holds a run with seed = 0"),
        ("data.shards", "[nothing]", "nothing is no folder of shards"),
        ("model.parent", "nothing", "no such model folder"),
    ],
)
def test_what_would_show_after_hours_is_refused_at_once(
    world: Path, key: str, value: str, message: str
) -> None:
    overrides = [f"{key}={value}"]
    if key != "seed":
        overrides.append(f"output={world / 'other'}")
    with pytest.raises(UserError, match=message):
        _in_rounds(RecoveryRecipe.load(world / "recipe.yaml", overrides), ALONE)
    assert not (world / "other").exists()
