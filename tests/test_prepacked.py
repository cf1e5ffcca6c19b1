"""Prepacked blocks give the vectors of the plain ones, and no weight is held twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    EuroBertConfig,
    EuroBertModel,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)  # fmt: skip

from drama.encoder import Encoder
from drama.folder import RetrieverSettings
from drama.prepacked import can_prepack
from drama.retrieve.models import open_model
from drama.testing import byte_tokenizer, tiny_llama

SIZES = {
    "vocab_size": 260, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 512,
    "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 128}  # fmt: skip
# both follow the longest text beyond these 128 tokens
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 128,
        "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}  # fmt: skip
MODELS = {
    "llama": (LlamaModel, LlamaConfig(**SIZES)),
    "llama, biases": (LlamaModel, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama, yarn": (LlamaModel, LlamaConfig(**SIZES, rope_parameters=YARN)),
    "llama, dynamic": (
        LlamaModel,
        LlamaConfig(**SIZES | {"max_position_embeddings": 128}, rope_parameters=DYNAMIC),
    ),
    "llama, longrope": (LlamaModel, LlamaConfig(**SIZES, rope_parameters=LONG)),
    "eurobert": (EuroBertModel, EuroBertConfig(**SIZES)),
    "qwen2": (Qwen2Model, Qwen2Config(**SIZES)),
    "qwen3, wide heads": (Qwen3Model, Qwen3Config(**SIZES, head_dim=20)),
}
ROWS = [[5], [7, 8], list(range(3, 40)), [9] * 200, list(range(100, 117))]


def _encoder(name: str, **settings: str) -> Encoder:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    backbone = kind._from_config(config, attn_implementation="drama_varlen")
    for key, weight in backbone.named_parameters():
        if "norm" in key or "bias" in key:  # ones and zeros would hide a weight that is left out
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return Encoder(backbone, byte_tokenizer(), RetrieverSettings(**settings)).eval()


needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()),
    reason="no oneDNN for x86",
)


@needs_onednn
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_vectors_as_the_plain_blocks(name, attention, pooling):
    if name == "eurobert" and attention == "causal":
        pytest.skip("never causal")
    encoder = _encoder(name, attention=attention, pooling=pooling)
    plain, alone = encoder.embed(ROWS), encoder.embed(ROWS[:1])
    encoder.prepack()
    assert encoder.prepacked is not None
    for _ in range(2):  # the table of RoPE grows, then serves a short text
        np.testing.assert_allclose(encoder.embed(ROWS[:1]), alone, atol=2e-6)
        np.testing.assert_allclose(encoder.embed(ROWS), plain, atol=2e-6)


@needs_onednn
def test_weights_are_held_once_and_cannot_be_used_otherwise(tmp_path):
    opened = open_model(tiny_llama(tmp_path / "m"), device="cpu")
    encoder = opened.encoder
    assert encoder.prepacked is not None
    left = {name for name, _ in encoder.backbone.named_parameters()}
    assert left == {"embed_tokens.weight", "norm.weight"} | {
        f"layers.{i}.{norm}.weight"
        for i in range(3)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    with pytest.raises(RuntimeError, match="prepacked for inference; load the folder again"):
        encoder.backbone.state_dict()
    with pytest.raises(AssertionError, match="cannot be moved"):
        encoder.to(torch.bfloat16)
    with pytest.raises(AttributeError, match="weight"):
        encoder.backbone(input_ids=torch.tensor([[1, 2]]))


def test_other_types_and_activations_stay_as_they_are(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    for precision in ("bf16", "fp16"):
        encoder = open_model(folder, precision=precision, device="cpu").encoder
        assert encoder.prepacked is None
    gelu = Encoder.from_pretrained(tiny_llama(tmp_path / "gelu", hidden_act="gelu"))
    assert not can_prepack(gelu.backbone)
    gelu.prepack()
    assert gelu.embed(ROWS).shape == (len(ROWS), 64)
    assert Encoder.from_pretrained(folder).prepacked is None  # that of training and export
