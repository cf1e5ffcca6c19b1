"""A linear module is taken for a truncation only where it is one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from drama.encoder import Encoder
from drama.export import export
from drama.folder import RetrieverSettings
from drama.retrieve.models import open_model
from drama.testing import tiny_llama
from drama.truncation import baked_dim


@pytest.fixture
def folder(tmp_path):
    settings = RetrieverSettings(matryoshka_dims=(16, 64))
    encoder = Encoder.from_pretrained(tiny_llama(tmp_path / "source"), settings=settings)
    return export(encoder, tmp_path / "out", dim=16)


def test_it_is_read_back(folder):
    assert baked_dim(folder) == 16
    assert baked_dim(folder.parent / "source") is None


@pytest.mark.parametrize("change", ["weight", "bias", "activation", "residual", "missing", "cut"])
def test_any_other_linear_module_is_none(folder, change):
    module = folder / "2_Dense"
    weights = load_file(module / "model.safetensors")
    settings = json.loads((module / "config.json").read_text())
    if change == "weight":
        weights["linear.weight"][3, 5] = 0.1
    if change == "bias":
        weights["linear.bias"] = torch.ones(16)
        settings["bias"] = True
    if change == "activation":
        settings["activation_function"] = "torch.nn.modules.activation.Tanh"
    if change == "residual":
        settings["use_residual"] = True
    save_file(weights, module / "model.safetensors")
    (module / "config.json").write_text(json.dumps(settings))
    if change == "missing":
        (module / "model.safetensors").unlink()
    if change == "cut":
        path = module / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
    assert baked_dim(folder) is None


def test_a_real_linear_head_is_left_to_sentence_transformers(folder):
    path = folder / "2_Dense" / "model.safetensors"
    weights = load_file(path)
    weights["linear.weight"][3, 5] = 0.1
    save_file(weights, path)
    model = open_model(folder)
    assert (type(model).__name__, model.dim) == ("OtherModel", 16)
