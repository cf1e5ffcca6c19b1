"""Hard-concrete masks over the units of a model, and what makes them meet a target shape.

After Louizos et al. 2018 (arXiv 1712.01312) and Sheared LLaMA (Xia et al. 2023, arXiv 2310.06694,
section 2). A unit with parameter a = log alpha is drawn as

    s = sigmoid((log u - log(1 - u) + a) / BETA),  u uniform on (0, 1)
    z = min(1, max(0, s (ZETA - GAMMA) + GAMMA))

so that it is exactly 0 or exactly 1 with finite probability, and

    P(z > 0) = sigmoid(a - BETA log(-GAMMA / ZETA)).

The expected sparsity of a kind of unit is 1 - mean P(z > 0); a Lagrangian holds it at the target,
one pair of multipliers to a constraint:

    lambda (s - t) + phi (s - t)^2,   the multipliers ascending, masks and weights descending

Layers and hidden channels are one constraint each; KV groups, places inside a group and FFN
channels are constrained in every layer, since all layers of the exported model have one shape.

L layers, D hidden channels, G KV groups, J places of query heads inside a group (one pattern for
all groups of a layer), I FFN channels, all of the source. C constraints of a kind: 1 or L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drama.prune.importance import highest
from drama.prune.shape import Shape

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
INITIAL_MEAN, INITIAL_STD = 5.0, 0.01  # nearly everything is kept at first
# P(z > 0) is then 2e-4 to 1 - 2e-4: a unit can come back, and a target of one half is within reach
# of half the units on either side, which it is not at LLM-Shearing's log(100)
LOG_ALPHA_LIMIT = 7.0


def draw(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """z of every unit for uniform numbers in (0, 1) of the same shape."""
    logistic = (uniform.log() - (-uniform).log1p() + log_alpha) / BETA
    return (logistic.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def keep_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of every unit."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def expected_value(log_alpha: Tensor) -> Tensor:
    """z of every unit at evaluation: the stretched and clipped sigmoid, as Louizos et al. (13)."""
    return (log_alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


@dataclass(frozen=True)
class Gates:
    """The masks of one pass, by kind: layer [L], hidden [D], kv_group [L, G], query_head [L, J],
    ffn [L, I]. A kind that is not pruned is missing.

    kept: bool of the same shapes, the units that exist. One outside has z = 0; of a drawn mask
    these are the units with z > 0.
    """

    z: dict[str, Tensor]
    kept: dict[str, Tensor]

    def to(self, device: torch.device) -> Gates:
        """The same on another device."""
        z, kept = ({k: x.to(device) for k, x in part.items()} for part in (self.z, self.kept))
        return Gates(z, kept)


class Masks:
    """The parameters of the masks and of their multipliers, in float32, the same on every rank.

    Only kinds of which `target` has fewer than `source` have a mask. They live outside the engine:
    a few ten thousand numbers need no partition, and stay exact whatever the weights' precision.

    By kind: log_alpha, shaped as in `Gates`; linear and quadratic, the multipliers lambda and phi,
    [C]; counts, how many units of a row stay.
    """

    def __init__(self, source: Shape, target: Shape, *, seed: int, device: torch.device) -> None:
        self.source, self.target, self.seed, self.device = source, target, seed, device
        layers = source.layers
        sizes = {
            "layer": ((layers,), target.layers),
            "hidden": ((source.hidden,), target.hidden),
            "kv_group": ((layers, source.kv_heads), target.kv_heads),
            "query_head": ((layers, source.group), target.group),
            "ffn": ((layers, source.ffn), target.ffn),
        }
        self.counts = {k: n for k, (shape, n) in sizes.items() if n < shape[-1]}
        generator = torch.Generator().manual_seed(seed)
        self.log_alpha: dict[str, Tensor] = {}
        self.linear: dict[str, Tensor] = {}
        self.quadratic: dict[str, Tensor] = {}
        for kind in self.counts:
            shape = sizes[kind][0]
            start = INITIAL_MEAN + INITIAL_STD * torch.randn(shape, generator=generator)
            self.log_alpha[kind] = start.to(device).requires_grad_()
            for multiplier in (self.linear, self.quadratic):
                zeros = torch.zeros(shape[:-1] or (1,), device=device)
                multiplier[kind] = zeros.requires_grad_()

    @property
    def multipliers(self) -> list[Tensor]:
        """Every lambda and phi."""
        return [*self.linear.values(), *self.quadratic.values()]

    def sample(self, step: int) -> Gates:
        """The masks of a step: a function of seed, step and parameters, the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        z = {}
        for kind, log_alpha in self.log_alpha.items():
            uniform = torch.rand(log_alpha.shape, generator=generator, dtype=torch.float64)
            z[kind] = draw(log_alpha, uniform.clamp(1e-6, 1 - 1e-6).float().to(self.device))
        return Gates(z, {kind: (x > 0).detach() for kind, x in z.items()})

    @torch.no_grad()
    def final(self) -> Gates:
        """The target shape: the units with the highest parameters, at their value of evaluation,
        and no others."""
        z, kept = {}, {}
        for kind, log_alpha in self.log_alpha.items():
            rows = log_alpha.reshape(-1, log_alpha.shape[-1]).cpu()
            mask = torch.zeros_like(rows, dtype=torch.bool)
            for row, scores in enumerate(rows):
                mask[row, list(highest(scores, self.counts[kind]))] = True
            kept[kind] = mask.view_as(log_alpha).to(self.device)
            z[kind] = expected_value(log_alpha) * kept[kind]
        return Gates(z, kept)

    def sparsity(self) -> dict[str, Tensor]:
        """Expected share of dropped units, [C] by kind."""
        return {k: 1 - keep_probability(a).mean(-1).view(-1) for k, a in self.log_alpha.items()}

    def targets(self, ramp: float) -> dict[str, float]:
        """The sparsity aimed at when `ramp` (0 to 1) of the way is done."""
        return {k: ramp * (1 - n / self.log_alpha[k].shape[-1]) for k, n in self.counts.items()}

    def penalty(self, ramp: float) -> Tensor:
        """The Lagrangian's terms, summed over all constraints: a scalar that masks descend and
        multipliers ascend."""
        goal = self.targets(ramp)
        total = torch.zeros((), device=self.device)
        for kind, sparsity in self.sparsity().items():
            gap = sparsity - goal[kind]
            total = total + (self.linear[kind] * gap + self.quadratic[kind] * gap.square()).sum()
        return total

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the parameters where a unit can still be drawn both ways."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)

    def state(self) -> dict[str, Tensor]:
        """Parameters and multipliers by name, on the CPU."""
        return {name: x.detach().cpu().clone() for name, x in self._named().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""
        for name, x in self._named().items():
            x.copy_(state[name])

    def _named(self) -> dict[str, Tensor]:
        groups = {"log_alpha": self.log_alpha, "linear": self.linear, "quadratic": self.quadratic}
        return {f"{g}.{kind}": x for g, tensors in groups.items() for kind, x in tensors.items()}
