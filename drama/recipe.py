"""The recipe: one typed tree, read from one strict YAML, that says everything about a run.

    recipe = Recipe.load("recipes/demo.yaml", overrides=["train.lr=3e-4"])

Unknown keys, wrong types and impossible combinations raise `UserError` naming the key, the value
and the nearest valid one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from drama.data.lines import is_url
from drama.errors import UserError, nearest
from drama.files import replacing

DS_CONFIGS = Path(__file__).parent / "ds_configs"
TEMPERATURE_RANGE = (0.005, 1.0)  # of a learned one, as CLIP clips its logit scale
# sections of the DeepSpeed JSON, and the module that each needs
MONITORS = {"wandb": "wandb", "comet": "comet_ml"}
Positive = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


# YAML 1.1 reads a bare on or off as true or false
OnOff = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda x: {True: "on", False: "off"}.get(x, x) if isinstance(x, bool) else x),
]


def _folder_or_address(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and not is_url(value) else value


ShardFolder = Annotated[Path | str, BeforeValidator(_folder_or_address)]  # s3://, hf://, ...


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RopeRecipe(_Strict):
    """Rotary positions other than the backbone's own; the keys are those of transformers."""

    rope_theta: Annotated[float, Field(gt=0)] | None = None
    rope_type: Literal["default", "linear", "yarn", "llama3"] | None = None
    factor: Annotated[float, Field(ge=1)] | None = None
    original_max_position_embeddings: Positive | None = None
    low_freq_factor: Annotated[float, Field(gt=0)] | None = None  # llama3
    high_freq_factor: Annotated[float, Field(gt=0)] | None = None  # llama3


class ModelRecipe(_Strict):
    """The backbone and how it becomes a retriever."""

    path: Path
    rope: RopeRecipe = RopeRecipe()  # for texts longer than the backbone was made for
    pooling: Literal["last", "mean"] = "last"
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    query_prefix: str = "Query: "
    document_prefix: str = ""
    freeze_embeddings: bool = False  # the embedding table stays as it is: no gradient, no state


class DataRecipe(_Strict):
    """Which shards, and how a record becomes rows of a batch."""

    shards: list[ShardFolder] = Field(min_length=1)
    hard_negatives: Annotated[int, Field(ge=0)] = 7
    max_query_tokens: Annotated[int, Field(ge=2)] = 256
    max_document_tokens: Annotated[int, Field(ge=2)] = 256
    lanes: Positive = 64  # virtual ranks; the data order does not depend on the real ones
    block: Positive = 256  # records that stay together when the corpus is shuffled
    window: Positive = 1024  # records of a lane that are shuffled among each other
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}  # of sources in a mixture
    batches: Literal["mixed", "one_source"] = "mixed"
    language_alpha: Annotated[float, Field(ge=0, le=1)] | None = (
        None  # below 1 lifts rare languages
    )
    on_bad: Literal["stop", "skip"] = "stop"  # a damaged record: end the run, or RUN/bad.jsonl
    workers: Annotated[int, Field(ge=0)] = 1  # processes a rank that read and tokenise ahead
    cache: Path | None = None  # where pieces of remote shards lie; default ~/.cache/drama/shards
    cache_gb: Annotated[float, Field(gt=0)] = 16.0


class LossRecipe(_Strict):
    """InfoNCE over the global batch."""

    temperature: Annotated[float, Field(gt=0)] = 0.02
    learn_temperature: bool = False  # from there on, with the model's learning rate
    matryoshka_dims: list[Positive] = []  # ascending, the last one is the model's width
    matryoshka_weights: list[float] = []
    margin: Annotated[float, Field(ge=0)] | None = (
        None  # cosine; columns above positive + margin are no negatives
    )
    own_negatives: bool = False  # a hard negative counts for the query that it came with only
    symmetric: bool = False  # mean with the other direction: each positive is to find its query
    scores_weight: Annotated[float, Field(ge=0)] = 0.0  # of KL to the records' teacher scores
    scores_temperature: Annotated[float, Field(gt=0)] = 1.0  # the teacher's softmax(score / this)
    teacher: Path | None = None  # vectors of `drama teach`; their cosines are imitated
    teacher_weight: Annotated[float, Field(ge=0)] = 1.0
    spread_weight: Annotated[float, Field(ge=0)] = 0.0  # of the mean squared cosine of strangers


class EvalRecipe(_Strict):
    """What the model is judged by while it trains; the best one is kept in RUN/best."""

    every: Positive = 200  # steps
    shards: list[ShardFolder] = []  # held-out records: their loss
    max_records: Positive = 4096  # of them
    beir: list[Path] = []  # folders in BEIR's layout: nDCG@10, which decides what is best
    split: str = "test"


class TrainRecipe(_Strict):
    """Optimisation, memory and pace."""

    batch_size: Positive = 2048  # queries in the global batch
    steps: Positive | None = None  # exactly one of steps and epochs
    epochs: Annotated[float, Field(gt=0)] | None = None
    lr: Annotated[float, Field(gt=0)] = 2e-4
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1  # of the steps; wsd only
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    grad_clip: Annotated[float, Field(ge=0)] = 1.0  # 0 turns clipping off
    token_budget: Positive = 8192  # tokens a chunk: memory, not mathematics
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    deepspeed: str = "zero3"  # a name in ds_configs/ or a path to a JSON
    save_every: Positive = 500
    keep_last: Positive = 2  # checkpoints; in wsd the newest of the flat part stays too


