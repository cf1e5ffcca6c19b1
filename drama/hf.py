"""Hugging Face model folders: what is shared by everything that reads or writes one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from drama.errors import UserError
from drama.files import replacing, sha256_of

# with the modules of sentence-transformers, each in a folder of its own
_WEIGHTS_AND_SETTINGS = ("*.safetensors", "*.bin", "*.json", "vocab.txt", "*.model")
_MODEL_FILES = tuple(f"{at}{name}" for at in ("", "[0-9]*_*/") for name in _WEIGHTS_AND_SETTINGS)
SUMS = "drama.sha256"  # of those, and of the graphs in onnx/; `sha256sum -c` reads it too


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
    for path, content in _sums(folder, *_MODEL_FILES).items():
        digest.update(f"{path} {content}\n".encode())
    return digest.hexdigest()


def write_sums(folder: Path) -> None:
    """List the SHA-256 of a model folder's files in it, the last thing that is written there.

    Model cards are left out: people edit them.
    """
    sums = _sums(folder, *_MODEL_FILES, "onnx/*")
    text = "".join(f"{content}  {name}\n" for name, content in sums.items())
    (folder / SUMS).write_text(text, encoding="utf-8")


def check_sums(folder: Path, graph: str | None = None) -> list[str]:
    """Compare a model folder with its own list; one without a list, such as others', passes.
    Returns the names that were compared.

    Reads every file but the graphs once, about 0.5 s a GB where a core has SHA instructions.

    Args:
        graph: read this graph, and the weights beside it, instead.

    Raises:
        UserError: a file is missing or not as it was written, by name; or the list is not.
    """
    if not (folder / SUMS).is_file():
        return []
    mend = f"copy or export the model again; if the change is yours, remove {folder / SUMS}"
    text = (folder / SUMS).read_text(encoding="utf-8", errors="replace")
    lines = [re.fullmatch("([0-9a-f]{64})  (.+)\n", x) for x in text.splitlines(keepends=True)]
    wanted = {line[2]: line[1] for line in lines if line}
    if None in lines or not wanted:
        raise UserError(f"{folder}: {SUMS} is cut or changed; {mend}")
    wanted = {
        name: x
        for name, x in wanted.items()
        if (name in (graph, f"{graph}_data") if graph else not name.startswith("onnx/"))
    }
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {missing[0]} is missing; {mend}")
    found = sha256_of([folder / name for name in wanted])
    for (name, content), ours in zip(wanted.items(), found, strict=True):
        if content != ours:
            raise UserError(f"{folder}: {name} is cut or changed since it was written; {mend}")
    return list(wanted)


def _sums(folder: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 by relative path, of the files that fit."""
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    names = [str(path.relative_to(folder)) for path in paths]
    return dict(zip(names, sha256_of(paths), strict=True))
