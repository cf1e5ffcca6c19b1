"""Steps whose loss or gradient is no number: left out, counted, and after some in a row the end.

A loss that is no number makes the whole gradient none (`sound_scale`), the engine does not apply a
gradient whose norm is none (`drama.optimizer.step_engine`): every rank sees the same norm.

    RUN/bad-batch-STEP.json    loss, norm, and by rank the records of the batch that was left out
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from drama import checkpoint
from drama.console import console
from drama.distributed import Ranks
from drama.errors import UserError
from drama.files import replacing
from drama.full_disk import FullDisk


def sound_scale(loss: Tensor, scale: float = 1.0) -> Tensor:
    """The scale of a loss, NaN where the loss is no number: so is every gradient of it then."""
    return torch.where(loss.detach().isfinite(), scale, math.nan)


class BadSteps:
    """Counts steps that were left out; all ranks have the same counts.

    limit: so many in a row stop the run. state: [all, in a row], part of a checkpoint, so a run
    that goes on counts as one that was never stopped. A checkpoint after such a step holds the
    weights before it.
    """

    def __init__(self, ranks: Ranks, output: Path, limit: int) -> None:
        self.ranks, self.output, self.limit = ranks, output, limit
        self.state = [0, 0]

    @property
    def total(self) -> int:
        """Steps left out since the run began."""
        return self.state[0]

    def left_out(
        self,
        step: int,
        records: Callable[[], list[dict[str, Any]]],
        rate: str = "",
        /,
        **figures: float,
    ) -> bool:
        """Whether the step was left out; a collective.

        records: of this rank's share of the batch, called only where it is needed. rate: another
        key of the recipe that may be too high.

        Raises:
            UserError: one too many in a row.
        """
        wrong = [f"{name} {value}" for name, value in figures.items() if not math.isfinite(value)]
        if not self.ranks.sum(len(wrong)):
            self.state = [self.total, 0]
            return False
        self.state = [self.total + 1, self.state[1] + 1]
        path = self._dump(step, records(), figures)
        what = ", ".join(wrong) or "on another rank"
        if self.state[1] >= self.limit:
            saved = checkpoint.whole_checkpoints(self.output / "checkpoints")
            raise UserError(
                f"step {step} diverged ({what}), the last of {self.limit} in a row that were left "
                f"out; their records: {path}; the last good checkpoint: "
                f"{saved[-1] if saved else 'none yet'}; look at the records, lower train.lr"
                f"{f' or {rate}' if rate else ''}, or lengthen the warm-up, in another output"
            )
        console.print(
            f"warning: step {step} is left out ({what}), {self.state[1]} in a row, {self.total} "
            f"in all; its records: {path}",
            style="yellow",
            markup=False,
            soft_wrap=True,
            highlight=False,
        )
        return True

    def _dump(self, step: int, records: list[dict[str, Any]], figures: dict[str, float]) -> Path:
        path = self.output / f"bad-batch-{step}.json"
        mine = {"figures": {name: str(x) for name, x in figures.items()}, "records": records}
        by_rank: list[Any] = [mine]
        if self.ranks.world_size > 1:
            by_rank = [None] * self.ranks.world_size
            dist.all_gather_object(by_rank, mine)
        if self.ranks.is_main:
            with FullDisk().noted(), replacing(path) as temporary:
                temporary.write_text(
                    json.dumps({"step": step, "ranks": by_rank}, indent=1, ensure_ascii=False),
                    encoding="utf-8",
                    errors="backslashreplace",
                )
        return path
