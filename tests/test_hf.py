from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from drama.errors import UserError
from drama.hf import build_lm, write_rope_keys

SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NEW = {"rope_parameters": {"rope_theta": 5e5, **SCALING}}
OLD = {"rope_theta": 5e5, "rope_scaling": SCALING}
NEW_PLAIN = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
OLD_PLAIN = {"rope_theta": 1e5, "rope_scaling": None}


def write(folder: Path, keys: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "extra": 1} | keys))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (NEW, NEW | OLD),
        (OLD, NEW | OLD),
        (NEW | OLD, NEW | OLD),
        (NEW_PLAIN, NEW_PLAIN | OLD_PLAIN),
        ({"rope_theta": 1e5}, NEW_PLAIN | OLD_PLAIN),
    ],
)
def test_both_key_sets_are_written(
    tmp_path: Path, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    write(tmp_path, given)
    write_rope_keys(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {"model_type": "llama", "extra": 1} | expected
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters == expected["rope_parameters"]


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        write_rope_keys(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_build_lm_is_the_model_itself(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=20, tie_word_embeddings=tied, rope_parameters=NEW["rope_parameters"],
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    built = build_lm(config, model.state_dict())
    ids = torch.arange(30)[None]
    assert torch.equal(built(ids).logits, model(ids).logits)
    assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied
    assert not built.training
    state = model.state_dict()
    del state["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        build_lm(config, state)
