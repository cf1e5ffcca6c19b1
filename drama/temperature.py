"""A temperature that is trained with the model.

It lives outside the engine: the loss is evaluated once on cached vectors, so its gradient is known
before the engine's backward pass begins, and is the same on every rank once it is summed. The step
is Adam's on log T, without decay, at the schedule's learning rate, in float64 on the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drama.recipe import TEMPERATURE_RANGE

LOWEST, HIGHEST = TEMPERATURE_RANGE  # a temperature may run away
BETA1, BETA2, EPS = 0.9, 0.98, 1e-8


class LearnedTemperature:
    """T = exp(log_t); the same numbers on every rank. One that never steps is a fixed one."""

    def __init__(self, initial: float) -> None:
        self.state = {"log": math.log(initial), "mean": 0.0, "square": 0.0, "steps": 0.0}

    @property
    def value(self) -> float:
        return math.exp(self.state["log"])

    def leaf(self, device: torch.device) -> Tensor:
        """A 0-dim float64 tensor whose gradient `step` wants."""
        return torch.tensor(self.value, dtype=torch.float64, device=device, requires_grad=True)

    def step(self, gradient: float, lr: float) -> None:
        """One Adam step; `gradient` is that of the global loss with respect to T."""
        s, g = self.state, gradient * self.value
        s["steps"] += 1
        s["mean"] = BETA1 * s["mean"] + (1 - BETA1) * g
        s["square"] = BETA2 * s["square"] + (1 - BETA2) * g * g
        mean = s["mean"] / (1 - BETA1 ** s["steps"])
        square = s["square"] / (1 - BETA2 ** s["steps"])
        moved = s["log"] - lr * mean / (math.sqrt(square) + EPS)
        s["log"] = min(max(moved, math.log(LOWEST)), math.log(HIGHEST))
