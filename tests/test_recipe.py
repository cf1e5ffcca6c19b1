from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from drama.augment.recipe import AugmentRecipe
from drama.errors import UserError
from drama.prune.recipe import PruneRecipe
from drama.prune.recovery_recipe import RecoveryRecipe
from drama.recipe import Recipe
from drama.settings import DS_CONFIGS, check_same_run

ROOT = Path(__file__).resolve().parents[1]
MINIMAL: dict[str, Any] = {
    "name": "small",
    "output": "runs/small",
    "model": {"path": "backbone"},
    "data": {"shards": ["shards/a", "shards/b"]},
    "train": {"steps": 10},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def fault(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        Recipe.load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- reading --------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.output == Path("runs/small")
    assert recipe.data.shards == [Path("shards/a"), Path("shards/b")]
    assert (recipe.model.pooling, recipe.model.attention) == ("last", "bidirectional")
    assert (recipe.model.query_prefix, recipe.model.document_prefix) == ("Query: ", "")
    assert (recipe.train.batch_size, recipe.data.hard_negatives) == (2048, 7)
    assert recipe.loss.temperature == 0.02
    assert (recipe.train.deepspeed, recipe.train.precision) == ("zero3", "auto")
    assert (recipe.train.steps, recipe.train.epochs) == (10, None)


def test_a_saved_recipe_reads_back_equal_with_every_default_spelled_out(
    path: Path, tmp_path: Path
) -> None:
    recipe = Recipe.load(path, ["model.query_prefix='Frage für dich: '", "loss.margin=0.1"])
    recipe.save(tmp_path / "run" / "recipe.yaml")
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == recipe
    tree = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8"))
    assert tree["train"]["lr"] == 2e-4
    for section, model in (("model", recipe.model), ("data", recipe.data), ("train", recipe.train)):
        assert set(tree[section]) == set(type(model).model_fields)


@pytest.mark.parametrize("shipped", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(shipped: Path) -> None:
    kinds: dict[str, tuple[Any, str]] = {
        "augment-drama": (AugmentRecipe, ""),
        "prune-learned": (PruneRecipe, "batch_rows"),
        "prune-iterated": (RecoveryRecipe, "batch_texts"),
        "recover": (RecoveryRecipe, "batch_texts"),
    }
    kind, size = kinds.get(shipped.stem, (Recipe, "batch_size"))
    recipe = kind.load(shipped)
    assert recipe.name == shipped.stem
    if not size:  # nothing is trained
        return
    batch = recipe.deepspeed_config(world_size=8)["train_batch_size"]
    assert batch == getattr(recipe.train, size)


def test_a_recipe_cannot_be_changed_behind_the_run(path: Path) -> None:
    recipe = Recipe.load(path)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    changed = recipe.with_values(train__precision="bf16", seed=5)
    assert (changed.train.precision, changed.seed) == ("bf16", 5)
    assert (recipe.train.precision, recipe.seed) == ("auto", 0)
    with pytest.raises(UserError, match=r"train\.precision"):
        recipe.with_values(train__precision="fp8")


# -- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=3e-4", 3e-4),
        ("train.lr=3E-4", 3e-4),
        ("train.lr=0.001", 1e-3),
        ("train.lr=1.e-3", 1e-3),
        ("train.batch_size=128", 128),
        ("train.epochs=1e-1", 0.1),
        ("loss.margin=1e-1", 0.1),
        ("data.shards=[x, y/z]", [Path("x"), Path("y/z")]),
        ("loss.matryoshka_dims=[64, 128]", [64, 128]),
        ("train.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("loss.margin=null", None),
        ("model.query_prefix=''", ""),
        ("model.query_prefix='Query: '", "Query: "),
        ("name=a=b", "a=b"),
        ("name='123'", "123"),
        ("name=3e4", "3e4"),
        ("name=nan", "nan"),
        ("train.schedule=linear", "linear"),
    ],
)
def test_overrides_are_yaml_values(path: Path, override: str, value: Any) -> None:
    dotted = override.partition("=")[0]
    steps = ["train.steps=null"] if "epochs" in override else []
    recipe = Recipe.load(path, [override, "data.lanes=8", *steps])
    node: Any = recipe
    for part in dotted.split("."):
        node = getattr(node, part)
    assert node == value
    assert type(node) is type(value)


def test_a_later_override_wins_and_sections_appear(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: n\noutput: o\nmodel: {path: p}\n")
    recipe = Recipe.load(path, ["train.steps=1", "train.steps=2", "data.shards=[s]"])
    assert recipe.train.steps == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "--set train.lr: write key.path=value, for example train.lr=3e-4"),
        ("=3", "--set =3: write key.path=value"),
        ("name.x=3", "--set name.x=3: name is a value, not a section"),
        ("train.lr=[1", "--set train.lr=[1: the value is not valid YAML"),
    ],
)
def test_bad_overrides(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.load(path, [override])
    assert str(caught.value).startswith(message)


# -- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=3", "unknown key train.batchsize (did you mean 'batch_size'?)"),
        ("data.hard_negative=3", "unknown key data.hard_negative (did you mean 'hard_negatives'?)"),
        ("traim.lr=3", "unknown key traim (did you mean 'train'?)"),
        ("seeds=3", "unknown key seeds (did you mean 'seed'?)"),
        ("loss.xyzzy=3", "unknown key loss.xyzzy"),
    ],
)
def test_an_unknown_key_names_the_nearest(path: Path, override: str, message: str) -> None:
    assert fault(path, override) == f"recipe {path}: {message}"


