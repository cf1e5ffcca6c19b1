"""Open the language model that is to be pruned: a Llama, as Hugging Face folder or GGUF file."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from drama.errors import UserError
from drama.hf import build_llama

# everything of a Llama's configuration that means something once the model is cut and saved
CONFIG_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "rope_parameters",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Source:
    """Where a language model lies: its folder, and the file in it when that is a GGUF."""

    folder: Path
    gguf: str | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.folder / self.gguf if self.gguf else self.folder)

    @property
    def options(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` needs besides the folder; never remote code."""
        options: dict[str, Any] = {"trust_remote_code": False}
        return options | ({"gguf_file": self.gguf} if self.gguf else {})


def find_llm(path: str | Path) -> Source:
    """Return where the model at `path` lies, after checking that its files are all there.

    Raises:
        UserError: nothing at the path, no model there, or several, or one half downloaded.
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


def read_config(source: Source) -> LlamaConfig:
    """Read the model's configuration, reduced to the fields that describe a Llama.

    Raises:
        UserError: unreadable, not a Llama, or a Llama with bias terms.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.folder, **source.options)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{source.name}: cannot read the model's configuration: {error}") from error
    if config.model_type != "llama":
        raise UserError(
            f"{source.name}: architecture '{config.model_type}' cannot be pruned; "
            "give a model of the Llama family (model_type 'llama')"
        )
    if config.attention_bias or config.mlp_bias:
        raise UserError(
            f"{source.name}: linear layers with biases (attention_bias, mlp_bias) are not "
            "supported; give a Llama without them"
        )
    return _clean(config)


def _clean(config: Any) -> LlamaConfig:
    return LlamaConfig(**{name: getattr(config, name) for name in CONFIG_FIELDS})


def load_tokenizer(source: Source, vocab_size: int) -> Any:
    """Load the model's tokenizer as it is.

    Raises:
        UserError: unreadable, or its ids do not fit the model's `vocab_size` rows.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **source.options)
    except (OSError, ValueError, KeyError, IndexError) as error:
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


def load_llm(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, Any]:
    """Load a Llama and its tokenizer; a GGUF file is unpacked to `dtype`.

    The model comes in evaluation mode on the CPU, and `save_pretrained` writes an ordinary folder,
    whatever form it was read from. Code shipped with a model is never run.

    Raises:
        UserError: see `find_llm`, `read_config`, `load_tokenizer` and `load_model`.
    """
    source = find_llm(path)
    config = read_config(source)
    tokenizer = load_tokenizer(source, config.vocab_size)
    return load_model(source, config, dtype), tokenizer


def load_model(
    source: Source, config: LlamaConfig, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Load the weights alone; see `load_llm`.

    Raises:
        UserError: damaged weights, or weights of another configuration.
    """
    options = source.options
    if source.gguf and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with quiet():
            loaded: Any = LlamaForCausalLM.from_pretrained(
                source.folder, config=config, dtype=dtype, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{source.name}: the weights cannot be read (damaged, or not of this configuration); "
            f"download them again: {error}"
        ) from error
    model: LlamaForCausalLM = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        # transformers would go on with random numbers in their place
        raise UserError(
            f"{source.name}: {len(missing)} weights are missing (the first is {missing[0]}); "
            "the files do not belong to this configuration, download them again"
        )
    if source.gguf:
        # built anew from the unpacked tensors: nothing of the quantised loader stays on it
        generation = model.generation_config
        model = build_llama(_clean(model.config), model.state_dict())
        model.generation_config = generation
    return model.eval()
