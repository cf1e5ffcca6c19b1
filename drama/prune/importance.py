"""Choose what stays by importance: one score per unit.

After Minitron (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2) for the widths:

    FFN channel      mean over tokens of |a|, a the input of down_proj; ranked within its layer
    KV group         sqrt(mean over tokens of |c|^2), c the slice of o_proj's input that the group's
                     query heads fill; ranked within its layer
    query head       the same, c the slices of the heads at one place in all groups of the layer
    hidden channel   sum over all norms of the mean over tokens of |y|, y the norm's output; one
                     ranking, since all layers share the residual stream
    layer            the later the loss can spare it, the higher (`drama.prune.layers`)

Held-out loss of SmolLM2-135M (3.44 nats whole), one dimension cut at a time, 16k tokens of
English Wikipedia, settled the variants: FFN 1536 to 1024, |a| 4.40, times the norm of down_proj's
column 4.48, random 8.04; KV groups 3 to 2, as above 3.97, times the norms of o_proj's columns 4.56,
random 8.58; hidden 576 to 504, as above 4.46, random 9.84.

L layers, M = 2L+1 norms, D hidden channels, G KV groups, J query heads a group, I FFN
channels, all of the source.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from drama.prune.layers import LayerOrder
from drama.prune.shape import Shape
from drama.prune.statistics import Statistics
from drama.prune.surgery import Plan


@dataclass(frozen=True)
class Importance:
    """Scores, float64; higher stays longer.

    layer [L], hidden [D], kv_group [L, G], query_head [L, J], ffn [L, I].
    """

    layer: Tensor
    hidden: Tensor
    kv_group: Tensor
    query_head: Tensor
    ffn: Tensor


def score(statistics: Statistics, source: Shape, order: LayerOrder) -> Importance:
    """Turn the statistics of a pass and the order of the layers into one score per unit."""
    heads = (source.layers, source.kv_heads, source.group, source.head_dim)
    by_head_LGJE = statistics.attention.view(heads)
    return Importance(
        layer=order.scores(),
        hidden=statistics.normed.sum(0),
        kv_group=by_head_LGJE.sum((2, 3)).sqrt(),
        query_head=by_head_LGJE.sum((1, 3)).sqrt(),
        ffn=statistics.ffn,
    )


def choose(importance: Importance, energy_MD: Tensor, target: Shape) -> Plan:
    """Return the plan that keeps the highest scores, in their order.

    The factor on a norm is sqrt(mean over the kept channels of energy), `Statistics.energy` being
    (x / rms(x))^2: in the mean, the norm's output then has the magnitude it had (hidden 576 to 504
    on SmolLM2-135M: loss 4.46 with the factors, 4.69 without). Channels that are zero everywhere
    are so cut exactly.
    """
    layers = highest(importance.layer, target.layers)
    hidden = highest(importance.hidden, target.hidden)
    norms = [norm for layer in layers for norm in (2 * layer, 2 * layer + 1)]
    norms.append(energy_MD.shape[0] - 1)
    scales_M = energy_MD[:, list(hidden)].mean(1).sqrt()
    return Plan(
        layers=layers,
        hidden=hidden,
        kv_groups=tuple(highest(importance.kv_group[i], target.kv_heads) for i in layers),
        query_heads=tuple(highest(importance.query_head[i], target.group) for i in layers),
        ffn=tuple(highest(importance.ffn[i], target.ffn) for i in layers),
        norm_scales=tuple(scales_M[norm].item() for norm in norms),
    )


def highest(score_U: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` highest scores, rising; of equal scores the lower index stays."""
    order = score_U.argsort(descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))
