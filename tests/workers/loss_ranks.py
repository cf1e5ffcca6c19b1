"""`ContrastiveLoss` on gloo ranks, each with its own share of one global batch.

usage: loss_ranks.py FOLDER WORLD   (cases.pt) -> rank0.pt, rank1.pt, ...

One rank runs without a process group.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from drama.distill import ScoreDistillation
from drama.gather import Columns
from drama.loss import ContrastiveLoss
from drama.targets import Targets
from drama.teacher import TeacherVectors
from drama.temperature import LearnedTemperature


def build(settings: dict) -> ContrastiveLoss:
    settings = dict(settings)
    if settings.pop("learned", False):
        settings["temperature"] = LearnedTemperature(settings["temperature"])
    if "scores" in settings:
        settings["scores"] = ScoreDistillation(*settings["scores"])
    if "teacher" in settings:
        settings["teacher"] = TeacherVectors(settings["teacher"])
    return ContrastiveLoss(**settings)


def work(rank: int, folder: Path, world: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    outputs = {}
    for name, (settings, shares) in torch.load(folder / "cases.pt").items():
        q_BD, documents, part_sizes, targets = shares[rank]
        columns = Columns(part_sizes)
        for part in documents:
            columns.send(part)
        outputs[name] = vars(build(settings)(q_BD, columns, Targets(*targets)))
    torch.save(outputs, folder / f"rank{rank}.pt")
    if world > 1:
        dist.barrier()  # gloo aborts when a peer closes during teardown
        dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (Path(sys.argv[1]), int(sys.argv[2])), nprocs=int(sys.argv[2]))
