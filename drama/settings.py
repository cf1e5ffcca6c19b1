"""What all recipes share: a strict tree in one YAML, its optimisation, and the DeepSpeed JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drama.errors import UserError, nearest
from drama.files import replacing

DS_CONFIGS = Path(__file__).parent / "ds_configs"
# sections of the DeepSpeed JSON, and the module that each needs
MONITORS = {"wandb": "wandb", "comet": "comet_ml"}
Positive = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """A section: unknown keys are errors, values stay."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Schedule(Strict):
    """How a rate goes over the steps: linear warm-up, then one of four ways to the last step."""

    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1  # of the steps; wsd only


# of `Optimization`: what is kept on disk and when a run stops, nothing of its mathematics
KEEPING_KEYS = {
    "save_every", "keep_last", "keep_every", "max_bad_steps", "stuck_after", "on_full_disk",
}  # fmt: skip


class Optimization(Schedule):
    """AdamW under DeepSpeed, and what is kept of it on disk."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    grad_clip: Annotated[float, Field(ge=0)] = 1.0  # 0 turns clipping off
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    deepspeed: str = "zero3"  # a name in ds_configs/ or a path to a JSON
    save_every: Positive = 500
    keep_last: Positive = 2  # checkpoints; in wsd the newest of the flat part stays too
    keep_every: Positive | None = None  # steps; checkpoints of its multiples stay for good
    max_bad_steps: Positive = 3  # in a row without a finite loss or gradient; then the run stops
    # seconds without progress end all ranks; less than the half hour that their collectives wait
    stuck_after: Annotated[float, Field(gt=0)] = 1500.0
    on_full_disk: Literal["stop", "go_on"] = "stop"  # a checkpoint that does not fit

    def deepspeed_config(
        self, *, world_size: int, rows_per_rank: int, accumulation: int = 1
    ) -> dict[str, Any]:
        """The DeepSpeed JSON with every "auto" filled in from the recipe.

        Raises:
            UserError: no such file, or a value that contradicts the recipe.
        """
        path = _deepspeed_path(self.deepspeed)
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable as JSON: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"{path}: expected a JSON object, as in {DS_CONFIGS / 'zero3.json'}")
        for key in ("bf16", "fp16"):
            if not isinstance(config.get(key, {}), dict):
                raise UserError(f'{path}: {key} must be an object such as {{"enabled": "auto"}}')
        for key in ("optimizer", "scheduler"):  # DeepSpeed would leave them out without a word
            if key in config:
                raise UserError(f"{path}: {key} is set by the recipe (train.lr, ...); remove it")
        for key in ("tensorboard", *MONITORS):
            if not isinstance(config.get(key, {}), dict):
                raise UserError(f'{path}: {key} must be an object such as {{"enabled": true}}')
        for key, module in MONITORS.items():
            if config.get(key, {}).get("enabled") and find_spec(module) is None:
                raise UserError(
                    f"{path}: {key} is enabled, but {module} is not installed; pip install {module}"
                )
        expected: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": rows_per_rank,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": rows_per_rank * accumulation * world_size,
            "gradient_clipping": self.grad_clip,
        }
        for key, value in expected.items():
            if config.get(key, "auto") != "auto" and config[key] != value:
                raise UserError(f"{path}: {key} is {config[key]}, but the recipe gives {value}")
            config[key] = value
        bf16 = config.setdefault("bf16", {})
        wanted = self.precision == "bf16"
        if bf16.get("enabled", "auto") not in ("auto", wanted):
            raise UserError(
                f"{path}: bf16.enabled is {bf16['enabled']}, but train.precision is "
                f"{self.precision}"
            )
        bf16["enabled"] = wanted
        if bf16.get("check_grad_overflow", True) is not True:
            raise UserError(
                f"{path}: bf16.check_grad_overflow must be true, or steps without a finite "
                "gradient would change the weights; remove it"
            )
        bf16["check_grad_overflow"] = True
        stage = config.get("zero_optimization", {}).get("stage", 0)
        if wanted and stage == 0:
            raise UserError(
                f"{path}: ZeRO stage 0 in bf16 keeps no float32 weights to export; use zero1, or "
                "train.precision fp32"
            )
        if config.get("fp16", {}).get("enabled"):
            raise UserError(f"{path}: fp16 is not supported; use train.precision bf16 or fp32")
        return config


class Settings(Strict):
    """The root of a recipe; `output` is the run folder."""

    name: str
    output: Path
    seed: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def _needed(cls) -> list[str]:
        return [name for name, field in cls.model_fields.items() if field.is_required()]

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML recipe and apply `key.path=value` overrides (values are YAML).

        Raises:
            UserError: unreadable file, bad YAML, unknown key, wrong type, impossible combination.
        """
        path = Path(path)
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"recipe {path} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"recipe {path} cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise UserError(f"recipe {path} is not valid YAML: {error}") from error
        if not isinstance(tree, dict):
            raise UserError(f"recipe {path}: expected a mapping with {', '.join(cls._needed())}")
        for override in overrides:
            _override(tree, override)
        return cls.from_tree(tree, where=f"recipe {path}")

    @classmethod
    def from_tree(cls, tree: dict[str, Any], where: str = "recipe") -> Self:
        """Validate an already parsed tree.

        Raises:
            UserError: as `load`.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{where}: {_first_fault(cls, error)}") from error

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe, every default spelled out."""
        with replacing(path) as temporary:
            temporary.write_text(
                yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
                encoding="utf-8",
            )

    def with_values(self, **paths: Any) -> Self:
        """Return a copy with resolved values; keys are written `train__precision="bf16"`."""
        tree = self.model_dump(mode="json")
        for dotted, value in paths.items():
            *parents, leaf = dotted.split("__")
            node = tree
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        return type(self).from_tree(tree)


