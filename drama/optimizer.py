"""Which weights move, by which rule, and how fast at which step."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from drama.distributed import Ranks, host_group
from drama.memory import GRADIENT_SHARE, spare_bytes
from drama.settings import Optimization, Schedule

Reduction = Literal["auto", "step", "chunk"]
# DeepSpeed's count of samples waits for the GPU at every forward: the host could not run ahead
WAITLESS = {"throughput": {"enabled": False}}


class Pace(NamedTuple):
    """Where the learning rate turns, in steps; part of every checkpoint.

    flat_until: up to this step the rate does not depend on `num_steps`, so a run can be prolonged
    from there; 0 where the schedule looks at the end all the way.
    """

    num_steps: int
    warmup: int
    flat_until: int

    @classmethod
    def of(cls, train: Schedule, num_steps: int, warmup: int | None = None) -> Pace:
        """The recipe's for `num_steps`. warmup: of the run that goes on; a prolonged one would
        otherwise be back in a longer warm-up."""
        if warmup is None:
            warmup = round(train.warmup_ratio * num_steps)
        flat_until = 0
        if train.schedule == "constant":
            flat_until = num_steps
        elif train.schedule == "wsd":
            flat_until = max(warmup, num_steps - round(train.decay_ratio * num_steps))
        return cls(num_steps, warmup, flat_until)

    def follows(self, earlier: Pace, step: int) -> bool:
        """Whether a run that came to `step` at the earlier pace may go on at this one: the rates up
        to there are the same."""
        return self == earlier or step <= min(self.flat_until, earlier.flat_until)


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
    module: nn.Module, train: Optimization, device: torch.device, *, offloaded: bool
) -> torch.optim.Optimizer:
    """AdamW: torch's, fused.

    offloaded: the states live on the host beside a GPU, where DeepSpeed's vectorised one serves if
    its extension can be built.
    """
    groups = parameter_groups(module, train.weight_decay)
    options: dict[str, Any] = {"lr": train.lr, "betas": train.betas}
    if device.type == "cuda" and offloaded:
        from deepspeed.ops import adam, op_builder

        if op_builder.CPUAdamBuilder().is_compatible(verbose=False):
            return adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    # one pass over weights and states, on a CPU seven times as fast
    return torch.optim.AdamW(groups, fused=True, **options)


def start_engine(
    module: nn.Module,
    train: Optimization,
    config: dict[str, Any],
    pace: Pace,
    *,
    output: Path,
    ranks: Ranks,
) -> Any:
    """DeepSpeed's engine over a module, with the recipe's optimizer and schedule.

    config: the whole DeepSpeed JSON. Its monitors write under `output`, on the main rank.
    """
    ours = {"enabled": True, "output_path": str(output), "job_name": "tensorboard"}
    config["tensorboard"] = ours | config.get("tensorboard", {})
    config["tensorboard"]["enabled"] &= ranks.is_main
    config["steps_per_print"] = 2**31
    config.setdefault("timers", WAITLESS)
    stage = config.get("zero_optimization", {})
    offloaded = stage.get("offload_optimizer", {}).get("device") == "cpu"
    optimizer = adamw(module, train, ranks.device, offloaded=offloaded)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=schedule(optimizer, train, pace),
        config=config,
    )
    look_once(engine)
    return engine


def look_once(engine: Any) -> None:
    """Have ZeRO 1 and 2 find infinity and NaN in the gradient by its norm alone.

    DeepSpeed looks for them in every tensor first, by itself, and waits for the answer. The norm,
    which it takes behind that, is no number either.
    """
    measured = getattr(engine.optimizer, "compute_grad_norm", False)
    if engine.zero_optimization_stage() in (1, 2) and measured:
        engine.optimizer.has_overflow = lambda *_, **__: False


def settle_reduction(engine: Any, wanted: Reduction) -> Reduction:
    """Whether gradients are reduced once a step or after each chunk; a collective.

    ZeRO 0 only adds up locally, "chunk" it is. "auto" takes "step", under ZeRO 2 and 3 only where
    one full gradient is small beside the memory that every rank has left. Where there is that room
    on a GPU, ZeRO 1 takes "chunk": it adds up beside the last chunk's gradient and reduces once,
    behind that one's backward pass, which is faster there.
    """
    stage = engine.zero_optimization_stage()
    if not stage:
        return "chunk"
    if wanted != "auto":
        return wanted
    weights = engine.module.parameters()
    # ds_numel: under ZeRO 3 a weight is empty here
    size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in weights)
    fits = torch.tensor(int(size < GRADIENT_SHARE * spare_bytes(engine.device)))
    if engine.world_size > 1:
        dist.all_reduce(fits, op=dist.ReduceOp.MIN, group=host_group())
    if stage == 1:
        return "chunk" if fits.item() and engine.device.type == "cuda" else "step"
    return "step" if fits.item() else "chunk"


def step_engine(engine: Any, *, sound: bool = True) -> float:
    """The engine's optimizer and schedule step; return the gradients' norm before clipping.

    Where the norm is no number the schedule alone moves on: weights and moments stay.
    sound: false, on every rank, where something else of the step is no number: the norm is NaN.
    """
    if engine.zero_optimization_stage():
        skipped = engine.skipped_steps
        with nullcontext() if sound else _overflowing(engine.optimizer):
            engine.step()
        if engine.skipped_steps > skipped:
            engine.lr_scheduler.step()  # which DeepSpeed holds back
            return math.nan
        return float(engine.get_global_grad_norm())
    # DeepSpeed measures it only where ZeRO does
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters])) if sound else math.nan
    if not math.isfinite(norm):
        for parameter in parameters:  # AdamW passes over a weight without a gradient
            parameter.grad = None
        clip = engine.clip_fp32_gradients  # it wants at least one
        engine.clip_fp32_gradients = lambda: None
        engine.step()
        engine.clip_fp32_gradients = clip
        return norm
    engine.step()
    return norm


@contextmanager
def _overflowing(optimizer: Any) -> Iterator[None]:
    """Have a ZeRO optimizer find a norm that is no number: of its groups (stage 3), or of all."""
    name = "_get_norm_groups" if hasattr(optimizer, "_get_norm_groups") else "scaled_global_norm"
    real = getattr(optimizer, name)

    def norm() -> Any:
        found = real()
        return [x * math.nan for x in found] if isinstance(found, list) else found * math.nan

    setattr(optimizer, name, norm)
    try:
        yield
    finally:
        delattr(optimizer, name)


def schedule(
    optimizer: torch.optim.Optimizer, train: Schedule, pace: Pace
) -> torch.optim.lr_scheduler.LambdaLR:
    """The recipe's learning rates at this pace."""
    factor = functools.partial(learning_rate_factor, train=train, pace=pace)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def learning_rate_factor(step: int, *, train: Schedule, pace: Pace) -> float:
    """Share of the peak rate at a step (from 0): linear warm-up, then the recipe's schedule, which
    is at `min_lr_ratio` after the last step.

    wsd (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395): the peak rate up to the last
    `decay_ratio` of the steps, then down along 1 - sqrt(progress) (Haegele et al. 2024, arXiv
    2405.18392).
    """
    if step < pace.warmup:
        return (step + 1) / pace.warmup
    if train.schedule == "constant":
        return 1.0
    first = max(pace.warmup, pace.flat_until)
    done = min(1.0, max(0, step - first) / max(1, pace.num_steps - first))
    if train.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = 1 - math.sqrt(done) if train.schedule == "wsd" else 1 - done
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * left
