"""How masks close: the steps of their parameters and multipliers, and the rising target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drama.optimizer import Pace, learning_rate_factor
from drama.prune.alive import Alive
from drama.prune.masks import Masks
from drama.prune.recipe import MaskRecipe

ADAM_BETAS = (0.9, 0.95)


class Closing:
    """AdamW of the masks, which descend, and of the multipliers, which ascend."""

    def __init__(self, masks: Masks, recipe: MaskRecipe, num_steps: int) -> None:
        self.masks, self.recipe, self.num_steps = masks, recipe, num_steps
        options: dict[str, Any] = {"betas": ADAM_BETAS, "weight_decay": 0.0}
        self._optimizers = [
            torch.optim.AdamW(list(masks.log_alpha.values()), lr=recipe.lr, **options),
            torch.optim.AdamW(masks.multipliers, lr=recipe.multiplier_lr, maximize=True, **options),
        ]

    def ramp(self, step: int) -> float:
        """How far the target is, 0 to 1: it rises linearly over the first part of the steps."""
        length = self.recipe.ramp_ratio * self.num_steps
        return min(1.0, (step + 1) / length) if length else 1.0

    def step(self, step: int, alive: Alive, gradients: Tensor) -> float:
        """Step masks and multipliers once; return the Lagrangian's terms before.

        gradients: of the language-model loss, laid out as `alive.gradients()`.
        """
        pace = Pace.of(self.recipe, self.num_steps)
        factor = learning_rate_factor(step, train=self.recipe, pace=pace)
        rates = (self.recipe.lr, self.recipe.multiplier_lr)
        for optimizer, rate in zip(self._optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
        penalty = self.masks.penalty(self.ramp(step))
        alive.backward(gradients, penalty)
        for optimizer in self._optimizers:
            optimizer.step()
        self.masks.clamp()
        return penalty.item()

    def state(self) -> dict[str, Tensor]:
        """Masks, multipliers and moments by name, on the CPU: what `load` takes."""
        state = self.masks.state()
        for i, optimizer in enumerate(self._optimizers):
            for number, moments in optimizer.state_dict()["state"].items():
                for name, x in moments.items():
                    state[f"optimizer.{i}.{number}.{name}"] = x.detach().cpu().clone()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""
        self.masks.load(state)
        for i, optimizer in enumerate(self._optimizers):
            moments: dict[int, dict[str, Tensor]] = {}
            for key, x in state.items():
                kind, *place = key.split(".")
                if kind == "optimizer" and int(place[0]) == i:
                    moments.setdefault(int(place[1]), {})[place[2]] = x
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
