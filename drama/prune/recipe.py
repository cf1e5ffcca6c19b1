"""The recipe of a pruning by learned masks: one strict YAML, as for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from drama.errors import UserError
from drama.settings import Beta, Optimization, Positive, Schedule, Settings, Strict

Files = Annotated[
    list[Path],
    Field(min_length=1),
    BeforeValidator(lambda x: [x] if isinstance(x, str | Path) else x),
]


class SourceRecipe(Strict):
    """What is pruned, and to which shape."""

    path: Path  # a folder or .gguf file: Llama, Mistral, Qwen2, Qwen3
    to: str  # as `drama prune --to`: 0.1b, 0.3b, layers=12,hidden=768,...


class TextRecipe(Strict):
    """Text by domain, and how the mixture follows the losses."""

    domains: dict[str, Files] = Field(min_length=1)  # name: one file or several
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})  # to begin with
    length: Annotated[int, Field(ge=2)] = 1024  # tokens a row
    held_out_rows: Positive = 8  # of each domain, to judge by
    update_every: Annotated[int, Field(ge=0)] = (
        50  # steps between two updates of the weights; 0 none
    )
    clip_gaps: bool = True  # a domain below its reference does not shrink (the paper's max(., 0))
    floor: Annotated[float, Field(gt=0, le=1)] = 1e-4  # share that is spread evenly


class MaskRecipe(Schedule):
    """Masks and multipliers: their rates share this schedule."""

    lr: Annotated[float, Field(gt=0)] = 1.0
    multiplier_lr: Annotated[float, Field(gt=0)] = 1.0
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    ramp_ratio: Annotated[float, Field(ge=0, le=1)] = 0.2  # of the steps until the target is full


class PruneTrainRecipe(Optimization):
    """Language-model training of the weights meanwhile."""

    steps: Positive = 3200
    batch_rows: Positive = 32  # of the global batch
    rows_per_pass: Positive = 4  # a rank's rows at once: memory, not mathematics
    lr: Annotated[float, Field(gt=0)] = 1e-4
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    recompute_blocks: bool = False  # activation checkpointing


class PruneEvalRecipe(Strict):
    """The target shape's loss on held-out rows."""

    every: Positive = 100  # steps


class PruneRecipe(Settings):
    """One pruning run. `output` is the run folder."""

    model: SourceRecipe
    data: TextRecipe
    masks: MaskRecipe = MaskRecipe()
    train: PruneTrainRecipe = PruneTrainRecipe()
    eval: PruneEvalRecipe = PruneEvalRecipe()

    @model_validator(mode="after")
    def _fits(self) -> PruneRecipe:
        unknown = sorted(set(self.data.weights) - set(self.data.domains))
        if unknown:
            raise ValueError(
                f"data.weights.{unknown[0]} is no domain; there are {', '.join(self.data.domains)}"
            )
        missing = sorted(set(self.data.domains) - set(self.data.weights))
        if self.data.weights and missing:
            raise ValueError(
                f"data.weights names some domains, but not {missing[0]}; give every domain a "
                "weight, or none"
            )
        for name in self.data.domains:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"data.domains.{name}: a domain's name becomes a file's; use letters, digits, "
                    "- and _"
                )
        return self

    def rows_of_rank(self, world_size: int) -> int:
        """Rows of the global batch that each rank has.

        Raises:
            UserError: they cannot be shared out, or not be cut into passes.
        """
        train = self.train
        each = train.rows_per_pass * world_size
        if train.batch_rows % each:
            near = max(1, round(train.batch_rows / each)) * each
            raise UserError(
                f"train.batch_rows {train.batch_rows} is no multiple of {world_size} ranks times "
                f"train.rows_per_pass {train.rows_per_pass}; the nearest is {near}, or lower "
                "train.rows_per_pass"
            )
        return train.batch_rows // world_size

    def deepspeed_config(self, *, world_size: int) -> dict[str, Any]:
        """The DeepSpeed JSON with every "auto" filled in.

        Raises:
            UserError: see `Optimization.deepspeed_config`.
        """
        passes = self.rows_of_rank(world_size) // self.train.rows_per_pass
        return self.train.deepspeed_config(
            world_size=world_size, rows_per_rank=self.train.rows_per_pass, accumulation=passes
        )
