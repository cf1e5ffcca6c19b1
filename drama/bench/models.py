"""Random retrievers of a given shape: speed and memory do not depend on what weights mean."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, EuroBertConfig, EuroBertModel

from drama.demo import find_llm
from drama.encoder import Encoder
from drama.export import export
from drama.folder import RetrieverSettings
from drama.tokenizer import load_tokenizer

SHAPES = {
    "tiny": {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128},  # for dry runs
    "6x384": {"layers": 6, "hidden": 384, "heads": 6, "kv_heads": 2, "ffn": 1536},
    "drama-base": {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 3, "ffn": 3072},
}


def random_retriever(
    folder: Path,
    shape: dict[str, int],
    tokenizer_folder: Path | None = None,
    onnx: Literal["float32", "int8"] | None = None,
) -> tuple[Path, Encoder]:
    """Write a bidirectional retriever; return its folder and itself.

    tokenizer_folder: a saved tokenizer, or None for SmolLM2's.

    onnx: its graphs too, see `drama.export.export`.

    Raises:
        UserError: the package that carries SmolLM2's tokenizer is not installed.
    """
    if tokenizer_folder is None:
        source, tokenizer_folder = find_llm(), folder / "tokenizer"
        gguf = next(source.glob("*.gguf"))
        AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    config = EuroBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        intermediate_size=shape["ffn"],
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    encoder = Encoder(
        EuroBertModel(config), tokenizer, RetrieverSettings(query_prefix="", max_tokens=8192)
    )
    out = export(encoder, folder / "retriever", onnx=onnx)
    return out, Encoder.from_pretrained(out)