@pytest.mark.parametrize(
    ("override", "where", "got"),
    [
        ("train.lr=fast", "train.lr: ", "'fast'"),
        ("train.lr=0", "train.lr: ", "0"),
        ("train.lr=.nan", "train.lr: ", "nan"),
        ("train.lr=.inf", "train.lr: ", "inf"),
        ("loss.temperature=-0.1", "loss.temperature: ", "-0.1"),
        ("train.batch_size=1e3", "train.batch_size: ", "'1e3'"),
        ("train.batch_size=12.5", "train.batch_size: ", "12.5"),
        ("train.batch_size=0", "train.batch_size: ", "0"),
        ("data.shards=x", "data.shards: ", "'x'"),
        ("data.shards=[]", "data.shards: ", "[]"),
        ("data.hard_negatives=-1", "data.hard_negatives: ", "-1"),
        ("train.betas=[0.9]", "train.betas.1", "[0.9]"),
        ("model.path=7", "model.path: ", "7"),
        ("model.query_prefix=", "model.query_prefix: ", "None"),
        ("train.epochs=-1", "train.epochs: ", "-1"),
        ("model=backbone", "model: ", "'backbone'"),
    ],
)
def test_a_wrong_value_names_key_and_value(path: Path, override: str, where: str, got: str) -> None:
    message = fault(path, override)
    assert message.startswith(f"recipe {path}: {where}")
    assert f"(got {got})" in message or "is missing" in message


@pytest.mark.parametrize(
    ("override", "choices"),
    [
        ("model.pooling=max", "'last' or 'mean' (got 'max')"),
        ("model.attention=full", "'bidirectional' or 'causal' (got 'full')"),
        ("train.schedule=step", "'cosine', 'linear', 'wsd' or 'constant' (got 'step')"),
        ("train.precision=fp16", "'auto', 'bf16' or 'fp32' (got 'fp16')"),
    ],
)
def test_a_wrong_choice_names_the_valid_ones(path: Path, override: str, choices: str) -> None:
    assert fault(path, override).endswith(choices)


@pytest.mark.parametrize("key", ["name", "output", "model", "data", "model.path", "data.shards"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    tree = json.loads(json.dumps(MINIMAL))
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    del node[leaf]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert fault(path) == f"recipe {path}: {key} is missing"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=null"], "train: give exactly one of steps and epochs"),
        (["train.epochs=1"], "train: give exactly one of steps and epochs"),
        (
            ["train.batch_size=100"],
            "train.batch_size 100 is not a multiple of data.lanes 64; the nearest is 64, "
            "or lower data.lanes",
        ),
        (
            ["train.batch_size=10"],
            "train.batch_size 10 is not a multiple of data.lanes 64; the nearest is 64, "
            "or lower data.lanes",
        ),
        (
            ["train.token_budget=200"],
            "train.token_budget 200 is below the longest text of 256 tokens; the least is 256",
        ),
        (
            ["train.token_budget=300", "data.max_query_tokens=301"],
            "train.token_budget 300 is below the longest text of 301 tokens; the least is 301",
        ),
        (
            ["loss.matryoshka_dims=[128, 64, 64]"],
            "loss.matryoshka_dims [128, 64, 64] must ascend: [64, 128]",
        ),
        (
            ["loss.matryoshka_dims=[64, 128]", "loss.matryoshka_weights=[1.0]"],
            "loss.matryoshka_weights has 1 entries for 2 matryoshka_dims",
        ),
    ],
)
def test_impossible_combinations(path: Path, overrides: list[str], message: str) -> None:
    assert fault(path, *overrides) == f"recipe {path}: {message}"


