"""The decoder blocks over packed tokens, without the work whose result nobody reads.

With last-token pooling the last block needs keys and values of all tokens, but queries, attention
output, output projection and feed-forward only of the B pooled ones. That is exact, and leaves of
a block's 2 T D (2 D + 2 G E + 3 F) FLOP only the part of K and V.

T packed tokens, B sequences, D width, H query heads, G key/value heads, E head width, F width of
the feed-forward network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import rotate_half

from drama.attention import ATTENTION_NAME, PackedLayout, varlen_attention
from drama.data.packing import PackedBatch


@dataclass(frozen=True)
class Execution:
    """How an encoder computes its vectors; never which vectors.

    pooled_last_block, pooled_norm: the last block and the final norm only where the pooling reads
    them. recompute_blocks: keep only the blocks' inputs for the backward pass, and run each block
    again in it.
    """

    pooled_last_block: bool = True
    pooled_norm: bool = True
    recompute_blocks: bool = False


def run_blocks(
    backbone: Any,
    batch: PackedBatch,
    *,
    causal: bool,
    last_token_only: bool = False,
    recompute: bool = False,
    read: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Return the residual stream after the last block, before the final norm.

    [T, D], or with `last_token_only` the last token of every sequence, [B, D]. read: is given
    every block's number and the stream after it.
    """
    # any other attention would not know where texts end, and let them see each other
    assert backbone.config._attn_implementation == ATTENTION_NAME
    layout = PackedLayout(batch.cu_seqlens, batch.lengths, causal=causal)
    positions_1T = batch.position_ids_T[None]
    hidden_1TD = backbone.embed_tokens(batch.input_ids_T[None])
    rotary = backbone.rotary_emb(hidden_1TD, position_ids=positions_1T)
    blocks: list[Callable[[Tensor], Tensor]] = [
        functools.partial(
            layer,
            attention_mask=None,
            position_embeddings=rotary,
            position_ids=positions_1T,
            layout=layout,
        )
        for layer in backbone.layers
    ]
    if last_token_only:
        blocks[-1] = functools.partial(_last_block, backbone.layers[-1], rotary, layout)
    recompute = recompute and torch.is_grad_enabled()
    for number, block in enumerate(blocks):
        if recompute:  # nothing is random in a block, so no generator state is kept
            hidden_1TD = checkpoint(
                block, hidden_1TD, use_reentrant=False, preserve_rng_state=False
            )
        else:
            hidden_1TD = block(hidden_1TD)
        if read is not None:
            read(number, hidden_1TD[0])
    return hidden_1TD[0]


def _last_block(
    layer: Any, rotary: tuple[Tensor, Tensor], layout: PackedLayout, hidden_1TD: Tensor
) -> Tensor:
    """A Llama's or a Qwen's block at the last token of every sequence, [1, B, D].

    Through the block's own submodules: under ZeRO-3 each gathers its weights when it is called.
    """
    attention, last_B = layer.self_attn, layout.cu_seqlens[1:].long() - 1
    normed_TD = layer.input_layernorm(hidden_1TD)[0]
    cos_T1E, sin_T1E = (x[0][:, None] for x in rotary)
    heads = (-1, attention.head_dim)
    q_BHE = attention.q_proj(normed_TD[last_B]).unflatten(1, heads)
    k_TGE = attention.k_proj(normed_TD).unflatten(1, heads)
    if hasattr(attention, "q_norm"):  # Qwen3 norms every head
        q_BHE, k_TGE = attention.q_norm(q_BHE), attention.k_norm(k_TGE)
    v_TGE = attention.v_proj(normed_TD).unflatten(1, heads)
    out_BHE = varlen_attention(
        _rotated(q_BHE, cos_T1E[last_B], sin_T1E[last_B]),
        _rotated(k_TGE, cos_T1E, sin_T1E),
        v_TGE,
        replace(layout, last_query=True),
        attention.scaling,
    )
    hidden_BD = hidden_1TD[0][last_B] + attention.o_proj(out_BHE.flatten(1))
    out_BD: Tensor = hidden_BD + layer.mlp(layer.post_attention_layernorm(hidden_BD))
    return out_BD[None]


def _rotated(x_THE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    return x_THE * cos_T1E + rotate_half(x_THE) * sin_T1E
