"""Bytes a token of what a backward pass needs, for shapes too large to train here."""

from __future__ import annotations

import torch
from transformers import EuroBertConfig

from drama.bench.rows import Rows
from drama.blocks import Execution
from drama.folder import RetrieverSettings
from drama.plan import graph_bytes
from drama.testing import byte_tokenizer

# the paper's three sizes; 1b is Llama-3.2-1B, its two pruned ones are those of `drama prune --to`
SHAPES = {
    "0.1b": {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 3, "ffn": 3072},
    "0.3b": {"layers": 16, "hidden": 1024, "heads": 16, "kv_heads": 4, "ffn": 4096},
    "1b": {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192},
}
LENGTH = 512
MODES = {False: "all kept", True: "block inputs only"}
VOCABULARY = 128_256  # Llama 3's; embeddings are tied to nothing here


def measure(rows: Rows) -> None:
    """Count for each shape, all activations kept and block inputs only; in bf16.

    An upper bound for a GPU: norms and SwiGLU as transformers computes them, and on a CPU without
    bf16 instructions attention keeps float32 copies.
    """
    for name, shape in SHAPES.items():
        config = EuroBertConfig(
            vocab_size=260,
            hidden_size=shape["hidden"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            intermediate_size=shape["ffn"],
            pad_token_id=0,
        )
        for recompute in (False, True):
            execution, mode = Execution(recompute_blocks=recompute), MODES[recompute]
            model = (config, byte_tokenizer(), RetrieverSettings(), execution)
            found = graph_bytes(*model, torch.bfloat16, LENGTH)
            rows.add("drama", mode, "bytes a token", name, [found], shape)
        rows.add("drama", "weights", "parameters", name, [float(_parameters(shape))], shape)


def _parameters(shape: dict[str, int]) -> int:
    width, head = shape["hidden"], shape["hidden"] // shape["heads"]
    block = 2 * width * head * (shape["heads"] + shape["kv_heads"]) + 3 * width * shape["ffn"]
    return VOCABULARY * width + shape["layers"] * (block + 2 * width) + width
