"""Recover once, or cut and recover in turn.

RUN/recipe.yaml  round-1/cut/  round-1/{metrics.jsonl,checkpoints/,model/}  round-2/...  model/
"""

from __future__ import annotations

import shutil
from pathlib import Path

from drama.console import console
from drama.distributed import Ranks
from drama.errors import UserError
from drama.files import replacing_folder
from drama.prune.output import REPORT_NAME, check_out
from drama.prune.recovery import Recoverer
from drama.prune.recovery_recipe import RecoveryRecipe
from drama.prune.run import prune
from drama.prune.shape import Shape, parse_target
from drama.prune.source import find_llm, read_config
from drama.settings import check_same_run

# what may differ when a run goes on is each round's business
_ROUNDS_OWN = {
    section: set(RecoveryRecipe.model_fields[section].annotation.model_fields)  # type: ignore[union-attr]
    for section in ("data", "train", "step", "eval")
}


def recover(recipe: RecoveryRecipe) -> Path:
    """Recover as the recipe says, on every rank that the launcher started; return RUN/model.

    Raises:
        UserError: see `Recoverer` and `drama.prune.run.prune`.
    """
    with Ranks.start() as ranks:
        if recipe.rounds is None:
            return Recoverer(recipe, ranks).run()
        return _in_rounds(recipe, ranks)


def _in_rounds(recipe: RecoveryRecipe, ranks: Ranks) -> Path:
    rounds = recipe.rounds
    assert rounds is not None
    output, model = recipe.output, recipe.model.path
    _check(recipe)
    if ranks.is_main:
        recipe.save(output / "recipe.yaml")
    for number, cut in enumerate(rounds.cuts, 1):
        console.rule(f"round {number} of {len(rounds.cuts)}: {cut.to}")
        folder = output / f"round-{number}"
        result = folder / "model"
        if not (result / REPORT_NAME).is_file():
            ranks.on_main(lambda: _cut(recipe, model, cut.to, folder / "cut"))  # noqa: B023
            recoverer = Recoverer(_round(recipe, folder, cut.steps), ranks)
            recoverer.run()
            recoverer.engine.destroy()
        model = result
    out = output / "model"
    ranks.on_main(lambda: _copy(model, out))
    return out


def _check(recipe: RecoveryRecipe) -> None:
    """Refuse what would only show after hours: another run's folder, a shape of a later round."""
    assert recipe.rounds is not None
    stored = recipe.output / "recipe.yaml"
    if stored.is_file():
        check_same_run(RecoveryRecipe.load(stored), recipe, _ROUNDS_OWN)
    where = find_llm(recipe.model.path)
    check_out(recipe.output / "model", where.path, 0)
    shape = Shape.of(read_config(where))
    for number, cut in enumerate(recipe.rounds.cuts):
        target = parse_target(cut.to, shape)
        if target == shape:
            raise UserError(
                f"rounds.cuts.{number}.to '{cut.to}' is the shape that the model has by then; name "
                "a smaller one"
            )
        shape = target
    if not recipe.rounds.calibration.is_file():
        raise UserError(
            f"rounds.calibration {recipe.rounds.calibration} does not exist; give a text file"
        )


def _cut(recipe: RecoveryRecipe, model: Path, target: str, out: Path) -> None:
    assert recipe.rounds is not None
    if not (out / REPORT_NAME).is_file():
        rounds = recipe.rounds
        prune(
            model, target, rounds.calibration, out,
            calibration_tokens=rounds.calibration_tokens, seed=recipe.seed,
        )  # fmt: skip


def _round(recipe: RecoveryRecipe, folder: Path, steps: int | None) -> RecoveryRecipe:
    """The recovery of one round; its parent is the whole model where something is imitated."""
    tree = recipe.model_dump(mode="json")
    del tree["rounds"]
    tree["output"], tree["model"]["path"] = str(folder), str(folder / "cut")
    if steps is not None:
        tree["train"] |= {"steps": steps, "epochs": None}
    return RecoveryRecipe.from_tree(tree)


def _copy(model: Path, out: Path) -> None:
    with replacing_folder(out) as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True)
