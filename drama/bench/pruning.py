"""What masks cost: a step of learned masks beside plain language-model training of the same model.

Same engine, ZeRO stage, precision, optimizer, rows and passes. The plain step is Hugging Face's own
forward with labels. The masked one is timed with masks that are all open, half way to the target
and at the target, and at the target without leaving anything out.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from drama.bench.plain_lm import PlainLM
from drama.bench.rows import Rows, interleaved
from drama.console import console
from drama.prune.alive import Alive, install
from drama.prune.learn import Pruner
from drama.prune.masks import LOG_ALPHA_LIMIT, Gates

STATES = {"open": 0.0, "half way": 0.5, "target": 1.0}


def set_masks(pruner: Pruner, ramp: float, seed: int = 0) -> None:
    """Close as many masks as the target asks for at this part of the way, surely."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for kind, log_alpha in pruner.masks.log_alpha.items():
            share = pruner.masks.targets(ramp)[kind]
            order = torch.rand(log_alpha.shape, generator=generator).argsort(-1).argsort(-1)
            closed = order < round(share * log_alpha.shape[-1])
            limit = torch.full_like(log_alpha, LOG_ALPHA_LIMIT)
            log_alpha.copy_(torch.where(closed.to(log_alpha.device), -limit, limit))


def check(pruner: Pruner, plain: PlainLM, ids_BN: Tensor) -> None:
    """Refuse to time two ways that do not compute the same: without masks the losses agree."""
    with torch.no_grad():
        ids_BN = ids_BN.to(pruner.device)
        install(pruner.model.lm, Alive(Gates({}, {}), pruner.source))
        ours = pruner.engine(ids_BN).mean().item()
        theirs = plain.engine(input_ids=ids_BN, labels=ids_BN, use_cache=False).loss.item()
    limit = 1e-2 if pruner.recipe.train.precision == "bf16" else 1e-4
    assert abs(ours - theirs) < limit * abs(theirs), (ours, theirs)
    console.print(f"same loss without masks: {ours:.4f} and {theirs:.4f}", highlight=False)


def measure(pruner: Pruner, plain: PlainLM, rows: Rows, *, seconds: float) -> dict[str, float]:
    """Time the ways in turn; add rows of tokens/s and of seconds by phase, return tokens/s.

    "nothing left out" is the ablation: the same masks at the target, folded into whole weights.
    """
    recipe = pruner.recipe
    ids_RN, _ = pruner.text.batch(0, pruner.domains.weights, recipe.train.batch_rows)
    sample = pruner.masks.sample
    check(pruner, plain, ids_RN[: recipe.train.rows_per_pass])
    phases: dict[str, list[dict[str, float]]] = {}
    living: dict[str, float] = {}

    def masked(name: str, ramp: float, whole: bool) -> None:
        set_masks(pruner, ramp)
        pruner.masks.sample = whole_sample if whole else sample  # type: ignore[method-assign]
        found = pruner.step(0)
        phases.setdefault(name, []).append(found.seconds)
        living[name] = found.alive

    def whole_sample(step: int) -> Gates:
        gates = sample(step)
        return Gates(gates.z, {kind: torch.ones_like(kept) for kind, kept in gates.kept.items()})

    def dense() -> None:
        parts = ids_RN.split(recipe.train.rows_per_pass)
        plain.step([{"input_ids": ids_BN, "labels": ids_BN} for ids_BN in parts])
        phases.setdefault("plain", []).append(plain.seconds)

    runs: dict[str, Callable[[], None]] = {"plain": dense}
    for name, ramp in STATES.items():
        runs[name] = functools.partial(masked, name, ramp, False)
    runs["target, nothing left out"] = functools.partial(
        masked, "target, nothing left out", 1.0, True
    )
    times = interleaved(runs, pruner.device, seconds=seconds, rounds=8)
    tokens = ids_RN.numel()
    config = {
        "model": Path(recipe.model.path).name,
        "to": recipe.model.to,
        "rows": list(ids_RN.shape),
        "rows_per_pass": recipe.train.rows_per_pass,
        "precision": recipe.train.precision,
        "deepspeed": recipe.train.deepspeed,
    }
    speeds = {}
    for name, spent in times.items():
        provider = "transformers" if name == "plain" else "ours"
        x = "no masks" if name == "plain" else f"masks {name}"
        facts = config | ({} if name == "plain" else {"alive": round(living[name], 3)})
        rates = [tokens / second for second in spent]
        rows.add(provider, "step", "tokens/s", x, rates, facts)
        for phase in phases[name][0]:
            values = [part[phase] for part in phases[name][-len(spent) :]]
            rows.add(provider, phase, "seconds", x, values, facts)
        speeds[name] = statistics.median(rates)
    return speeds
