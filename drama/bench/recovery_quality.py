"""What a parent is worth: the same recovery with and without it, over several seeds.

Every arm is one whole run of `drama.prune.recovery` for every seed. A seed draws the same texts for
all arms, so arms differ by their loss alone, at equal tokens.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from drama.bench.rows import Rows
from drama.console import console
from drama.distributed import Ranks
from drama.prune.output import REPORT_NAME
from drama.prune.recovery import Recoverer
from drama.prune.recovery_recipe import RecoveryRecipe
from drama.settings import check_same_run
from drama.testing import read_metrics

# by name, the weights of the loss
ARMS: dict[str, dict[str, float]] = {
    "cross-entropy": {"lm": 1.0, "kl": 0.0, "hidden": 0.0},
    "cross-entropy + KL": {"lm": 1.0, "kl": 1.0, "hidden": 0.0},
    "cross-entropy + KL + states": {"lm": 1.0, "kl": 1.0, "hidden": 1.0},
}
Curves = dict[str, list[list[tuple[int, float]]]]  # by arm and seed: tokens seen, held-out loss


def compare(
    recipe: RecoveryRecipe, ranks: Ranks, arms: Iterable[str], seeds: Iterable[int], rows: Rows
) -> Curves:
    """Run what has not been run yet under `recipe.output`; add rows of held-out loss by tokens."""
    curves: Curves = {}
    for seed in seeds:
        for arm in arms:
            folder = _folder(recipe, arm, seed)
            weights = {f"loss__{name}": x for name, x in ARMS[arm].items()}
            changed = recipe.with_values(output=str(folder), seed=seed, **weights)
            console.rule(f"{arm}, seed {seed}")
            if not _is_done(changed):
                recoverer = Recoverer(changed, ranks)
                recoverer.run()
                recoverer.engine.destroy()
                del recoverer
                gc.collect()  # the engine's hooks hold on to it in circles
            curves.setdefault(arm, []).append(_curve(folder))
    for arm, runs in curves.items():
        for point in zip(*runs, strict=True):
            tokens = [n for n, _ in point]
            losses = [x for _, x in point]
            facts = _facts(RecoveryRecipe.load(_folder(recipe, arm, 0) / "recipe.yaml"))
            config = {"losses": losses, "tokens": tokens, "loss": ARMS[arm], **facts}
            seen = round(sum(tokens) / len(tokens))
            rows.add(arm, "held-out", "nats/token", f"{seen:,} tokens", losses, config)
    return curves


def _is_done(recipe: RecoveryRecipe) -> bool:
    """Whether this very run has ended.

    Raises:
        UserError: its folder holds another one.
    """
    if not (recipe.output / "model" / REPORT_NAME).is_file():
        return False
    stored = RecoveryRecipe.load(recipe.output / "recipe.yaml")
    if recipe.train.precision == "auto":
        recipe = recipe.with_values(train__precision=stored.train.precision)
    # how gradients are reduced is settled by the run itself
    check_same_run(stored, recipe, {"step": {"grad_reduction"}})
    return True


def _folder(recipe: RecoveryRecipe, arm: str, seed: int) -> Path:
    return recipe.output / f"{arm.replace(' ', '')}-{seed}"


def _recovery_facts(run: Path) -> dict[str, Any]:
    text = (run / "model" / REPORT_NAME).read_text(encoding="utf-8")
    facts: dict[str, Any] = json.loads(text)["recoveries"][-1]
    return facts


def _curve(run: Path) -> list[tuple[int, float]]:
    """Held-out loss before the first step and wherever it was judged."""
    curve = [(0, float(_recovery_facts(run)["losses_before"]["student"]["loss"]))]
    seen = 0
    for line in read_metrics(run):
        seen += line["tokens"]
        if "evaluation" in line:
            curve.append((seen, line["evaluation"]["loss"]))
    return curve


def _facts(recipe: RecoveryRecipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "steps": recipe.train.steps,
        "batch_texts": recipe.train.batch_texts,
        "lr": recipe.train.lr,
        "precision": recipe.train.precision,
    }


def loss_of_parent(recipe: RecoveryRecipe, arm: str, seed: int) -> float:
    """The parent's loss on the same held-out texts."""
    return float(_recovery_facts(_folder(recipe, arm, seed))["losses_before"]["parent"]["loss"])
