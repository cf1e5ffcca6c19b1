"""The recipe of a recovery: more training of a pruned model, alone or after its parent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from drama.recipe import OnOff, ShardFolder, ShardsRecipe, check_lanes
from drama.settings import Beta, Optimization, Positive, Settings, Strict

Weight = Annotated[float, Field(ge=0)]


class StudentRecipe(Strict):
    """Which model is brought back, and after which one."""

    path: Path  # a folder of `drama prune` or launchers/prune.py, or any model that they take
    parent: Path | None = None  # the model that it was cut from; its logits and states are imitated


class TextsRecipe(ShardsRecipe):
    """Shards of texts, or of records whose documents are read, by source."""

    length: Annotated[int, Field(ge=2)] = (
        1024  # tokens; of longer texts a window, another each epoch
    )
    update_every: Annotated[int, Field(ge=0)] = 0  # steps between updates of the sources' weights
    clip_gaps: bool = True  # a source below its reference does not shrink (the paper's max(., 0))
    floor: Annotated[float, Field(gt=0, le=1)] = 1e-4  # share that is spread evenly


class RecoveryLossRecipe(Strict):
    """What is learnt; all parts are means over the predicted tokens of the global batch."""

    objective: Literal["lm", "mntp"] = "lm"  # next token; or masked ones, seen from both sides
    lm: Weight = 1.0  # weight of the cross-entropy
    kl: Weight = 0.0  # of KL(parent || student) over the vocabulary
    temperature: Annotated[float, Field(gt=0)] = (
        1.0  # of both in the KL, which is scaled by its square
    )
    hidden: Weight = 0.0  # of 1 - cosine between the student's states and the parent's
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.2  # mntp: of a text's tokens
    mask_token: str | None = None  # mntp; default the tokenizer's own, or "_"


class RecoveryTrainRecipe(Optimization):
    """Optimisation, memory and pace."""

    batch_texts: Positive = 512  # of the global batch
    steps: Positive | None = None  # exactly one of steps and epochs
    epochs: Annotated[float, Field(gt=0)] | None = None
    token_budget: Positive = 8192  # tokens a chunk: memory, not mathematics
    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: Weight = 0.0


class RecoveryStepRecipe(Strict):
    """How a step is computed. None of it changes the gradient, only time and memory."""

    grad_reduction: Literal["auto", "step", "chunk"] = "auto"  # once a step, or chunk by chunk
    recompute_blocks: bool = False  # activation checkpointing: block inputs only
    liger: OnOff = "auto"  # Liger-Kernel's norm, SwiGLU, RoPE on CUDA; auto: ours on a CPU


class RecoveryEvalRecipe(Strict):
    """Held-out texts: loss a token by source, of the student and once of its parent."""

    every: Positive = 200  # steps
    shards: list[ShardFolder] = Field(default=[])
    max_texts: Positive = 512


class CutRecipe(Strict):
    """A round: the shape that is cut to, and how long it is brought back."""

    to: str  # as `drama prune --to`
    steps: Positive | None = None  # default train.steps


class RoundsRecipe(Strict):
    """Cut and recover in turn, from `model.path` on: much at once is hard to bring back."""

    calibration: Path  # text that the cuts are chosen by
    calibration_tokens: Positive = 32768
    cuts: list[CutRecipe] = Field(min_length=1)


class RecoveryRecipe(Settings):
    """One recovery. `output` is the run folder."""

    model: StudentRecipe
    data: TextsRecipe
    loss: RecoveryLossRecipe = RecoveryLossRecipe()
    train: RecoveryTrainRecipe = RecoveryTrainRecipe()
    step: RecoveryStepRecipe = RecoveryStepRecipe()
    eval: RecoveryEvalRecipe = RecoveryEvalRecipe()
    rounds: RoundsRecipe | None = None

    @model_validator(mode="after")
    def _fits(self) -> RecoveryRecipe:
        train, data, loss = self.train, self.data, self.loss
        if (train.steps is None) == (train.epochs is None):
            raise ValueError("train: give exactly one of steps and epochs")
        check_lanes("train.batch_texts", train.batch_texts, data.lanes)
        if train.token_budget < data.length:
            raise ValueError(
                f"train.token_budget {train.token_budget} is below data.length {data.length}, the "
                f"longest text; the least is {data.length}"
            )
        imitates = [name for name in ("kl", "hidden") if getattr(loss, name)]
        if imitates and self.model.parent is None:
            raise ValueError(
                f"loss.{imitates[0]} imitates a parent, but model.parent is not given; name the "
                f"model that {self.model.path} was cut from, or set loss.{imitates[0]} 0"
            )
        if not (loss.lm or imitates):
            raise ValueError("loss: all weights are 0; give one of lm, kl and hidden")
        if loss.objective == "mntp":
            self._fits_mntp()
        if data.update_every:
            self._fits_updates()
        return self

    def _fits_mntp(self) -> None:
        if self.model.parent is not None or not self.loss.lm:
            raise ValueError(
                "loss.objective mntp: a parent reads from the left only, so there is nothing to "
                "imitate; set model.parent null, loss.kl and loss.hidden 0, and loss.lm above it"
            )
        if self.rounds is not None:
            raise ValueError(
                "loss.objective mntp does not go with rounds, which cut a model that reads from "
                "the left; run it once more after them"
            )

    def _fits_updates(self) -> None:
        if self.model.parent is None or not self.eval.shards:
            raise ValueError(
                "data.update_every follows how far a source's loss is from the parent's on held-"
                "out texts; give model.parent and eval.shards, or set it 0"
            )
        if self.data.language_alpha is not None:
            raise ValueError(
                "data.update_every and data.language_alpha both set the sources' shares; leave one "
                "of them out"
            )

    def deepspeed_config(self, *, world_size: int) -> dict[str, Any]:
        """The DeepSpeed JSON with every "auto" filled in.

        Raises:
            UserError: see `Optimization.deepspeed_config`.
        """
        per_rank = max(1, self.train.batch_texts // world_size)
        return self.train.deepspeed_config(world_size=world_size, rows_per_rank=per_rank)
