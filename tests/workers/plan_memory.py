"""Peak memory of real steps beside what `drama plan` predicts for them, bytes beyond the start.

usage: plan_memory.py RECIPE OUT NAME...   (of ds_configs/) -> OUT, JSON: name -> [real, planned]

Each configuration runs in a process of its own: what one leaves behind would count for the next.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from drama.bench.rows import peak_bytes
from drama.console import quiet_libraries
from drama.distributed import Ranks
from drama.plan import STAGES, count_model, count_work, memory
from drama.recipe import Recipe
from drama.trainer import Trainer


def measure(path: Path, name: str) -> list[int]:
    """name: a configuration, or with `:chunk` the form of its reduction."""
    quiet_libraries()
    name, _, reduction = name.partition(":")
    recipe = Recipe.load(
        path,
        [
            f"train.deepspeed={name}",
            f"step.grad_reduction={reduction or 'step'}",
            "step.keep_graphs=0",
            "train.batch_size=16",
        ],
    )
    planned = memory(
        *(count_model(recipe, torch.float32), count_work(recipe)),
        stage=STAGES[name][0],
        ranks=1,
        token_budget=recipe.train.token_budget,
        dtype=torch.float32,
        on_gpu=False,
        reduce_by_step=recipe.step.grad_reduction == "step",
    )
    with Ranks.start() as ranks:

        def train() -> None:
            trainer = Trainer(recipe, ranks)
            for step in range(2):
                trainer.step_runner.step(trainer.batches[step])
            kept.append(trainer)

        kept: list[Trainer] = []  # alive to the end: what dies inside is no peak
        real = peak_bytes(train, ranks.device)
    print(
        name, real / 2**20, {k: round(v / 2**20) for k, v in vars(planned).items()}, planned.phases
    )
    return [real, planned.total]


def main(path: Path, out: Path, names: list[str]) -> None:
    if len(names) == 1:
        out.write_text(json.dumps(measure(path, names[0])))
        return
    found = {}
    for name in names:
        part = out.with_name(f"{name}.json")
        command = [sys.executable, __file__, str(path), str(part), name]
        subprocess.run(command, check=True)
        found[name] = json.loads(part.read_text())
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
