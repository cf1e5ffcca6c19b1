"""Controls for experiments: the same shape without the knowledge that importance has.

    importance   every unit by its score: what a user wants
    first        the first layers in order; widths by importance
    random       every unit by chance, from the seed; weights as they were
    scratch      the shape alone: all weights drawn anew, from the seed

A pruned start is worth what it gains over these at the same shape, text and training.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from transformers import AutoModelForCausalLM

from drama.prune.importance import Importance

Choice = Literal["importance", "first", "random", "scratch"]
CHOICES: tuple[Choice, ...] = get_args(Choice)


def control(importance: Importance, choice: Choice, seed: int) -> Importance:
    """The scores that make `importance.choose` choose as `choice` says."""
    if choice == "first":
        return replace(importance, layer=-torch.arange(len(importance.layer)).double())
    if choice == "random":
        chance = torch.Generator().manual_seed(seed)
        return Importance(
            *(
                torch.rand(scores.shape, generator=chance, dtype=torch.float64)
                for scores in vars(importance).values()
            )
        )
    return importance


def drawn_anew(model: Any, seed: int) -> Any:
    """A model of the same configuration, dtype and device with the weights that transformers gives
    a new one; the generator of the process is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: Any = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh.to(device=model.device, dtype=model.dtype).eval()