def check_same_run(
    stored: Settings, now: Settings, free: Mapping[str, set[str]], *, where: Path | None = None
) -> None:
    """Refuse to go on with a run under another recipe.

    free: by section, the keys that may differ. where: a checkpoint of the run, which may go on
    under another name in another folder.

    Raises:
        UserError: another key does.
    """
    before, after = _leaves(stored.model_dump(mode="json")), _leaves(now.model_dump(mode="json"))
    for name in {**after, **before}:
        old, value = before.get(name), after.get(name)
        section, key = (*name.split("."), "")[:2]
        if where is not None and name in ("name", "output"):
            continue
        if old != value and key not in free.get(section, set()):
            raise UserError(
                f"{where or now.output} holds a run with {name} = {old}, the recipe says {value}; "
                "give another output, or remove that folder"
            )


def _leaves(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted names; an empty section has none."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{above}{name}"
        leaves |= _leaves(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value}
    return leaves


def _deepspeed_path(name: str) -> Path:
    shipped = {path.stem: path for path in DS_CONFIGS.glob("*.json")}
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    raise UserError(
        f"train.deepspeed '{name}' is neither one of {', '.join(sorted(shipped))} nor a file"
        + nearest(name, shipped)
    )


def _override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"--set {override}: write key.path=value, for example train.lr=3e-4")
    *parents, leaf = dotted.strip().split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {parent} is a value, not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {error}") from error
    node[leaf] = value  # YAML 1.1 reads 3e-4 as a string; pydantic makes a number of it


def _first_fault(root: type[BaseModel], error: ValidationError) -> str:
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    location = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _known_keys(root, fault["loc"][:-1])
        return f"unknown key {location}{nearest(str(fault['loc'][-1]), known)}"
    if fault["type"] == "missing":
        return f"{location} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    if not location:
        return message
    return f"{location}: {message} (got {fault['input']!r})"


def _known_keys(root: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    model: Any = root
    for part in location:
        fields = getattr(model, "model_fields", None)
        # of a list or a mapping its entries
        model = fields[part].annotation if fields is not None else get_args(model)[-1]
        if type(None) in get_args(model):
            model = get_args(model)[0]
    return list(model.model_fields)