class StepRecipe(_Strict):
    """How a step is computed. None of it changes the gradient, only time and memory."""

    keep_graphs: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"  # chunks not encoded twice
    grad_reduction: Literal["auto", "step", "chunk"] = "auto"  # once a step, or after every chunk
    balance_ranks: bool = True  # deal texts out so that all ranks have the same number of tokens
    recompute_blocks: bool = False  # activation checkpointing: block inputs only, for long texts
    pooled_last_block: bool = True  # the last block only at the token that is pooled
    pooled_norm: bool = True  # the final norm only where the pooling reads it
    liger: OnOff = "auto"  # Liger-Kernel's norm, SwiGLU, RoPE; CUDA only
    compile: bool = False  # torch.compile of norms and feed-forward; not with ZeRO 3


class Recipe(_Strict):
    """One run. `output` is the run folder."""

    name: str
    output: Path
    seed: int = 0
    model: ModelRecipe
    data: DataRecipe
    loss: LossRecipe = LossRecipe()
    train: TrainRecipe = TrainRecipe()
    step: StepRecipe = StepRecipe()
    eval: EvalRecipe = EvalRecipe()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        train, data, dims = self.train, self.data, self.loss.matryoshka_dims
        if (train.steps is None) == (train.epochs is None):
            raise ValueError("train: give exactly one of steps and epochs")
        if train.batch_size % data.lanes:
            below = train.batch_size // data.lanes * data.lanes
            near = below or data.lanes
            raise ValueError(
                f"train.batch_size {train.batch_size} is not a multiple of data.lanes "
                f"{data.lanes}; the nearest is {near}, or lower data.lanes"
            )
        longest = max(data.max_query_tokens, data.max_document_tokens)
        if train.token_budget < longest:
            raise ValueError(
                f"train.token_budget {train.token_budget} is below the longest text of {longest} "
                f"tokens; the least is {longest}"
            )
        if dims != sorted(set(dims)):
            raise ValueError(f"loss.matryoshka_dims {dims} must ascend: {sorted(set(dims))}")
        if self.loss.matryoshka_weights and len(self.loss.matryoshka_weights) != len(dims):
            raise ValueError(
                f"loss.matryoshka_weights has {len(self.loss.matryoshka_weights)} entries for "
                f"{len(dims)} matryoshka_dims"
            )
        low, high = TEMPERATURE_RANGE
        if self.loss.learn_temperature and not low <= self.loss.temperature <= high:
            raise ValueError(
                f"loss.temperature {self.loss.temperature:g} is outside [{low:g}, {high:g}], where "
                "a learned one is kept; the nearest is "
                f"{min(max(self.loss.temperature, low), high):g}, or loss.learn_temperature false"
            )
        if self.loss.symmetric and self.loss.margin is not None:
            raise ValueError(
                "loss.margin is set and loss.symmetric true: a margin is over the positive of a "
                "query, the documents' direction has none; leave one of them out"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
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
            raise UserError(f"recipe {path}: expected a mapping with name, output, model, data")
        for override in overrides:
            _override(tree, override)
        return cls.from_tree(tree, where=f"recipe {path}")

    @classmethod
    def from_tree(cls, tree: dict[str, Any], where: str = "recipe") -> Recipe:
        """Validate an already parsed tree.

        Raises:
            UserError: as `load`.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{where}: {_first_fault(error)}") from error

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe, every default spelled out."""
        with replacing(path) as temporary:
            temporary.write_text(
                yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
                encoding="utf-8",
            )

    def with_values(self, **paths: Any) -> Recipe:
        """Return a copy with resolved values; keys are written `train__precision="bf16"`."""
        tree = self.model_dump(mode="json")
        for dotted, value in paths.items():
            *parents, leaf = dotted.split("__")
            node = tree
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        return type(self).from_tree(tree)

    def deepspeed_config(self, *, world_size: int) -> dict[str, Any]:
        """The DeepSpeed JSON with every "auto" filled in from the recipe.

        Raises:
            UserError: no such file, or a value that contradicts the recipe.
        """
        path = _deepspeed_path(self.train.deepspeed)
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
        # one optimiser step is one DeepSpeed micro-batch: the gradient cache does the accumulation
        per_rank = max(1, self.train.batch_size // world_size)
        expected: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": per_rank,
            "gradient_accumulation_steps": 1,
            "train_batch_size": per_rank * world_size,
            "gradient_clipping": self.train.grad_clip,
        }
        for key, value in expected.items():
            if config.get(key, "auto") != "auto" and config[key] != value:
                raise UserError(f"{path}: {key} is {config[key]}, but the recipe gives {value}")
            config[key] = value
        bf16 = config.setdefault("bf16", {})
        wanted = self.train.precision == "bf16"
        if bf16.get("enabled", "auto") not in ("auto", wanted):
            raise UserError(
                f"{path}: bf16.enabled is {bf16['enabled']}, but train.precision is "
                f"{self.train.precision}"
            )
        bf16["enabled"] = wanted
        stage = config.get("zero_optimization", {}).get("stage", 0)
        if wanted and stage == 0:
            raise UserError(
                f"{path}: ZeRO stage 0 in bf16 keeps no float32 weights to export; use zero1, or "
                "train.precision fp32"
            )
        if self.step.compile and stage == 3:
            raise UserError(
                f"step.compile does not go with ZeRO 3 ({path}): its weights are gathered by hooks "
                "that a compiled module never runs; take zero1 or zero2, or step.compile false"
            )
        if config.get("fp16", {}).get("enabled"):
            raise UserError(f"{path}: fp16 is not supported; use train.precision bf16 or fp32")
        return config


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


def _first_fault(error: ValidationError) -> str:
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    location = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _known_keys(fault["loc"][:-1])
        return f"unknown key {location}{nearest(str(fault['loc'][-1]), known)}"
    if fault["type"] == "missing":
        return f"{location} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    if not location:
        return message
    return f"{location}: {message} (got {fault['input']!r})"


def _known_keys(location: Sequence[int | str]) -> list[str]:
    model: Any = Recipe
    for part in location:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
