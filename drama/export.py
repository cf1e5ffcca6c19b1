"""Write a retriever folder that transformers, sentence-transformers, vLLM and TEI read without
remote code, and that cannot go causal unnoticed.

Hugging Face's EuroBERT is a bidirectional Llama with the same parameter names and the same outputs,
so a bidirectional retriever is written as `eurobert` and a causal one as `llama`. A Mistral is a
Llama; a Qwen2 or Qwen3 keeps its own architecture, whose mask transformers >= 5.2 reads. The
sentence-transformers files follow the layout that versions before and after 5.4 both load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import EuroBertConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from drama.console import console
from drama.encoder import Encoder
from drama.errors import UserError
from drama.export_onnx import check_installed, write_onnx
from drama.files import replacing_folder
from drama.folder import RetrieverSettings
from drama.hf import write_rope_keys, write_sums
from drama.model_card import Evaluation, model_card
from drama.run_facts import RunFacts
from drama.truncation import write_truncation

Architecture = Literal["eurobert", "llama", "qwen2", "qwen3"]

_SHARED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "initializer_range", "rope_parameters", "attention_bias", "attention_dropout", "mlp_bias",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def export(
    encoder: Encoder,
    out: str | Path,
    *,
    architecture: Architecture | None = None,
    dtype: torch.dtype = torch.float32,
    dim: int | None = None,
    onnx: Literal["float32", "int8"] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    run: RunFacts | None = None,
    evaluation: Evaluation | None = None,
) -> Path:
    """Write `encoder` to the folder `out`, whole or not at all.

    Args:
        architecture: default eurobert for bidirectional, llama for causal attention, and a Qwen's
            own.
        dtype: of the written weights.
        dim: to which every consumer of the folder cuts the vectors.
        onnx: a graph too, and one of 8-bit weights; what was measured of them is shown.
        state_dict: the backbone's weights when they live elsewhere (sharded training).
        run, evaluation: for the model card.

    Raises:
        UserError: a causal retriever as eurobert, an architecture that cannot hold the weights, a
            `dim` that does not fit, or a graph that gives other embeddings.
    """
    bidirectional = encoder.settings.attention == "bidirectional"
    model_type = encoder.backbone.config.model_type
    # Qwen2 has biases at three of the four projections, Qwen3 norms its heads
    can: tuple[Architecture, ...] = ("eurobert", "llama")
    if model_type in ("qwen2", "qwen3"):
        can = (model_type,)
    architecture = architecture or can[0 if bidirectional else -1]
    if architecture not in can:
        raise UserError(
            f"a {model_type} cannot be written as {architecture}; use {' or '.join(can)}"
        )
    if architecture == "eurobert" and not bidirectional:
        raise UserError("a causal retriever cannot be written as eurobert; use llama")
    settings = encoder.settings if dim is None else cut_settings(encoder, dim)
    if onnx is not None:
        check_installed()
    weights = state_dict if state_dict is not None else encoder.backbone.state_dict()
    graphs = None
    with replacing_folder(out) as folder:
        save_file(
            {
                name: weight.detach().to("cpu", dtype).contiguous()
                for name, weight in weights.items()
            },
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        _write_config(encoder, settings, folder, architecture, dtype)
        encoder.tokenizer.model_max_length = encoder.max_tokens
        _write_tokenizer(encoder.tokenizer, folder)
        _write_sentence_transformers(settings, encoder.backbone.config.hidden_size, folder)
        if onnx is not None:
            graphs = write_onnx(folder, int8=onnx == "int8")
        card = model_card(
            encoder, settings, architecture, run=run, evaluation=evaluation, onnx=graphs
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_sums(folder)
    return Path(out)


def cut_settings(encoder: Encoder, dim: int) -> RetrieverSettings:
    """The settings of a retriever whose vectors are cut to `dim`; warns of one that it was not
    trained for.

    Raises:
        UserError: below 1, or wider than the vectors.
    """
    dims = encoder.matryoshka_dims
    trained = ", ".join(map(str, dims))
    if not 1 <= dim <= encoder.dim:
        raise UserError(f"--dim {dim} does not fit: 1 to {encoder.dim} do, trained were {trained}")
    if dim not in dims:
        console.print(
            f"warning: --dim {dim} is none of the dims that the model was trained for ({trained}); "
            "expect worse retrieval",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    narrower = [d for d in dims if d < dim]
    baked = dim if dim < encoder.backbone.config.hidden_size else None
    return replace(encoder.settings, dim=baked, matryoshka_dims=(*narrower, dim))


def _write_config(
    encoder: Encoder,
    settings: RetrieverSettings,
    folder: Path,
    architecture: Architecture,
    dtype: torch.dtype,
) -> None:
    source = encoder.backbone.config
    shared = {key: getattr(source, key) for key in _SHARED_KEYS if hasattr(source, key)}
    bidirectional = settings.attention == "bidirectional"
    shared["max_position_embeddings"] = encoder.longest  # full attention, but no further
    config_class, prefix = _CLASSES[architecture]
    if architecture == "eurobert":
        # its default lies outside other vocabularies; nothing here uses the token
        tokenizer = encoder.tokenizer
        shared["mask_token_id"] = (
            tokenizer.mask_token_id if tokenizer.mask_token_id is not None
            else tokenizer.pad_token_id
        )  # fmt: skip
    shared |= {"tie_word_embeddings": False, "architectures": [f"{prefix}Model"]}
    config = config_class(**shared)
    config.dtype = dtype
    config.is_causal = not bidirectional  # transformers >= 5.2, vLLM
    config.use_bidirectional_attention = bidirectional  # text-embeddings-inference
    config.matryoshka_dimensions = list(settings.matryoshka_dims or (source.hidden_size,))
    config.save_pretrained(folder)
    write_rope_keys(folder)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """As every version reads it: 5 gives the class a name that transformers 4 does not know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_CLASSES: dict[Architecture, tuple[type[PreTrainedConfig], str]] = {
    "eurobert": (EuroBertConfig, "EuroBert"),
    "llama": (LlamaConfig, "Llama"),
    "qwen2": (Qwen2Config, "Qwen2"),
    "qwen3": (Qwen3Config, "Qwen3"),
}


def _write_sentence_transformers(settings: RetrieverSettings, width: int, folder: Path) -> None:
    kinds = ["Pooling", *(["Dense"] if settings.dim else []), "Normalize"]
    modules = [("", "Transformer"), *((f"{n}_{kind}", kind) for n, kind in enumerate(kinds, 1))]
    files: dict[str, Any] = {
        "modules.json": [
            {
                "idx": number,
                "name": str(number),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for number, (path, kind) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": settings.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": settings.pooling == "last",
            "include_prompt": True,
        },
        "sentence_bert_config.json": {
            "max_seq_length": settings.max_tokens,
            "do_lower_case": False,
        },
        "config_sentence_transformers.json": {
            "prompts": {"query": settings.query_prefix, "document": settings.document_prefix},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "attention": settings.attention,  # should the key in config.json get lost
        },
    }
    (folder / modules[-1][0]).mkdir()
    if settings.dim:
        write_truncation(folder / "2_Dense", width, settings.dim)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
