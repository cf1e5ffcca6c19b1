"""Open the language model that is to be pruned: a Hugging Face folder or a GGUF file of the Llama,
Mistral, Qwen2 or Qwen3 family.

Mistral and Qwen2 are Llamas by another name, so they are read as one (Qwen2's missing bias of the
output projection becomes zeros): what is cut from them trains and exports like any Llama. Qwen3 has
norms on queries and keys and stays what it is. A sliding window changes nothing for texts that it
covers, so a model with one becomes a model for texts of at most that length.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

from drama.errors import UserError, nearest
from drama.hf import build_lm, check_sums, model_sha256
from drama.prune.text import sha256_of

# the families, and what each is read as
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig, "mistral": LlamaConfig, "qwen2": LlamaConfig, "qwen3": Qwen3Config,
}  # fmt: skip
# everything of a configuration that means something once the model is cut and saved
CONFIG_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "rope_parameters", "attention_bias", "mlp_bias",
)  # fmt: skip
# what the readers of folders and of GGUF files raise at damaged ones
_UNREADABLE = (OSError, ValueError, KeyError, IndexError, struct.error)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Source:
    """Where a language model lies: its folder, and the file in it when that is a GGUF."""

    folder: Path
    gguf: str | None

    @property
    def path(self) -> Path:
        """The folder, or the GGUF file."""
        return self.folder / self.gguf if self.gguf else self.folder

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path)

    @property
    def sha256(self) -> str:
        """Of the file, or one over the folder's weights, configuration and tokenizer."""
        return sha256_of(self.path) if self.gguf else model_sha256(self.folder)

    @property
    def options(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` needs besides the folder; never remote code."""
        options: dict[str, Any] = {"trust_remote_code": False}
        return options | ({"gguf_file": self.gguf} if self.gguf else {})


def find_llm(path: str | Path) -> Source:
    """Return where the model at `path` lies, after checking that its files are all there.

    Raises:
        UserError: nothing at the path, no model there, or several, or one half downloaded, or a
            file that is not as we wrote it.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: not a model; give a Hugging Face folder or a .gguf file")
        return Source(path.parent, path.name)
    if not path.is_dir():
        raise UserError(f"{path}: no such model folder or .gguf file; check the path")
    if (path / "config.json").is_file():
        _check_weights(path)
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            raise UserError(f"{path}: no tokenizer (tokenizer.json is missing); copy it there")
        check_sums(path)
        return Source(path, None)
    found = sorted(file.name for file in path.glob("*.gguf"))
    if len(found) > 1:
        raise UserError(f"{path}: holds {len(found)} .gguf files ({', '.join(found)}); name one")
    if not found:
        raise UserError(f"{path}: no config.json and no .gguf file, so no model; check the path")
    return Source(path, found[0])


def _check_weights(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        return
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise UserError(
            f"{folder}: no weights (model.safetensors is missing); "
            "download them, or save the model again with safe_serialization"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: not a weight index ({error}); download it again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: half downloaded, {len(missing)} of {len(names)} weight files are missing "
            f"(the first is {missing[0]}); download them again"
        )


def read_config(source: Source, *, causal: bool = True) -> Any:
    """The configuration that the model is pruned under: a Llama's or a Qwen3's.

    causal: it is going to be read from the left, so it must be a model that does.

    Raises:
        UserError: unreadable, of another family, or a bidirectional model that is to be read as a
            causal one.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.folder, **source.options)
    except _UNREADABLE as error:
        raise UserError(
            f"{source.name}: cannot read the model's configuration: {error}; if it is half "
            "downloaded, download it again"
        ) from error
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{source.name}: architecture '{config.model_type}' cannot be pruned; give a model of "
            f"the families {', '.join(FAMILIES)}" + nearest(config.model_type, FAMILIES)
        )
    sees_both = getattr(config, "is_causal", None) is False
    if causal and (sees_both or getattr(config, "use_bidirectional_attention", False)):
        raise UserError(
            f"{source.name}: sees both sides of a token (is_causal false), and would be read from "
            "the left only; give the language model that it was made from"
        )
    return _as_pruned(config)


def _as_pruned(config: Any) -> Any:
    fields = {name: getattr(config, name) for name in CONFIG_FIELDS if hasattr(config, name)}
    if window := getattr(config, "sliding_window", None):
        longest = config.max_position_embeddings
        fields["max_position_embeddings"] = min(window, longest)
    if config.model_type == "qwen2":  # its class has them without saying so
        fields["attention_bias"] = True
    return FAMILIES[config.model_type](**fields)


def load_tokenizer(source: Source, vocab_size: int) -> Any:
    """Load the model's tokenizer as it is.

    Raises:
        UserError: unreadable, or its ids do not fit the model's `vocab_size` rows.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **source.options)
    except _UNREADABLE as error:
        raise UserError(f"{source.name}: the tokenizer cannot be read: {error}") from error
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{source.name}: the tokenizer has {len(tokenizer)} entries, the model's embedding "
            f"{vocab_size} rows; copy the tokenizer that belongs to the model"
        )
    return tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and remarks off the terminal; what matters comes as an exception."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # the GGUF reader's bar is a plain tqdm, deaf to both switches
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_llm(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a language model and its tokenizer; a GGUF file is unpacked to `dtype`.

    The model comes in evaluation mode on the CPU, and `save_pretrained` writes an ordinary folder,
    whatever form it was read from. Code shipped with a model is never run.

    Raises:
        UserError: see `find_llm`, `read_config`, `load_tokenizer` and `load_model`.
    """
    source = find_llm(path)
    config = read_config(source)
    tokenizer = load_tokenizer(source, config.vocab_size)
    return load_model(source, config, dtype), tokenizer


def load_model(source: Source, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Load the weights alone, as a model of `config`; see `load_llm`.

    Raises:
        UserError: damaged weights, or weights of another configuration.
    """
    options = source.options
    if source.gguf and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=dtype, output_loading_info=True, **options
            )
    except (*_UNREADABLE, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{source.name}: the weights cannot be read (half downloaded, damaged, or not of this "
            "configuration); "
            f"download them again: {error}"
        ) from error
    model = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        # transformers would go on with random numbers in their place
        raise UserError(
            f"{source.name}: {len(missing)} weights are missing (the first is {missing[0]}); "
            "the files do not belong to this configuration, download them again"
        )
    # built anew from the tensors: nothing of a quantised loader stays, and a Qwen2 is a Llama
    state = model.state_dict()
    if model.config.model_type == "qwen2":
        for i in range(config.num_hidden_layers):
            zeros = torch.zeros(config.hidden_size, dtype=dtype)
            state[f"model.layers.{i}.self_attn.o_proj.bias"] = zeros
    built = build_lm(copy.deepcopy(config), state)
    built.generation_config = model.generation_config
    return built
