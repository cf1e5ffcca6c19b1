from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from drama.demo import ROOT
from drama.errors import UserError
from drama.evidence.nodes import Node, in_order
from drama.evidence.plan import make_plan
from drama.evidence.scales import CPU, SCALES, SMOKE
from drama.prune.recipe import PruneRecipe
from drama.prune.recovery_recipe import RecoveryRecipe
from drama.recipe import Recipe


def plan(only=(), scale=SMOKE):
    return make_plan(scale, None, Path("llm"), "teacher", only)


def test_a_key_follows_from_commands_and_from_what_is_before():
    first = Node("a", (("drama", "x", "{out}"),), 1.0)
    second = Node("b", (("drama", "y", first.at("model")),), 1.0, (first,))
    changed = replace(first, commands=(("drama", "x", "--seed", "1", "{out}"),))
    follows = Node("b", (("drama", "y", changed.at("model")),), 1.0, (changed,))
    assert second.key != follows.key
    assert first.key == Node("a", (("drama", "x", "{out}"),), 7.0).key  # minutes are no content
    assert first.lines() == [["drama", "x", first.folder]]
    assert in_order([second]) == [first, second]


def test_keys_follow_the_contents_of_the_data(tmp_path):
    """A fresh copy of the folder computes nothing anew."""
    folder = tmp_path / "data"
    (folder / "beir").mkdir(parents=True)
    (folder / "beir" / "corpus.jsonl").write_text("one")

    def keys():
        return [node.key for cell in make_plan(SMOKE, folder, None, "t") for node in cell.nodes()]

    before = keys()
    os.utime(folder / "beir" / "corpus.jsonl", (1, 1))
    assert keys() == before
    (folder / "beir" / "corpus.jsonl").write_text("two")  # as long as before
    assert not set(keys()) & set(before)


def test_seed_0_of_all_comes_first_and_nothing_comes_before_its_needs():
    cells = plan(scale=replace(SMOKE, seeds=(0, 1)), only=["pruned", "batch"])
    seeds = [cell.seed for cell in cells]
    assert seeds == sorted(seeds)
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        seen = set()
        for node in cell.nodes():
            assert {need.folder for need in node.needs} <= seen
            seen.add(node.folder)


def test_shared_parts_are_made_once():
    cells = plan(only=["pruned", "shape"])
    by_name = {cell.name: cell for cell in cells}
    pruned, shaped = (
        by_name["pruned/small importance recovered/0"],
        by_name["shape/bidirectional, mean/0"],
    )
    assert pruned.evaluation.folder == shaped.evaluation.folder
    nodes = in_order(cell.evaluation for cell in cells)
    assert len([node for node in nodes if node.name == "parent"]) == 1


def test_every_variant_of_a_seed_trains_with_it():
    for cell in plan(scale=replace(CPU, seeds=(2,)), only=["pruned", "augment", "batch", "shape"]):
        assert cell.training is not None
        assert "seed=2" in cell.training.lines()[0]


def test_an_unknown_experiment_is_told():
    with pytest.raises(UserError, match="did you mean 'pruned'"):
        plan(only=["prune"])


@pytest.mark.parametrize("scale", SCALES.values(), ids=[f"scale-{name}" for name in SCALES])
def test_every_recipe_loads_with_what_the_plan_sets(scale):
    loaders = {"train.py": Recipe, "recover.py": RecoveryRecipe, "prune.py": PruneRecipe}
    for node in in_order(cell.evaluation for cell in plan(scale=replace(scale, seeds=(0,)))):
        for line in node.lines():
            if line[1].startswith("{root}/launchers/"):
                sets = [line[i + 1] for i, word in enumerate(line) if word == "--set"]
                recipe = line[line.index("--recipe") + 1].replace("{root}", str(ROOT))
                loaders[Path(line[1]).name].load(recipe, sets)


@pytest.mark.parametrize("embedded", [True, False], ids=["sample", "folder"])
def test_the_weights_of_a_training_name_the_sources_of_its_shards(embedded, tmp_path):
    (tmp_path / "set").write_text("x")
    cells = make_plan(SMOKE, None if embedded else tmp_path, Path("llm"), "teacher")
    nodes = in_order(cell.evaluation for cell in cells)
    by_folder = {node.folder: node for node in nodes}
    weighted = 0
    for node in nodes:
        for line in node.lines():
            if line[1].endswith("launchers/train.py"):
                sets = [line[i + 1] for i, word in enumerate(line) if word == "--set"]
                recipe = Recipe.load(
                    line[line.index("--recipe") + 1].replace("{root}", str(ROOT)), sets
                )
                shards = [
                    by_folder[path.parent.name].lines()[0] for path in map(Path, recipe.data.shards)
                ]
                held = {
                    word.split("=")[0] for command in shards for word in command[2:] if "=" in word
                }
                if recipe.data.weights:
                    weighted += 1
                    assert recipe.data.weights.keys() == held
    assert weighted >= 2
