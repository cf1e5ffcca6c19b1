"""Write a retriever folder that transformers, sentence-transformers, vLLM and TEI read without
remote code, and that cannot go causal unnoticed.

Hugging Face's EuroBERT is a bidirectional Llama with the same parameter names and the same outputs,
so a bidirectional retriever is written as `eurobert` and a causal one as `llama`. The
sentence-transformers files follow the layout that versions before and after 5.4 both load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import EuroBertConfig, LlamaConfig

from drama.encoder import Encoder, RetrieverSettings
from drama.errors import UserError
from drama.files import replacing_folder
from drama.hf import write_rope_keys

Architecture = Literal["eurobert", "llama"]

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
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `encoder` to the folder `out`, whole or not at all.

    Args:
        architecture: default eurobert for bidirectional, llama for causal attention.
        dtype: of the written weights.
        state_dict: the backbone's weights when they live elsewhere (sharded training).

    Raises:
        UserError: a causal retriever as eurobert.
    """
    bidirectional = encoder.settings.attention == "bidirectional"
    architecture = architecture or ("eurobert" if bidirectional else "llama")
    if architecture == "eurobert" and not bidirectional:
        raise UserError("a causal retriever cannot be written as eurobert; use llama")
    model_type = encoder.backbone.config.model_type
    if model_type not in ("llama", "eurobert"):
        raise UserError(
            f"export of {model_type} backbones is not supported; llama and eurobert are"
        )
    weights = state_dict if state_dict is not None else encoder.backbone.state_dict()
    with replacing_folder(out) as folder:
        save_file(
            {
                name: weight.detach().to("cpu", dtype).contiguous()
                for name, weight in weights.items()
            },
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        _write_config(encoder, folder, architecture, dtype)
        encoder.tokenizer.model_max_length = encoder.max_tokens
        encoder.tokenizer.save_pretrained(folder)
        _write_sentence_transformers(encoder.settings, encoder.dim, folder)
        (folder / "README.md").write_text(_card(encoder, architecture), encoding="utf-8")
    return Path(out)


def _write_config(
    encoder: Encoder, folder: Path, architecture: Architecture, dtype: torch.dtype
) -> None:
    source = encoder.backbone.config
    shared = {key: getattr(source, key) for key in _SHARED_KEYS if hasattr(source, key)}
    bidirectional = encoder.settings.attention == "bidirectional"
    config_class: type[EuroBertConfig] | type[LlamaConfig] = LlamaConfig
    if architecture == "eurobert":
        config_class = EuroBertConfig
        # its default lies outside other vocabularies; nothing here uses the token
        tokenizer = encoder.tokenizer
        shared["mask_token_id"] = (
            tokenizer.mask_token_id if tokenizer.mask_token_id is not None
            else tokenizer.pad_token_id
        )  # fmt: skip
    config = config_class(
        **shared, tie_word_embeddings=False, architectures=[f"{_CLASS_PREFIX[architecture]}Model"]
    )
    config.dtype = dtype
    config.is_causal = not bidirectional  # transformers >= 5.2, vLLM
    config.use_bidirectional_attention = bidirectional  # text-embeddings-inference
    config.matryoshka_dimensions = list(encoder.matryoshka_dims)
    config.save_pretrained(folder)
    write_rope_keys(folder)


_CLASS_PREFIX = {"eurobert": "EuroBert", "llama": "Llama"}


def _write_sentence_transformers(settings: RetrieverSettings, dim: int, folder: Path) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
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
            "word_embedding_dimension": dim,
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
        },
    }
    (folder / "2_Normalize").mkdir()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _card(encoder: Encoder, architecture: Architecture) -> str:
    settings, config = encoder.settings, encoder.backbone.config
    dims = ", ".join(map(str, encoder.matryoshka_dims))
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, retrieval, drama]
---
# Dense retriever

{config.num_hidden_layers} layers, width {config.hidden_size}, {settings.attention} attention,
{settings.pooling} pooling over a text that ends in EOS (the tokenizer appends it). Written as
`{architecture}`. Vectors may be cut to: {dims}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode(["how do vaccines work"], prompt_name="query")
documents = model.encode(["Vaccines train the immune system ..."], prompt_name="document")
scores = model.similarity(queries, documents)
```

Query prefix `{settings.query_prefix}`, document prefix `{settings.document_prefix}`, at most
{settings.max_tokens} tokens.
"""
