"""What a run computes with: chosen once from recipe, device and installed packages, shown once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from drama import attention, fusion
from drama.blocks import Execution
from drama.console import console
from drama.encoder import Encoder
from drama.errors import UserError
from drama.gradcache import GradCache
from drama.kernels import infonce, pool
from drama.recipe import Recipe


@dataclass(frozen=True)
class Choice:
    """One line of the table."""

    what: str
    chosen: str
    why: str


def prepare(
    encoder: Encoder, recipe: Recipe, device: torch.device, world_size: int = 1
) -> list[Choice]:
    """Set the encoder up as the recipe's `step` says; return what was chosen.

    Raises:
        UserError: Liger-Kernel is asked for where it cannot run, or beside the compiler.
    """
    step = recipe.step
    compiled, why = _compiled(encoder, recipe, device, world_size)
    encoder.execution = Execution(
        pooled_last_block=step.pooled_last_block,
        pooled_norm=step.pooled_norm,
        recompute_blocks=step.recompute_blocks,
        compiled=compiled,
    )
    fused = ("Inductor", "compiled")  # which fuses these itself
    if not compiled:
        fused = fusion.fuse(encoder.backbone, step.liger, device)
    last = encoder.settings.pooling == "last" and step.pooled_last_block
    return [
        Choice("norm, SwiGLU, RoPE", *fused),
        Choice("torch.compile", "around attention" if compiled else "off", why),
        Choice(
            "last block",
            "at the pooled tokens" if last else "at every token",
            "exact, less work" if last else _off(step.pooled_last_block, "mean pooling reads all"),
        ),
        Choice(
            "final norm",
            "with the pooling" if step.pooled_norm else "at every token",
            "exact, less memory" if step.pooled_norm else "step.pooled_norm: false",
        ),
        Choice(
            "activations",
            "block inputs only" if step.recompute_blocks else "all kept",
            f"step.recompute_blocks: {str(step.recompute_blocks).lower()}",
        ),
    ]


def show(choices: list[Choice], encoder: Encoder, step: GradCache, dtype: torch.dtype) -> None:
    """Print the table, with what the gradient cache settled on."""
    device, world = step.device, step.world_size
    vectors = torch.empty(1, encoder.dim, dtype=dtype, device=device)
    name, why = attention.choose_backend(device.type, dtype)
    many = infonce.choose_backend("auto", vectors.expand(4096, -1), 4096 * world)
    rows = [
        Choice("attention", name, why),
        *choices,
        optimizer_choice(step.engine),
        Choice("pooling", pool.choose_backend("auto", vectors), f"{device.type} kernel"),
        Choice("loss", many, f"{device.type}; plain where the batch is small"),
        reduction_choice(step.stage, step.reduction),
        Choice("kept graphs", str(step.room.wanted), _kept(step)),
        Choice(
            "texts of a rank",
            "dealt by length" if step.balance and world > 1 else "as it reads them",
            f"{world} ranks" if world > 1 else "one rank",
        ),
    ]
    show_choices(rows)


def show_choices(rows: Sequence[Choice]) -> None:
    """Print them as a table."""
    table = Table("what", "chosen", "why", title="how this run computes", title_justify="left")
    for row in rows:
        table.add_row(row.what, row.chosen, row.why)
    console.print(table)


def reduction_choice(stage: int, reduction: str) -> Choice:
    """When gradients are reduced under a ZeRO stage, and what a rank holds for it."""
    if reduction == "step":
        return Choice("gradient reduction", "once a step", "one full gradient a rank")
    if stage < 2:
        return Choice("gradient reduction", "with the last chunk", "adds up locally")
    return Choice("gradient reduction", "after each chunk", "no full gradient a rank")


def optimizer_choice(engine: Any) -> Choice:
    """Whose optimizer an engine steps."""
    kind = type(engine.basic_optimizer)
    ours = kind.__module__.startswith("deepspeed")
    return Choice("optimizer", kind.__name__, "DeepSpeed's kernel" if ours else "torch's")


def _kept(step: GradCache) -> str:
    if step.room.wanted == "auto":
        return "measured in the first step"
    return "encoded once, not twice" if step.room.wanted else "every chunk is encoded twice"


def _off(wanted: bool, otherwise: str) -> str:
    return otherwise if wanted else "step.pooled_last_block: false"


def _compiled(
    encoder: Encoder, recipe: Recipe, device: torch.device, world_size: int
) -> tuple[bool, str]:
    """Whether the blocks are compiled, and why."""
    wanted = recipe.step.compile
    if recipe.step.liger == "on":
        if wanted == "on":
            raise UserError("step.compile on, step.liger on: both fuse the same work; choose one")
        return False, "step.liger: on"
    if wanted != "auto":
        return wanted == "on", f"step.compile: {wanted}"
    if device.type != "cuda":
        return False, f"brings nothing on {device.type}"
    config = recipe.deepspeed_config(world_size=world_size)
    if config.get("zero_optimization", {}).get("stage", 0) == 3:
        return False, "ZeRO 3 gathers weights by hooks"
    # weights lie one behind the other in ZeRO's buffer, and all layers share one compiled code
    if any(weight.numel() % 8 for weight in encoder.parameters()):
        return False, "a weight's size is no multiple of 16 bytes"
    return True, "faster, and keeps less of a graph"
