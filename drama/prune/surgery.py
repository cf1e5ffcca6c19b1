"""Cut a language model along a plan: what stays keeps its weights and its order.

L layers kept, M = 2L+1 norms, D hidden channels, G KV groups per layer, J query heads per group, E
head width, I FFN channels per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from drama.hf import build_lm
from drama.prune.shape import Shape


@dataclass(frozen=True)
class Plan:
    """What stays of a model; every index counts in the source and every tuple rises.

    layers: L layer numbers. hidden: D channels of the residual stream, one set for all layers.
    kv_groups: per kept layer, G KV heads. query_heads: per kept layer, the J places inside a group
    whose query heads stay, the same in all groups of the layer. ffn: per kept layer, I channels.
    norm_scales: M factors on the norms' weights in order of use (two per kept layer, then the final
    norm).

    A norm divides by the root mean square of its input, and in the cut model that runs over the
    kept channels only. Where these carry more than the average channel, the division is by more
    than before; the factor puts the magnitude back (`importance.choose` says how it is found).
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    kv_groups: tuple[tuple[int, ...], ...]
    query_heads: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]
    norm_scales: tuple[float, ...]

    def __post_init__(self) -> None:
        per_layer = (self.kv_groups, self.query_heads, self.ffn)
        assert all(len(kept) == len(self.layers) for kept in per_layer)
        assert len(self.norm_scales) == 2 * len(self.layers) + 1
        for kept in (self.layers, self.hidden, *self.kv_groups, *self.query_heads, *self.ffn):
            assert kept
            assert list(kept) == sorted(set(kept))
        for layers in per_layer:
            assert len({len(kept) for kept in layers}) == 1

    def shape(self, source: Shape) -> Shape:
        """Return the shape that this plan leaves of `source`."""
        kv_heads = len(self.kv_groups[0])
        return replace(
            source,
            layers=len(self.layers),
            hidden=len(self.hidden),
            heads=kv_heads * len(self.query_heads[0]),
            kv_heads=kv_heads,
            ffn=len(self.ffn[0]),
        )


def cut(model: Any, plan: Plan) -> Any:
    """Return a new model holding what `plan` keeps; `model` is not changed.

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
    for i, layer in enumerate(plan.layers):
        kv_rows = head_rows(plan.kv_groups[i], source.head_dim)
        heads = query_heads(plan.kv_groups[i], plan.query_heads[i], source.group)
        q_rows = head_rows(heads, source.head_dim)
        q_rows, kv_rows = q_rows.to(model.device), kv_rows.to(model.device)
        ffn = _index(plan.ffn[i], model)
        cuts = {
            "self_attn.q_proj": (q_rows, hidden),
            "self_attn.k_proj": (kv_rows, hidden),
            "self_attn.v_proj": (kv_rows, hidden),
            "self_attn.o_proj": (hidden, q_rows),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        take, put = f"model.layers.{layer}.", f"model.layers.{i}."
        for name, (rows, columns) in cuts.items():
            new[f"{put}{name}.weight"] = old[f"{take}{name}.weight"][rows][:, columns]
            if (bias := old.get(f"{take}{name}.bias")) is not None:
                new[f"{put}{name}.bias"] = bias[rows]
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            new[put + norm] = old[take + norm][hidden] * next(scales)
        for norm in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            if take + norm in old:  # over a head's width, which stays
                new[put + norm] = old[take + norm].clone()
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
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in plan.layers]
    small = build_lm(config, new)
    small.model.rotary_emb.to(model.device)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def query_heads(groups: Sequence[int], places: Sequence[int], group_size: int) -> list[int]:
    """Numbers of the query heads at these places of these KV groups."""
    return [group * group_size + place for group in groups for place in places]


def head_rows(heads: Iterable[int], width: int) -> Tensor:
    """Rows of a projection that belong to these heads, int64."""
    return torch.tensor([row for head in heads for row in range(head * width, (head + 1) * width)])


def _index(kept: Iterable[int], model: Any) -> Tensor:
    return torch.tensor(list(kept), device=model.device)