def test_a_budget_of_exactly_the_longest_text_is_enough(path: Path) -> None:
    recipe = Recipe.load(path, ["train.token_budget=256", "data.max_document_tokens=256"])
    assert recipe.train.token_budget == 256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping with name, output, model, data"),
        (b"- a\n- b\n", "expected a mapping with name, output, model, data"),
        (b"name: [", "is not valid YAML"),
        (b"name: \xff\xfe", "cannot be read"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Recipe.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert fault(path) == f"recipe {path} does not exist"
    assert fault(tmp_path).startswith(f"recipe {tmp_path} cannot be read")


# -- DeepSpeed's JSON -----------------------------------------------------------------------------


def with_json(path: Path, tmp_path: Path, content: Any, *overrides: str) -> Recipe:
    custom = tmp_path / "custom.json"
    custom.write_text(json.dumps(content))
    return Recipe.load(
        path, [f"train.deepspeed={custom}", "train.batch_size=12", "data.lanes=4", *overrides]
    )


@pytest.mark.parametrize("name", sorted(p.stem for p in DS_CONFIGS.glob("*.json")))
def test_auto_is_filled_in_from_the_recipe(path: Path, name: str) -> None:
    precision = "fp32" if name == "zero0" else "bf16"  # ZeRO 0 in bf16 is refused
    recipe = Recipe.load(
        path,
        [f"train.deepspeed={name}", "train.batch_size=128", "train.grad_clip=0.5",
         f"train.precision={precision}"],
    )  # fmt: skip
    config = recipe.deepspeed_config(world_size=4)
    assert "auto" not in json.dumps(config)
    assert config["train_micro_batch_size_per_gpu"] == 32
    assert config["gradient_accumulation_steps"] == 1
    assert config["train_batch_size"] == 128
    assert config["gradient_clipping"] == 0.5
    looked_at = {"check_grad_overflow": True}  # else a bad step would change the weights
    assert config["bf16"] == {"enabled": precision == "bf16"} | looked_at
    assert config["zero_optimization"]["stage"] == int(name[4])
    fp32 = recipe.with_values(train__precision="fp32").deepspeed_config(world_size=1)
    assert fp32["bf16"] == {"enabled": False} | looked_at


def test_the_stages_that_the_documentation_names_are_shipped() -> None:
    names = {path.stem for path in DS_CONFIGS.glob("*.json")}
    assert names >= {"zero1", "zero2", "zero3", "zero3_offload"}


def test_a_json_of_one_s_own_keeps_its_values(path: Path, tmp_path: Path) -> None:
    given = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 12345},
        "train_batch_size": 12,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
    }
    recipe = with_json(path, tmp_path, given, "train.precision=bf16")
    config = recipe.deepspeed_config(world_size=2)
    assert config == given | {
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 1,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train_micro_batch_size_per_gpu is 4, but the recipe gives 6",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps is 2, but the recipe gives 1",
        ),
        ({"train_batch_size": 16}, "train_batch_size is 16, but the recipe gives 12"),
        ({"gradient_clipping": 2.0}, "gradient_clipping is 2.0, but the recipe gives 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but train.precision is fp32"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported; use train.precision bf16 or fp32"),
        ({"bf16": True}, 'bf16 must be an object such as {"enabled": "auto"}'),
        ({"optimizer": {"type": "Lamb"}}, "optimizer is set by the recipe (train.lr, ...)"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set by the recipe (train.lr, ...)"),
        ([1], "expected a JSON object"),
    ],
)
def test_conflicts_are_errors(path: Path, tmp_path: Path, content: Any, message: str) -> None:
    recipe = with_json(path, tmp_path, content, "train.precision=fp32")
    with pytest.raises(UserError) as caught:
        recipe.deepspeed_config(world_size=2)
    assert str(caught.value).startswith(f"{tmp_path / 'custom.json'}: {message}")


