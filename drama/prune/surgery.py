"""Cut a Llama along a plan: what stays keeps its weights and its order.

L layers kept, M = 2L+1 norms, D hidden channels, G KV groups per layer, I FFN channels per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from drama.hf import build_llama
from drama.prune.shape import Shape


@dataclass(frozen=True)
class Plan:
    """What stays of a Llama; every index counts in the source and every tuple rises.

    layers: L layer numbers. hidden: D channels of the residual stream, one set for all layers.
    kv_groups: per kept layer, G KV heads; each keeps all its query heads. ffn: per kept layer, I
    channels. norm_scales: M factors on the norms' weights in order of use (two per kept layer, then
    the final norm).

    A norm divides by the root mean square of its input, and in the cut model that runs over the
    kept channels only. Where these carry more than the average channel, the division is by more
    than before; the factor puts the magnitude back (`importance.choose` says how it is found).
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    kv_groups: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]
    norm_scales: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.layers) == len(self.kv_groups) == len(self.ffn)
        assert len(self.norm_scales) == 2 * len(self.layers) + 1
        for kept in (self.layers, self.hidden, *self.kv_groups, *self.ffn):
            assert kept
            assert list(kept) == sorted(set(kept))
        for per_layer in (self.kv_groups, self.ffn):
            assert len({len(kept) for kept in per_layer}) == 1

    def shape(self, source: Shape) -> Shape:
        """Return the shape that this plan leaves of `source`."""
        kv_heads = len(self.kv_groups[0])
        return Shape(
            layers=len(self.layers),
            hidden=len(self.hidden),
            heads=kv_heads * source.group,
            kv_heads=kv_heads,
            ffn=len(self.ffn[0]),
            head_dim=source.head_dim,
        )


def cut(model: LlamaForCausalLM, plan: Plan) -> LlamaForCausalLM:
    """Return a new Llama holding what `plan` keeps; `model` is not changed.

    The new model has the dtype and device of the old one, tied embeddings stay tied, and its
    configuration names head_dim, since hidden / heads need no longer give it.
    """
    source = Shape.of(model.config)
    old = model.state_dict()
    hidden = _index(plan.hidden, model)
    scales = iter(plan.norm_scales)
    new: dict[str, Tensor] = {
        "model.embed_tokens.weight": old["model.embed_tokens.weight"][:, hidden]
    }
    for i, (layer, groups, channels) in enumerate(
        zip(plan.layers, plan.kv_groups, plan.ffn, strict=True)
    ):
        kv_rows = _index(_rows(groups, source.head_dim), model)
        q_rows = _index(_rows(groups, source.head_dim * source.group), model)
        ffn = _index(channels, model)
        take, put = f"model.layers.{layer}.", f"model.layers.{i}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            new[put + norm] = old[take + norm][hidden] * next(scales)
        for name, rows in (
            ("self_attn.q_proj", q_rows),
            ("self_attn.k_proj", kv_rows),
            ("self_attn.v_proj", kv_rows),
            ("mlp.gate_proj", ffn),
            ("mlp.up_proj", ffn),
        ):
            new[f"{put}{name}.weight"] = old[f"{take}{name}.weight"][rows][:, hidden]
        for name, columns in (("self_attn.o_proj", q_rows), ("mlp.down_proj", ffn)):
            new[f"{put}{name}.weight"] = old[f"{take}{name}.weight"][hidden][:, columns]
    new["model.norm.weight"] = old["model.norm.weight"][hidden] * next(scales)
    if not model.config.tie_word_embeddings:
        new["lm_head.weight"] = old["lm_head.weight"][:, hidden]

    target = plan.shape(source)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = target.layers
    config.hidden_size = target.hidden
    config.num_attention_heads = target.heads
    config.num_key_value_heads = target.kv_heads
    config.intermediate_size = target.ffn
    config.head_dim = target.head_dim
    small = build_llama(config, new)
    small.model.rotary_emb.to(model.device)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def _index(kept: Iterable[int], model: LlamaForCausalLM) -> Tensor:
    return torch.tensor(list(kept), device=model.device)


def _rows(groups: Iterable[int], width: int) -> list[int]:
    """Rows of the given groups when every group is `width` rows."""
    return [row for group in groups for row in range(group * width, (group + 1) * width)]
