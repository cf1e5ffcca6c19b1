"""`drama export`: a run, one of its checkpoints, or a model folder becomes a folder for others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drama import checkpoint
from drama.console import console
from drama.encoder import Encoder
from drama.errors import UserError
from drama.export import export
from drama.full_disk import is_full
from drama.model_card import Evaluation
from drama.run_facts import run_facts


def export_source(
    source: str | Path,
    out: str | Path,
    *,
    best: bool = False,
    evaluation: Path | None = None,
    **options: Any,
) -> Path:
    """Write what `find_source` finds as a folder for other libraries, with a model card that knows
    the run.

    Args:
        evaluation: an evaluation.json, or its folder, for the card.
        options: of `drama.export.export`.

    Raises:
        UserError: as `find_source`, `Encoder.from_pretrained` and `export`; or `out` is in the run
            or around it, or holds something else than a retriever; or the disk is full.
    """
    found = find_source(source, best=best)
    out = Path(out)
    _check_out(out, found)
    judged = None
    if evaluation is not None:
        places = [found.model, *([found.run / "model"] if found.run else [])]
        judged = Evaluation.read(evaluation, out, *places)
    encoder = Encoder.from_pretrained(found.model)
    facts = run_facts(found.run, found.step) if found.run else None
    try:
        return export(encoder, out, run=facts, evaluation=judged, **options)
    except Exception as error:  # safetensors and onnx have exceptions of their own
        if not is_full(error):
            raise
        raise UserError(
            f"{out}: the disk is full, nothing is written; make room or name a folder elsewhere"
        ) from error


def _check_out(out: Path, source: Source) -> None:
    target = out.resolve()
    for place in (source.model.resolve(), *((source.run.resolve(),) if source.run else ())):
        if target == place or target in place.parents:
            raise UserError(f"{out}: would replace {place}, which is exported; name another folder")
    if target.is_file():
        raise UserError(f"{out}: is a file; name a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if (target / ".git").exists():
        raise UserError(
            f"{out}: is a checkout of git, whose history would be replaced; name a new folder and "
            "copy its files over"
        )
    if not (target / "modules.json").is_file():  # a language model has none
        raise UserError(
            f"{out}: holds files that are no retriever (no modules.json), and would be replaced; "
            "name an empty or new folder"
        )


@dataclass(frozen=True)
class Source:
    """A model folder to export; the run that it came of and its step, where they are known."""

    model: Path
    run: Path | None = None
    step: int | None = None


def find_source(path: str | Path, *, best: bool = False) -> Source:
    """The model that a path stands for.

    A run that is finished gives RUN/model, one that is not its newest sound checkpoint, which is
    said. A checkpoint is read and compared with its hashes before it is used.

    Args:
        best: RUN/best, which the run's own evaluation chose.

    Raises:
        UserError: nothing there, a damaged checkpoint, with the name of a file, or no RUN/best.
    """
    path = Path(path)
    if _is_checkpoint(path):
        if best:
            raise UserError(f"{path} is a checkpoint; --best goes with a run folder")
        return _from_checkpoint(path)
    if not _is_run(path):
        if best:
            raise UserError(f"{path} is no run folder (recipe.yaml is missing); leave --best out")
        return Source(path, *_beside(path))
    if best:
        if not (path / "best").is_dir():
            raise UserError(
                f"{path} has no best model (best/ is missing): its recipe's eval.shards and "
                "eval.beir chose none; leave --best out"
            )
        return Source(path / "best", path, _best_step(path))
    return _from_run(path)


def _from_run(run: Path) -> Source:
    found = checkpoint.whole_checkpoints(run / "checkpoints")
    newest = checkpoint.step_of(found[-1]) if found else None
    model = run / "model"
    if (model / "config.json").is_file() and (not found or _is_last(found[-1])):
        return Source(model, run, newest)
    for folder in reversed(checkpoint.all_checkpoints(run / "checkpoints")):
        if names := checkpoint.faults(folder):
            console.print(
                f"warning: {folder} is damaged and left alone: {', '.join(names[:3])} cut, changed "
                "or missing",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
            continue
        console.print(
            f"{run} is not finished: its newest sound checkpoint, {folder.name}, is taken",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        return Source(folder / "model", run, checkpoint.step_of(folder))
    raise UserError(
        f"{run} holds no model to export: no model/ and no sound checkpoint; train it first"
    )


def _from_checkpoint(folder: Path) -> Source:
    if names := checkpoint.faults(folder):
        raise UserError(
            f"{folder} is damaged: {', '.join(names[:3])} cut, changed or missing; take another "
            "checkpoint"
        )
    run = folder.resolve().parent.parent
    return Source(folder / "model", run if _is_run(run) else None, checkpoint.step_of(folder))


def _is_checkpoint(path: Path) -> bool:
    return path.name.removeprefix("step-").isdigit() and not (path / "config.json").is_file()


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() or (path / "checkpoints").is_dir()


def _is_last(folder: Path) -> bool:
    """Whether a whole checkpoint is of the last step of its run."""
    state = checkpoint.read_state(folder)
    pace = state.get("extra", {}).get("pace")
    return pace is None or int(state["step"]) >= int(pace[0])


def _beside(model: Path) -> tuple[Path | None, int | None]:
    """The run in which a model folder lies, and its step."""
    run = model.resolve().parent
    if model.resolve().name == "model" and _is_checkpoint(run):
        outer = run.parent.parent
        return (outer, checkpoint.step_of(run)) if _is_run(outer) else (None, None)
    if model.resolve().name not in ("model", "best") or not _is_run(run):
        return None, None
    return run, _best_step(run) if model.resolve().name == "best" else None


def _best_step(run: Path) -> int | None:
    try:
        return int(json.loads((run / "best.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
