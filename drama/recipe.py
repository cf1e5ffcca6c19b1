"""The recipe: one typed tree, read from one strict YAML, that says everything about a run.

    recipe = Recipe.load("recipes/demo.yaml", overrides=["train.lr=3e-4"])

Unknown keys, wrong types and impossible combinations raise `UserError` naming the key, the value
and the nearest valid one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from drama.data.lines import is_url
from drama.errors import UserError
from drama.settings import Optimization, Positive, Settings, Strict

TEMPERATURE_RANGE = (0.005, 1.0)  # of a learned one, as CLIP clips its logit scale

# YAML 1.1 reads a bare on or off as true or false
OnOff = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda x: {True: "on", False: "off"}.get(x, x) if isinstance(x, bool) else x),
]


def _folder_or_address(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and not is_url(value) else value


ShardFolder = Annotated[Path | str, BeforeValidator(_folder_or_address)]  # s3://, hf://, ...


class RopeRecipe(Strict):
    """Rotary positions other than the backbone's own; the keys are those of transformers."""

    rope_theta: Annotated[float, Field(gt=0)] | None = None
    rope_type: Literal["default", "linear", "yarn", "llama3"] | None = None
    factor: Annotated[float, Field(ge=1)] | None = None
    original_max_position_embeddings: Positive | None = None
    low_freq_factor: Annotated[float, Field(gt=0)] | None = None  # llama3
    high_freq_factor: Annotated[float, Field(gt=0)] | None = None  # llama3


class ModelRecipe(Strict):
    """The backbone and how it becomes a retriever."""

    path: Path
    rope: RopeRecipe = RopeRecipe()  # for texts longer than the backbone was made for
    pooling: Literal["last", "mean"] = "last"
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    query_prefix: str = "Query: "
    document_prefix: str = ""
    freeze_embeddings: bool = False  # the embedding table stays as it is: no gradient, no state


class ShardsRecipe(Strict):
    """Which shards, and in which order their records come."""

    shards: list[ShardFolder] = Field(min_length=1)
    lanes: Positive = 64  # virtual ranks; the data order does not depend on the real ones
    block: Positive = 256  # records that stay together when the corpus is shuffled
    window: Positive = 1024  # records of a lane that are shuffled among each other
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})  # of sources in a mixture
    language_alpha: Annotated[float, Field(ge=0, le=1)] | None = (
        None  # below 1 lifts rare languages
    )
    on_bad: Literal["stop", "skip"] = "stop"  # a damaged record: end the run, or RUN/bad.jsonl
    workers: Annotated[int, Field(ge=0)] = 1  # processes a rank that read and tokenise ahead
    cache: Path | None = None  # where pieces of remote shards lie; default ~/.cache/drama/shards
    cache_gb: Annotated[float, Field(gt=0)] = 16.0


def check_lanes(name: str, value: int, lanes: int) -> None:
    """Refuse a global batch that the lanes cannot share.

    Raises:
        ValueError: with the nearest size that they can.
    """
    if value % lanes:
        near = value // lanes * lanes or lanes
        raise ValueError(
            f"{name} {value} is not a multiple of data.lanes {lanes}; the nearest is {near}, or "
            "lower data.lanes"
        )


class DataRecipe(ShardsRecipe):
    """How a record becomes rows of a batch."""

    hard_negatives: Annotated[int, Field(ge=0)] = 7
    max_query_tokens: Annotated[int, Field(ge=2)] = 256
    max_document_tokens: Annotated[int, Field(ge=2)] = 256
    batches: Literal["mixed", "one_source"] = "mixed"


class LossRecipe(Strict):
    """InfoNCE over the global batch."""

    temperature: Annotated[float, Field(gt=0)] = 0.02
    learn_temperature: bool = False  # from there on, with the model's learning rate
    matryoshka_dims: list[Positive] = Field(
        default=[]
    )  # ascending, the last one is the model's width
    matryoshka_weights: list[float] = Field(default=[])
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


class EvalRecipe(Strict):
    """What the model is judged by while it trains; the best one is kept in RUN/best."""

    every: Positive = 200  # steps
    shards: list[ShardFolder] = Field(default=[])  # held-out records: their loss
    max_records: Positive = 4096  # of them
    beir: list[Path] = Field(
        default=[]
    )  # folders in BEIR's layout: nDCG@10, which decides what is best
    split: str = "test"


class TrainRecipe(Optimization):
    """Optimisation, memory and pace."""

    batch_size: Positive = 2048  # queries in the global batch
    steps: Positive | None = None  # exactly one of steps and epochs
    epochs: Annotated[float, Field(gt=0)] | None = None
    token_budget: Positive = 8192  # tokens a chunk: memory, not mathematics


class StepRecipe(Strict):
    """How a step is computed. None of it changes the gradient, only time and memory."""

    keep_graphs: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"  # chunks not encoded twice
    grad_reduction: Literal["auto", "step", "chunk"] = "auto"  # once a step, or chunk by chunk
    balance_ranks: bool = True  # deal texts out so that all ranks have the same number of tokens
    recompute_blocks: bool = False  # activation checkpointing: block inputs only, for long texts
    pooled_last_block: bool = True  # the last block only at the token that is pooled
    pooled_norm: bool = True  # the final norm only where the pooling reads it
    liger: OnOff = "auto"  # Liger-Kernel's norm, SwiGLU, RoPE on CUDA; auto: ours on a CPU
    compile: OnOff = "auto"  # torch.compile around attention: on CUDA; not with ZeRO 3


class Recipe(Settings):
    """One run. `output` is the run folder."""

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
        check_lanes("train.batch_size", train.batch_size, data.lanes)
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

    def deepspeed_config(self, *, world_size: int) -> dict[str, Any]:
        """The DeepSpeed JSON with every "auto" filled in from the recipe.

        Raises:
            UserError: no such file, or a value that contradicts the recipe.
        """
        # one optimiser step is one DeepSpeed micro-batch: the gradient cache does the accumulation
        per_rank = max(1, self.train.batch_size // world_size)
        config = self.train.deepspeed_config(world_size=world_size, rows_per_rank=per_rank)
        stage = config.get("zero_optimization", {}).get("stage", 0)
        if self.step.compile == "on" and stage == 3:
            raise UserError(
                f"step.compile on does not go with ZeRO 3 ({self.train.deepspeed}): its weights "
                "are gathered by hooks that compiled code never runs; take zero1 or zero2, or "
                "step.compile auto"
            )
        return config
