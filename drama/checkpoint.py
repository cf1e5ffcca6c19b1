"""Checkpoints of a run: whole or not there, and only loadable into the run they came from.

    RUN/checkpoints/step-N/state.json    step, world size, recipe, hashes of what was trained on,
                                         size and SHA-256 of every file; written last
                           zero/         DeepSpeed's shards: weights, optimizer, schedule
                           model/        the retriever at this step, ready to use

The data position is a function of the step; a mixture's, which may change its weights, is in
`extra`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from drama.console import console
from drama.errors import UserError
from drama.files import sha256_of
from drama.full_disk import FullDisk
from drama.reshard import Read, resharding
from drama.settings import Optimization, Settings, check_same_run

AnySettings = TypeVar("AnySettings", bound=Settings)
STATE = "state.json"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when a new one is whole: the last ones, those of every so many steps,
    and the newest one up to step `flat_until`, from where the run can be prolonged."""

    last: int
    every: int | None = None
    flat_until: int = 0

    @classmethod
    def of(cls, train: Optimization, flat_until: int = 0) -> Keep:
        """As a recipe says."""
        return cls(train.keep_last, train.keep_every, flat_until)

    def chosen(self, steps: Sequence[int]) -> set[int]:
        """Of these, ascending, the ones that stay."""
        every = {step for step in steps if self.every and step % self.every == 0}
        flat = [step for step in steps if step <= self.flat_until]
        return {*steps[-self.last :], *every, *flat[-1:]}


def full_state_dict(engine: Any, module: torch.nn.Module) -> dict[str, Tensor]:
    """Gather float32 weights of a partitioned module, one parameter at a time.

    Every rank must call it; rank 0 gets the dictionary (on the CPU), the others an empty one.
    """
    stage = engine.zero_optimization_stage()
    weights = {}
    for name, parameter in module.named_parameters():
        has_master = parameter.requires_grad and (stage or engine.bfloat16_enabled())
        full = safe_get_full_fp32_param(parameter) if has_master else None
        # a frozen weight has no float32 master: this is what the engine computes with
        partitioned = full is None and stage == 3
        with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
            full = parameter if full is None else full
            if engine.global_rank == 0:
                weights[name] = full.detach().to("cpu", torch.float32, copy=True)
    return weights


def save(
    engine: Any,
    folder: Path,
    step: int,
    *,
    recipe: Settings,
    inputs: dict[str, Any],
    extra: dict[str, Any],
    keep: Keep,
    write_model: Callable[[Path], None],
    go_on: bool = False,
) -> None:
    """Write `folder/step-N`; every rank must call it.

    The settled `recipe` and `inputs`, which says what the run reads (hashes), are for `load` to
    compare; `extra` is kept as it is, plain values. `write_model(path)` is called on every rank
    and writes the retriever on rank 0.
    After the new one is whole others are removed: those of later steps, which a run that went on
    from an earlier one has left behind, and those that `keep` does not name. Where the disk is
    full, on whichever rank, nothing is left of the new one; `go_on`: with a warning only.

    Raises:
        UserError: the disk is full; what was saved earlier stays.
    """
    target, temporary = folder / f"step-{step}", folder / f".step-{step}.partial"
    main, full = engine.global_rank == 0, FullDisk()
    needed = 0
    if main:
        with full.noted():
            tidy(folder)
            temporary.mkdir(parents=True)
            needed = max((_size_of(path) for path in whole_checkpoints(folder)[-1:]), default=0)
            full.check_room(folder, needed)
    if not full.anywhere(engine):
        # DeepSpeed's own collectives go on whatever a rank could not write
        writer = engine.checkpoint_engine.save
        engine.checkpoint_engine.save = full.noting(writer)
        try:
            engine.save_checkpoint(str(temporary), tag="zero", save_latest=False)
        finally:
            engine.checkpoint_engine.save = writer
        with full.noted():
            write_model(temporary / "model")
    if not full.anywhere(engine) and main:
        with full.noted():
            facts = {"step": step, "world_size": engine.world_size, "inputs": inputs}
            _conclude(temporary, facts | {"recipe": recipe.model_dump(mode="json"), "extra": extra})
            if target.exists():
                _remove(target)
            os.replace(temporary, target)
            _sync(folder)
            whole = whole_checkpoints(folder)
            staying = keep.chosen([n for n in map(step_of, whole) if n <= step])
            for path in whole:
                if step_of(path) not in staying:
                    _remove(path)
    if not full.anywhere(engine):
        return
    there = folder if folder.exists() else folder.parent  # there may have been no room for it
    free = shutil.disk_usage(there).free if main else 0
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
    size = f"about {needed:,} bytes are needed, " if needed else ""
    said = f"{target}: the checkpoint cannot be written, the disk is full ({size}{free:,} are free)"
    _barrier()
    if not go_on:
        raise UserError(
            f"{said}. Earlier ones stay; make room and start again, lower train.keep_last, or set "
            "train.on_full_disk: go_on"
        )
    if main:
        console.print(
            f"warning: {said}; training goes on and tries again at the next train.save_every",
            style="yellow", markup=False, soft_wrap=True, highlight=False,
        )  # fmt: skip


