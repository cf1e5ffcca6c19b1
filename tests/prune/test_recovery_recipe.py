from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drama.errors import UserError
from drama.prune.recovery_recipe import RecoveryRecipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["recover", "prune-iterated"])
def test_the_shipped_recipes_are_valid(name: str) -> None:
    recipe = RecoveryRecipe.load(ROOT / "recipes" / f"{name}.yaml")
    assert recipe.loss.kl > 0
    assert (recipe.rounds is None) == (name == "recover")


def test_the_trial_in_the_recipe_can_be_typed() -> None:
    """Its --set options, as a shell gives them."""
    text = (ROOT / "recipes" / "recover.yaml").read_text()
    lines = [line.lstrip("# ").rstrip("\\") for line in text.splitlines() if "--set" in line]
    words = " ".join(lines[1:]).replace('"', "").replace("$LLM", "llm").split("--set ")[1:]
    recipe = RecoveryRecipe.load(
        ROOT / "recipes" / "recover.yaml", [word.strip() for word in words]
    )
    assert recipe.train.batch_texts == 8


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {
        "model": {"path": "cut"}, "data": {"shards": ["shards"]}, "train": {"steps": 5},
    }  # fmt: skip
    for name, values in sections.items():
        found[name] = found.get(name, {}) | values
    return {"name": "x", "output": "out", **found}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"loss": {"kl": 1}}, ["loss.kl imitates a parent", "loss.kl 0"]),
        ({"loss": {"hidden": 1}}, ["loss.hidden imitates"]),
        ({"loss": {"lm": 0}}, ["all weights are 0"]),
        ({"train": {"epochs": 1}}, ["exactly one of steps and epochs"]),
        ({"train": {"batch_texts": 100}}, ["batch_texts 100", "64"]),
        ({"train": {"token_budget": 64}}, ["token_budget 64", "1024"]),
        ({"model": {"parent": "p"}, "loss": {"objective": "mntp"}}, ["mntp", "model.parent null"]),
        ({"loss": {"objective": "mntp"}, "rounds": {"calibration": "x", "cuts": [{"to": "y"}]}},
         ["mntp", "rounds"]),
        ({"data": {"update_every": 5}}, ["data.update_every", "eval.shards"]),
        ({"model": {"parent": "p"}, "eval": {"shards": ["h"]},
          "data": {"update_every": 5, "language_alpha": 0.3}}, ["language_alpha"]),
        ({"loss": {"temprature": 1}}, ["did you mean 'temperature'"]),
        ({"rounds": {"calibration": "x", "cuts": []}}, ["rounds.cuts"]),
    ],
)  # fmt: skip
def test_impossible_combinations(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        RecoveryRecipe.from_tree(tree(**sections))
    for word in words:
        assert word in str(error.value)
