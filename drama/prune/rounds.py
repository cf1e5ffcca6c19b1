"""Recover once, or cut and recover in turn.

RUN/recipe.yaml  round-1/cut/  round-1/{metrics.jsonl,checkpoints/,model/}  round-2/...  model/
"""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import torch

from drama.console import console
from drama.distributed import Ranks
from drama.errors import UserError
from drama.files import replacing, replacing_folder
from drama.prune.output import REPORT_NAME, check_out
from drama.prune.recovery import Recoverer, check_length, free_keys
from drama.prune.recovery_data import Texts
from drama.prune.recovery_recipe import RecoveryRecipe
from drama.prune.run import prune
from drama.prune.shape import Shape, parse_target
from drama.prune.source import find_llm, load_tokenizer, read_config
from drama.prune.text import sha256_of
from drama.resume import alone_in
from drama.settings import check_same_run
from drama.tokenizer import TextEncoder, appending_eos

_OF_ROUNDS = ("data", "train", "step", "eval")  # each round compares these by itself


def recover(recipe: RecoveryRecipe) -> Path:
    """Recover as the recipe says, on every rank that the launcher started; return RUN/model.

    Raises:
        UserError: see `Recoverer` and `drama.prune.run.prune`.
    """
    with Ranks.start() as ranks, alone_in(recipe.output, ranks):
        if recipe.rounds is None:
            return Recoverer(recipe, ranks).run()
        return _in_rounds(recipe, ranks)


def _in_rounds(recipe: RecoveryRecipe, ranks: Ranks) -> Path:
    rounds = recipe.rounds
    assert rounds is not None
    _check(recipe, ranks)
    model = recipe.model.path
    for number, cut in enumerate(rounds.cuts, 1):
        console.rule(f"round {number} of {len(rounds.cuts)}: {cut.to}")
        model = _round(recipe, number, model, ranks)
    out = recipe.output / "model"
    ranks.on_main(lambda: _copy(model, out))
    return out


def _round(recipe: RecoveryRecipe, number: int, model: Path, ranks: Ranks) -> Path:
    """Cut and recover, or find it done; all memory of it is free afterwards."""
    own = _recipe_of(recipe, number)
    result = own.output / "model"
    if not (result / REPORT_NAME).is_file():
        ranks.on_main(lambda: _cut(recipe, number, model, own.model.path))
        recoverer = Recoverer(own, ranks)
        recoverer.run()
        recoverer.engine.destroy()
        del recoverer
        gc.collect()  # the engine's hooks hold on to it in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return result


def _recipe_of(recipe: RecoveryRecipe, number: int) -> RecoveryRecipe:
    """The recovery of a round."""
    assert recipe.rounds is not None
    folder, steps = recipe.output / f"round-{number}", recipe.rounds.cuts[number - 1].steps
    tree = recipe.model_dump(mode="json")
    del tree["rounds"]
    tree["output"], tree["model"]["path"] = str(folder), str(folder / "cut")
    if steps is not None:
        tree["train"] |= {"steps": steps, "epochs": None}
    return RecoveryRecipe.from_tree(tree)


def _check(recipe: RecoveryRecipe, ranks: Ranks) -> None:
    """Refuse what would only show after hours: a shape, text or parent of a later round, and a
    folder whose rounds were made of something else."""
    rounds = recipe.rounds
    assert rounds is not None
    where = find_llm(recipe.model.path)
    check_out(recipe.output / "model", where.path, 0)
    config = read_config(where)
    shape = Shape.of(config)
    for number, cut in enumerate(rounds.cuts):
        target = parse_target(cut.to, shape)
        if target == shape:
            raise UserError(
                f"rounds.cuts.{number}.to '{cut.to}' is the shape that the model has by then; name "
                "a smaller one"
            )
        shape = target
    if not rounds.calibration.is_file():
        raise UserError(f"rounds.calibration {rounds.calibration} does not exist; give a text file")
    check_length(recipe, where.name, config.max_position_embeddings)
    if recipe.model.parent is not None:
        find_llm(recipe.model.parent)
    tokenizer = appending_eos(load_tokenizer(where, config.vocab_size), where.name)
    Texts(recipe, TextEncoder(tokenizer), ranks)
    _check_earlier(recipe)
    inputs = {"model.path": where.sha256, "rounds.calibration": sha256_of(rounds.calibration)}
    ranks.on_main(lambda: _keep_inputs(recipe.output, inputs))
    if ranks.is_main:
        recipe.save(recipe.output / "recipe.yaml")


def _check_earlier(recipe: RecoveryRecipe) -> None:
    """Every round that was begun was of this recipe; data, pace and memory may differ as they may
    when a recovery goes on."""
    assert recipe.rounds is not None
    stored = recipe.output / "recipe.yaml"
    if stored.is_file():
        free = {name: set(getattr(recipe, name).model_dump()) for name in _OF_ROUNDS}
        check_same_run(RecoveryRecipe.load(stored), recipe, free)
    for number in range(1, len(recipe.rounds.cuts) + 1):
        now = _recipe_of(recipe, number)
        if (now.output / "recipe.yaml").is_file():
            before = RecoveryRecipe.load(now.output / "recipe.yaml")
            if now.train.precision == "auto":
                now = now.with_values(train__precision=before.train.precision)
            check_same_run(before, now, free_keys(now))


def _keep_inputs(output: Path, inputs: dict[str, str]) -> None:
    """Note what the rounds are made of, or compare."""
    path = output / "inputs.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in inputs.items():
            if before.get(name) != value:
                raise UserError(
                    f"{output} was begun with another {name} than lies there now; give another "
                    "output, or remove that folder"
                )
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(inputs, indent=1), encoding="utf-8")


def _cut(recipe: RecoveryRecipe, number: int, model: Path, out: Path) -> None:
    rounds = recipe.rounds
    assert rounds is not None
    if not (out / REPORT_NAME).is_file():
        prune(
            model, rounds.cuts[number - 1].to, rounds.calibration, out,
            calibration_tokens=rounds.calibration_tokens, seed=recipe.seed,
        )  # fmt: skip


def _copy(model: Path, out: Path) -> None:
    with replacing_folder(out) as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True)
