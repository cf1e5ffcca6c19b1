"""Which weights move, by which rule, and how fast at which step."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn

from drama.recipe import TrainRecipe


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable weights: matrices decay, norms, biases and the embedding table do not."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and "embed_tokens" not in name
            (matrices if decays else others).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def adamw(
    module: nn.Module, train: TrainRecipe, device: torch.device, *, offloaded: bool
) -> torch.optim.Optimizer:
    """AdamW: DeepSpeed's fused kernel where its extension can be built, else torch's.

    offloaded: the states live on the host beside a GPU, where DeepSpeed's vectorised one serves.
    """
    groups = parameter_groups(module, train.weight_decay)
    options: dict[str, Any] = {"lr": train.lr, "betas": train.betas}
    if device.type == "cuda":
        from deepspeed.ops import adam, op_builder

        if offloaded and op_builder.CPUAdamBuilder().is_compatible(verbose=False):
            return adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        if not offloaded and op_builder.FusedAdamBuilder().is_compatible(verbose=False):
            return adam.FusedAdam(groups, adam_w_mode=True, **options)
        options["fused"] = not offloaded
    return torch.optim.AdamW(groups, **options)


def schedule(
    optimizer: torch.optim.Optimizer, train: TrainRecipe, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The recipe's learning rates for `num_steps` steps."""
    factor = functools.partial(learning_rate_factor, train=train, num_steps=num_steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def learning_rate_factor(step: int, *, train: TrainRecipe, num_steps: int) -> float:
    """Share of the peak rate at a step: linear warm-up, then the recipe's schedule.

    wsd (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395): the peak rate up to the last
    `decay_ratio` of the steps, then down along 1 - sqrt(progress) (Haegele et al. 2024, arXiv
    2405.18392).
    """
    warmup = round(train.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "constant":
        return 1.0
    first = warmup
    if train.schedule == "wsd":
        first = max(warmup, num_steps - round(train.decay_ratio * num_steps))
    done = min(1.0, max(0, step - first) / max(1, num_steps - first))
    if train.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = 1 - math.sqrt(done) if train.schedule == "wsd" else 1 - done
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * left