def tidy(folder: Path) -> None:
    """Remove what a killed run has left of checkpoints that it was writing or removing."""
    for pattern in (".step-*.partial", ".step-*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Under another name: a kill in between must not leave half of it as a damaged checkpoint."""
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    os.replace(checkpoint, old)
    shutil.rmtree(old)


def _conclude(folder: Path, facts: dict[str, Any]) -> None:
    """Write state.json over all that is there, and have everything on the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [str(path.relative_to(folder)) for path in files]
    state = facts | {
        "files": {name: p.stat().st_size for name, p in zip(names, files, strict=True)},
        "sha256": dict(zip(names, sha256_of(files), strict=True)),
    }
    state["digest"] = _digest(state)
    (folder / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    for path in (*files, folder / STATE, *{p.parent for p in files}, folder):
        _sync(path)


def _size_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def all_checkpoints(folder: Path) -> list[Path]:
    """Whole or not, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that are complete by their own file list, oldest first."""
    return [path for path in all_checkpoints(folder) if not missing(path)]


def missing(checkpoint: Path) -> list[str]:
    """Files of a checkpoint that are missing or have another size than its list says, or that it
    does not name where DeepSpeed looks; the list itself where it is not as it was written, or of
    another step than the folder's name."""
    try:
        state = read_state(checkpoint)
        sizes = state["files"].items()
        # a folder that somebody renamed would train the wrong steps' batches
        if state["digest"] != _digest(state) or state["step"] != step_of(checkpoint):
            return [STATE]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return [STATE]
    others = {f"zero/{path.name}" for path in (checkpoint / "zero").glob("*.pt")}
    return [
        name
        for name, size in sizes
        if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size != size
    ] + sorted(others - set(state["files"]))


def faults(checkpoint: Path) -> list[str]:
    """Files of a checkpoint that are missing, cannot be read, or do not hold what was written.

    Reads all of it.
    """
    if names := missing(checkpoint):
        return names
    wanted = read_state(checkpoint)["sha256"]
    try:
        found = sha256_of([checkpoint / name for name in wanted])
    except OSError as error:  # no right to read it, a bad sector
        return [str(Path(error.filename).relative_to(checkpoint)) if error.filename else str(error)]
    return [name for name, ours in zip(wanted, found, strict=True) if ours != wanted[name]]


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of all else that state.json says, as it comes back from a file."""
    rest = json.loads(json.dumps({key: state[key] for key in state.keys() - {"digest"}}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json says."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state


def read_recipe(checkpoint: Path, kind: type[AnySettings]) -> AnySettings | None:
    """The recipe that a checkpoint was saved under; the first ones of this format have none."""
    tree = read_state(checkpoint).get("recipe")
    return kind.from_tree(tree, f"{checkpoint}/{STATE}") if tree else None


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.split("-")[1])


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before what relies on them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_tensors_only(path: str, map_location: Any = None, *, mmap: bool = False) -> Any:
    """In the place of DeepSpeed's file reader, which runs whatever code a pickle holds."""
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged or not a checkpoint: {reason}") from error


def load(
    engine: Any,
    checkpoint: Path,
    *,
    recipe: Settings,
    free: Mapping[str, set[str]],
    inputs: dict[str, Any],
) -> tuple[int, dict[str, Any]]:
    """Load weights, optimizer and schedule; return the steps that were done, and what `save` was
    given as `extra`. Another number of ranks may have saved it, of a folder of another name.

    free: what of the recipe may differ, see `check_same_run`.

    Raises:
        UserError: saved under another recipe or from other inputs, or a file that holds more than
            tensors and plain values.
    """
    state = read_state(checkpoint)
    if stored := read_recipe(checkpoint, type(recipe)):
        check_same_run(stored, recipe, free, where=checkpoint)
    for name, value in inputs.items():
        if state["inputs"].get(name) != value:
            raise UserError(
                f"{checkpoint} was trained on another {name} than the recipe's path holds now; "
                "give another output, or remove the run folder"
            )
    read: Read = _load_tensors_only
    if state["world_size"] != engine.world_size:
        console.print(
            f"{checkpoint.name} was saved by {state['world_size']} ranks and is dealt to "
            f"{engine.world_size}"
        )
        read = resharding(engine, checkpoint / "zero", state["world_size"], read)
    engine.checkpoint_engine.load = read
    if engine.load_checkpoint(str(checkpoint), tag="zero")[0] is None:
        raise UserError(f"{checkpoint}/zero: DeepSpeed found nothing to load; remove {checkpoint}")
    return int(state["step"]), state["extra"]


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
