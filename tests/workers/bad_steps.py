"""Two ranks take [good, bad, good] steps and the same with the bad one left out by hand.

usage: bad_steps.py FOLDER STAGE:PRECISION:REDUCTION...   -> FOLDER/found.json
"""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drama import checkpoint, gradcache
from drama.console import quiet_libraries
from drama.data.batches import RankBatch
from drama.distributed import Ranks
from drama.encoder import Encoder
from drama.gradcache import GradCache
from drama.loss import ContrastiveLoss
from drama.optimizer import Pace, start_engine, step_engine
from drama.settings import Optimization
from drama.testing import tiny_llama

BAD = ("loss", "gradient", "only the loss", "told so")


def a_batch(rank: int, step: int) -> RankBatch:
    generator = torch.Generator().manual_seed(10 * step + rank)
    rows = [torch.randint(5, 200, (n,), generator=generator).tolist() for n in (4, 5, 6, 20, 9, 30)]
    return RankBatch.of_pairs(rows, torch.arange(3) + 100 * rank)


def run(folder: Path, case: str, ranks: Ranks, bad: str) -> dict[str, Any]:
    stage, precision, reduction = case.split(":")
    encoder = Encoder.from_pretrained(folder / "model").train()
    train = Optimization(
        precision=precision, deepspeed=f"zero{stage}", lr=1e-2, warmup_ratio=0, schedule="linear"
    )
    config = train.deepspeed_config(world_size=ranks.world_size, rows_per_rank=3)
    engine = start_engine(
        encoder, train, config, Pace.of(train, 4), output=folder / "monitor", ranks=ranks
    )
    runner = GradCache(engine, ContrastiveLoss(0.1), 40, reduction=reduction)
    norms, rates, real = [], [], ContrastiveLoss.__call__
    for step in range(3):
        rates.append(engine.get_lr()[0])
        hurt = step == 1 and (ranks.rank == 1 or bad == "only the loss")
        if step == 1 and bad == "by hand":
            engine.lr_scheduler.step()
            continue

        def call(self: Any, *args: Any, hurt: bool = hurt) -> Any:
            result = real(self, *args)
            if hurt and bad == "gradient":
                result.grad_k_ND[0, 0] = math.inf
            if hurt and bad == "loss":  # of rank 1 alone
                result.grad_q_BD.fill_(math.nan)
            return replace(result, loss=math.inf) if hurt and bad == "only the loss" else result

        ContrastiveLoss.__call__ = call  # type: ignore[method-assign]
        told = step == 1 and bad == "told so"
        gradcache.step_engine = partial(step_engine, sound=not told)  # type: ignore[assignment]
        norms.append(runner.step(a_batch(ranks.rank, step)).grad_norm)
        ContrastiveLoss.__call__ = real  # type: ignore[method-assign]
    weights = checkpoint.full_state_dict(engine, encoder.backbone)
    return {"norms": norms, "rates": rates, "weights": weights}


def main(folder: Path, cases: list[str]) -> None:
    quiet_libraries()
    found = {}
    with Ranks.start() as ranks:
        if ranks.is_main:
            tiny_llama(folder / "model")
        ranks.wait()
        for case in cases:
            want = run(folder, case, ranks, "by hand")
            for bad in BAD:
                got = run(folder, case, ranks, bad)
                same = all(torch.equal(x, want["weights"][n]) for n, x in got["weights"].items())
                found[f"{case} {bad}"] = {
                    "same": same,
                    "weights": len(got["weights"]),
                    "bad norm": str(got["norms"].pop(1)),
                    "norms": got["norms"] == want["norms"],
                    "rates": got["rates"] == want["rates"],
                }
        if ranks.is_main:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
