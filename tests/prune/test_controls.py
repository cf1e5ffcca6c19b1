from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from drama.errors import UserError
from drama.prune import run
from drama.prune.controls import control, drawn_anew
from drama.prune.importance import Importance
from drama.prune.run import prune

TARGET = "layers=3,hidden=36,heads=4,ffn=20"


def importance() -> Importance:
    chance = torch.Generator().manual_seed(1)
    sizes = ((4,), (48,), (4, 3), (4, 2), (4, 40))
    return Importance(*(torch.rand(size, generator=chance).double() for size in sizes))


def test_first_changes_the_layers_alone() -> None:
    scores = importance()
    found = control(scores, "first", 0)
    assert found.layer.argsort(descending=True).tolist() == [0, 1, 2, 3]
    assert torch.equal(found.ffn, scores.ffn)
    assert torch.equal(found.hidden, scores.hidden)


def test_random_depends_on_the_seed_and_not_on_the_scores() -> None:
    scores = importance()
    first, again, other = (control(scores, "random", seed) for seed in (3, 3, 4))
    for name, value in vars(scores).items():
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
        assert not torch.equal(getattr(first, name), value)


def test_drawn_anew_has_the_shape_and_other_weights(make_llama) -> None:
    model = make_llama()
    before = torch.get_rng_state()
    fresh, again = drawn_anew(model, 5), drawn_anew(model, 5)
    assert torch.equal(torch.get_rng_state(), before)
    state, old = fresh.state_dict(), model.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in old.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(state[name], old[name])
    assert torch.equal(state[name], again.state_dict()[name])


@pytest.mark.parametrize("choice", ["first", "random", "scratch"])
def test_prune_writes_controls(
    choice, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROW_LENGTH", 64)
    prune(model_folder, TARGET, text_file, tmp_path / "out", calibration_tokens=1000, choice=choice)
    facts = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert facts["choice"] == choice
    if choice == "first":
        assert facts["plan"]["layers"] == [0, 1, 2]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    source = LlamaForCausalLM.from_pretrained(model_folder)
    kept = source.model.embed_tokens.weight[:, facts["plan"]["hidden"]]
    assert torch.equal(model.model.embed_tokens.weight, kept) == (choice != "scratch")


def test_a_control_needs_a_shape(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--choose random without --to"):
        prune(model_folder, None, text_file, tmp_path / "out", budget="1M", choice="random")