def test_broken_json(path: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"zero_optimization": ')
    recipe = Recipe.load(path, [f"train.deepspeed={tmp_path / 'broken.json'}"])
    with pytest.raises(UserError, match=r"broken\.json: not readable as JSON"):
        recipe.deepspeed_config(world_size=1)


def test_an_unknown_name_lists_the_known(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.load(path, ["train.deepspeed=zero33"]).deepspeed_config(world_size=1)
    message = str(caught.value)
    assert message.startswith("train.deepspeed 'zero33' is neither one of zero0, zero1, ")
    assert message.endswith("(did you mean 'zero3'?)")


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_a_bare_on_or_off_is_that_word(tmp_path, word):
    """YAML reads it as true or false, in a file and in an override."""
    path = tmp_path / "recipe.yaml"
    tree = {"name": "x", "output": "o", "model": {"path": "m"}, "data": {"shards": ["s"]}}
    path.write_text(yaml.safe_dump({**tree, "train": {"steps": 1}}) + f"step:\n  liger: {word}\n")
    assert Recipe.load(path).step.liger == word
    assert Recipe.load(path, [f"step.liger={word}"]).step.liger == word


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rounds.cutz=1", "unknown key rounds.cutz (did you mean 'cuts'?)"),
        ("rounds.cuts=[{to: 0.1b, step: 3}]", "unknown key rounds.cuts.0.step (did you mean 'step"),
        ("rounds={calibration: c, cuts: []}", "rounds.cuts: "),
    ],
)
def test_keys_of_optional_sections_and_of_lists_are_known(override: str, said: str) -> None:
    shipped = ROOT / "recipes" / "prune-iterated.yaml"
    with pytest.raises(UserError) as caught:
        RecoveryRecipe.load(shipped, [override])
    assert str(caught.value).startswith(f"recipe {shipped}: {said}")


def test_another_run_is_told_by_the_key_however_deep(tmp_path: Path) -> None:
    def recipe(**rope: Any) -> Recipe:
        model = {"path": "backbone", "rope": rope}
        return Recipe.from_tree({**MINIMAL, "output": str(tmp_path), "model": model})

    check_same_run(recipe(factor=2), recipe(factor=2), {})
    with pytest.raises(UserError, match=r"holds a run with model\.rope\.factor = 2\.0, the rec"):
        check_same_run(recipe(factor=2), recipe(factor=4), {})
    check_same_run(recipe(factor=2), recipe(factor=4), {"model": {"rope"}})
    weighted = Recipe.from_tree(
        {**MINIMAL, "output": str(tmp_path), "data": {"shards": ["shards/a", "shards/b"],
                                                      "weights": {"a": 2}}}
    )  # fmt: skip
    plain = Recipe.from_tree({**MINIMAL, "output": str(tmp_path)})
    for before, now in ((weighted, plain), (plain, weighted)):
        with pytest.raises(UserError, match=r"data\.weights\.a = "):
            check_same_run(before, now, {})


def test_a_learned_temperature_begins_where_it_is_kept(path: Path) -> None:
    assert "nearest is 0.005" in fault(path, "loss.learn_temperature=true", "loss.temperature=1e-3")
    assert "nearest is 1," in fault(path, "loss.learn_temperature=true", "loss.temperature=2")
    Recipe.load(path, ["loss.temperature=2"])


def test_a_monitor_that_is_not_installed_is_named(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((DS_CONFIGS / "zero1.json").read_text()) | {"comet": {"enabled": True}}
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(config))
    recipe = Recipe.load(path, [f"train.deepspeed={mine}", "train.precision=fp32"])
    monkeypatch.setattr("drama.settings.find_spec", lambda name: None)
    with pytest.raises(UserError, match="comet is enabled, but comet_ml is not installed"):
        recipe.deepspeed_config(world_size=1)
    monkeypatch.setattr("drama.settings.find_spec", lambda name: name)
    recipe.deepspeed_config(world_size=1)
    mine.write_text(json.dumps(config | {"tensorboard": True}))
    with pytest.raises(UserError, match="tensorboard must be an object"):
        recipe.deepspeed_config(world_size=1)
