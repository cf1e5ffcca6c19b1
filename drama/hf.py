"""Hugging Face model folders: what is shared by everything that reads or writes one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from drama.errors import UserError
from drama.files import replacing

# with the modules of sentence-transformers, each in a folder of its own
_WEIGHTS_AND_SETTINGS = ("*.safetensors", "*.bin", "*.json", "vocab.txt", "*.model")
_MODEL_FILES = tuple(f"{at}{name}" for at in ("", "[0-9]*_*/") for name in _WEIGHTS_AND_SETTINGS)


def write_rope_keys(folder: str | Path) -> None:
    """Make `folder/config.json` hold both RoPE key sets, whichever one it has.

    transformers 5 reads `rope_parameters`; transformers 4 reads `rope_theta` and `rope_scaling`,
    and takes theta 10,000 without a word where they are missing. Other keys stay as they are.

    Raises:
        UserError: no config.json in the folder.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; give a Hugging Face model folder")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    config["rope_parameters"] = rope
    config["rope_theta"] = rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    config["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build_lm(config: PreTrainedConfig, state: dict[str, Tensor]) -> Any:
    """Return a causal language model whose parameters are the tensors of `state`, without copying
    or initialising.

    `config` names the architecture (a Llama, or one built like it). `state` names every parameter
    (with tied embeddings `lm_head.weight` may be left out). The model is in evaluation mode.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if config.tie_word_embeddings:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    # its buffers are not part of a state dict, so they would stay on the meta device
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@contextmanager
def exact_rotary(rotary: nn.Module) -> Iterator[None]:
    """Around a cast of a model: keep its rotary frequencies in float32.

    `module.bfloat16()`, which DeepSpeed calls, would round them too: positions past a few hundred
    would then rotate by wrong angles.
    """
    exact = {n: b for n, b in rotary.named_buffers() if b.dtype == torch.float32}
    yield
    for name, buffer in exact.items():
        moved = getattr(rotary, name)
        if moved.dtype != torch.float32:
            setattr(rotary, name, buffer.to(moved.device))


def model_sha256(folder: str | Path) -> str:
    """One hash over a model folder's weights, configuration and tokenizer, names included.

    Raises:
        UserError: no folder there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a model folder")
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _MODEL_FILES for path in folder.glob(pattern)):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()
