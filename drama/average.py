"""The mean of a run's last checkpoints (Izmailov et al. 2018, arXiv 1803.05407)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from drama.checkpoint import whole_checkpoints
from drama.encoder import Encoder
from drama.errors import UserError
from drama.export import export
from drama.hf import check_sums


def average_checkpoints(run: str | Path, last: int, out: str | Path) -> list[int]:
    """Write the mean of the last checkpoints' weights as a retriever folder; return their steps.

    Summed in float64, one checkpoint in memory at a time.

    Raises:
        UserError: fewer whole checkpoints than asked for, or a model in one that is damaged.
    """
    found = whole_checkpoints(Path(run) / "checkpoints")[-last:]
    if len(found) < last:
        raise UserError(
            f"{run} holds {len(found)} whole checkpoints, {last} are asked for; train with a "
            "larger train.keep_last, or lower --last"
        )
    total: dict[str, torch.Tensor] = {}
    for folder in found:
        check_sums(folder / "model")
        for name, weight in load_file(folder / "model" / "model.safetensors").items():
            total[name] = total[name] + weight if name in total else weight.double()
    mean = {name: (weight / last).float() for name, weight in total.items()}
    export(Encoder.from_pretrained(found[-1] / "model"), out, state_dict=mean)
    return [int(folder.name.split("-")[1]) for folder in found]
