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
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import rotate_half

from drama.attention import ATTENTION_NAME, PackedLayout, varlen_attention
from drama.data.packing import PackedBatch

Rotary = tuple[Tensor, Tensor]  # cosines and sines, [1, T, E] each


@dataclass(frozen=True)
class Execution:
    """How an encoder computes its vectors; never which vectors.

    pooled_last_block, pooled_norm: the last block and the final norm only where the pooling reads
    them. recompute_blocks: keep only the blocks' inputs for the backward pass, and run each block
    again in it. compiled: a block is two compiled pieces, before and after its attention; not under
    ZeRO 3, whose weights are gathered by hooks that compiled code never runs.
    """

    pooled_last_block: bool = True
    pooled_norm: bool = True
    recompute_blocks: bool = False
    compiled: bool = False


def run_blocks(
    backbone: Any,
    batch: PackedBatch,
    *,
    causal: bool,
    last_token_only: bool = False,
    recompute: bool = False,
    compiled: bool = False,
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
        functools.partial(_compiled_block, layer, rotary, layout)
        if compiled
        else functools.partial(
            layer,
            attention_mask=None,
            position_embeddings=rotary,
            position_ids=positions_1T,
            layout=layout,
        )
        for layer in backbone.layers
    ]
    if last_token_only:
        keys_values = _compiled(_keys_values) if compiled else _keys_values
        blocks[-1] = functools.partial(
            _last_block, backbone.layers[-1], rotary, layout, keys_values
        )
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
    layer: Any,
    rotary: Rotary,
    layout: PackedLayout,
    keys_values: Callable[..., tuple[Tensor, Tensor, Tensor]],
    hidden_1TD: Tensor,
) -> Tensor:
    """A Llama's or a Qwen's block at the last token of every sequence, [1, B, D]."""
    last_B = layout.cu_seqlens[1:].long() - 1
    k_TGE, v_TGE, normed_TD = keys_values(layer, rotary, hidden_1TD)
    hidden_1BD, cos_1BE, sin_1BE = (x[:, last_B] for x in (hidden_1TD, *rotary))
    q_BHE = _queries(layer, (cos_1BE, sin_1BE), normed_TD[last_B])
    at_last = replace(layout, last_query=True)
    out_BHE = varlen_attention(q_BHE, k_TGE, v_TGE, at_last, layer.self_attn.scaling)
    return _rest(layer, hidden_1BD, out_BHE)


def _compiled_block(layer: Any, rotary: Rotary, layout: PackedLayout, hidden_1TD: Tensor) -> Tensor:
    """The same block at every token, what lies before and after its attention compiled."""
    q_THE, k_TGE, v_TGE = _compiled(_projections)(layer, rotary, hidden_1TD)
    out_THE = varlen_attention(q_THE, k_TGE, v_TGE, layout, layer.self_attn.scaling)
    out_1TD: Tensor = _compiled(_rest)(layer, hidden_1TD, out_THE)
    return out_1TD


@functools.cache
def _compiled(part: Callable[..., Any]) -> Callable[..., Any]:
    # dynamic: the number of tokens differs from chunk to chunk. All layers share the code.
    return torch.compile(part, backend=_inductor, dynamic=True)


def _inductor(graph: Any, inputs: Any) -> Any:
    """Inductor, with all that costs no matrix product computed again in the backward pass: a
    quarter less of a graph to keep."""
    from torch._inductor.compile_fx import compile_fx  # a slow import

    with functorch.patch(aggressive_recomputation=True):
        return compile_fx(graph, inputs)


# Through the block's own submodules: under ZeRO-3 each gathers its weights when it is called.


def _projections(layer: Any, rotary: Rotary, hidden_1TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, E], keys and values [T, G, E]."""
    k_TGE, v_TGE, normed_TD = _keys_values(layer, rotary, hidden_1TD)
    return _queries(layer, rotary, normed_TD), k_TGE, v_TGE


def _queries(layer: Any, rotary: Rotary, normed_TD: Tensor) -> Tensor:
    attention = layer.self_attn
    q_THE = attention.q_proj(normed_TD).unflatten(1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):  # Qwen3 norms every head
        q_THE = attention.q_norm(q_THE)
    return _rotated(q_THE, *rotary)


def _keys_values(layer: Any, rotary: Rotary, hidden_1TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [T, G, E], and the normed states that they come from, [T, D]."""
    attention, normed_TD = layer.self_attn, layer.input_layernorm(hidden_1TD)[0]
    heads = (-1, attention.head_dim)
    k_TGE = attention.k_proj(normed_TD).unflatten(1, heads)
    if hasattr(attention, "k_norm"):
        k_TGE = attention.k_norm(k_TGE)
    v_TGE = attention.v_proj(normed_TD).unflatten(1, heads)
    return _rotated(k_TGE, *rotary), v_TGE, normed_TD


def _rest(layer: Any, hidden_1TD: Tensor, out_THE: Tensor) -> Tensor:
    """Output projection and feed-forward network, each added to the stream."""
    hidden_1TD = hidden_1TD + layer.self_attn.o_proj(out_THE.flatten(1))
    out_1TD: Tensor = hidden_1TD + layer.mlp(layer.post_attention_layernorm(hidden_1TD))
    return out_1TD


def _rotated(x_THE: Tensor, cos_1TE: Tensor, sin_1TE: Tensor) -> Tensor:
    cos_T1E, sin_T1E = cos_1TE[0, :, None], sin_1TE[0, :, None]
    return x_THE * cos_T1E + rotate_half(x_THE) * sin_T1E
