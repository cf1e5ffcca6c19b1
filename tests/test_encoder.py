"""The packed forward against Hugging Face's padded one; masks, pooling, settings, precision."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from drama.encoder import Encoder
from drama.errors import UserError
from drama.folder import RetrieverSettings, read_settings
from drama.testing import tiny_llama

LENGTHS = [1, 5, 5, 17, 40, 2, 90]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def rows(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in LENGTHS]


def padded_states(model_path, token_rows, attention: str, implementation: str) -> torch.Tensor:
    """Hugging Face's own forward over one padded batch, [B, L, D] float64."""
    backbone = AutoModel.from_pretrained(
        model_path, dtype=torch.float64, attn_implementation=implementation
    )
    backbone.config.is_causal = attention == "causal"
    longest = max(map(len, token_rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in token_rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in token_rows])
    with torch.no_grad():
        return backbone(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_equals_padded(model, attention, pooling, implementation):
    states_BLD = padded_states(model, rows(), attention, implementation)
    lengths_B = torch.tensor(LENGTHS)
    if pooling == "last":
        want_BD = states_BLD[torch.arange(len(LENGTHS)), lengths_B - 1]
    else:
        inside_BL1 = (torch.arange(max(LENGTHS))[None] < lengths_B[:, None])[..., None]
        want_BD = (states_BLD * inside_BL1).sum(1) / lengths_B[:, None]
    want_BD = torch.nn.functional.normalize(want_BD).numpy()
    settings = RetrieverSettings(attention=attention, pooling=pooling)
    encoder = Encoder.from_pretrained(model, settings=settings)
    for token_budget in (100, 10_000):  # several chunks, and one
        got_BD = encoder.embed(rows(), token_budget=token_budget)
        assert np.abs(got_BD - want_BD).max() < 1e-5


def test_the_mask_matters_in_this_model(model):
    """Else the test above could not tell a causal from a bidirectional forward."""
    causal, both = (
        padded_states(model, rows(), attention, "eager")[4, 0]
        for attention in ("causal", "bidirectional")
    )
    assert (causal - both).abs().max() > 0.01


@pytest.mark.parametrize("declared", ["bidirectional", "causal"])
def test_the_probe_refuses_another_mask_than_declared(model, declared, monkeypatch):
    settings = RetrieverSettings(attention=declared)
    encoder = Encoder.from_pretrained(model, settings=settings)
    encoder.check_mask()
    # what a transformers version does that does not know the key
    monkeypatch.setattr(encoder.backbone.config, "is_causal", declared == "bidirectional")
    with pytest.raises(UserError, match=f"declared {declared}, but the padded forward"):
        encoder.check_mask("a folder")


def test_the_probe_sees_neighbours_that_see_each_other(model, monkeypatch):
    encoder = Encoder.from_pretrained(model)
    whole = encoder.hidden_states

    def one_long_text(batch):
        batch.lengths = (sum(batch.lengths),)
        return whole(batch)

    monkeypatch.setattr(encoder, "hidden_states", one_long_text)
    with pytest.raises(UserError, match="see each other"):
        encoder.check_mask()


def test_weights_with_nan_are_called_so(model, tmp_path):
    shutil.copytree(model, tmp_path / "nan")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="nan: the model gives NaN or infinity; the weights"):
        Encoder.from_pretrained(tmp_path / "nan")


def test_rotary_frequencies_survive_bfloat16(model):
    encoder = Encoder.from_pretrained(model)
    exact = encoder.backbone.rotary_emb.inv_freq.clone()
    encoder.bfloat16()
    assert encoder.backbone.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(encoder.backbone.rotary_emb.inv_freq, exact)


def test_prefix_eos_and_limit(model):
    encoder = Encoder.from_pretrained(model)
    query, long = encoder.tokenize(["ab", "x" * 100], "query", max_tokens=20)
    assert encoder.tokenizer.decode(query) == "Query: ab</s>"
    assert len(long) == 20
    assert long[-1] == encoder.tokenizer.eos_token_id
    assert encoder.tokenizer.decode(encoder.tokenize(["ab"], "document")[0]) == "ab</s>"


def test_matryoshka_width_is_cut_then_normalised(model):
    encoder = Encoder.from_pretrained(model)
    full, cut = encoder.embed(rows()), encoder.embed(rows(), dim=16)
    want = full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, want, atol=1e-6)
    with pytest.raises(UserError, match="dim 65 is wider than the model's 64"):
        encoder.embed(rows(), dim=65)


def test_nothing_to_embed(model):
    assert Encoder.from_pretrained(model).embed([]).shape == (0, 64)


def test_a_plain_llama_gets_the_default_settings(model):
    assert read_settings(model) == RetrieverSettings()


def test_bad_folders_are_named(tmp_path, model):
    with pytest.raises(UserError, match="config.json is missing"):
        Encoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(UserError, match="no tokenizer"):
        Encoder.from_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((model / name).read_text())
    with pytest.raises(UserError, match="the model cannot be loaded"):
        Encoder.from_pretrained(tmp_path)
    weights = (model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="the model cannot be loaded"):
        Encoder.from_pretrained(tmp_path)
    kept = load_file(model / "model.safetensors")
    kept.pop("model.layers.1.mlp.up_proj.weight")
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="weight layers.1.mlp.up_proj.weight is missing"):
        Encoder.from_pretrained(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(UserError, match=str(tmp_path)):
        Encoder.from_pretrained(tmp_path)


def test_yarn_stretches_from_the_length_that_the_backbone_was_made_for(tmp_path):
    """transformers would take the raised length for it, and stretch nothing."""
    tiny_llama(tmp_path / "m", max_position_embeddings=128)
    settings = RetrieverSettings(max_tokens=512)
    rope = {"rope_type": "yarn", "factor": 4.0}
    named = {**rope, "original_max_position_embeddings": 128}
    frequencies = [
        Encoder.from_pretrained(tmp_path / "m", settings=settings, rope=r).backbone.rotary_emb
        for r in (rope, named, {**rope, "original_max_position_embeddings": 512})
    ]
    first, second, third = (rotary.inv_freq for rotary in frequencies)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
