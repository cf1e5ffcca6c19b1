"""Peak memory of one step at several batch sizes, by counting allocations; one process.

usage: step_memory.py PAIRS... -> a JSON object on the last line of stdout
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch

from drama.bench.rows import peak_bytes
from drama.console import quiet_libraries
from drama.data.batches import RankBatch
from drama.distributed import Ranks
from drama.encoder import Encoder
from drama.gradcache import GradCache
from drama.loss import ContrastiveLoss
from drama.testing import tiny_llama


def ragged(pairs: int) -> RankBatch:
    generator = random.Random(0)
    rows = [[5] * generator.randint(3, 12) for _ in range(pairs)]
    rows += [[6] * generator.randint(20, 60) for _ in range(pairs)]
    return RankBatch.of_pairs(rows, torch.arange(pairs))


def main(sizes: list[int]) -> None:
    quiet_libraries()
    found = {}
    with Ranks.start() as ranks, tempfile.TemporaryDirectory() as scratch:
        encoder = Encoder.from_pretrained(
            tiny_llama(Path(scratch) / "model", num_hidden_layers=6, intermediate_size=256)
        ).train()
        engine, *_ = deepspeed.initialize(
            model=encoder,
            optimizer=torch.optim.AdamW(encoder.parameters(), lr=1e-4),
            config={
                "train_micro_batch_size_per_gpu": 1,
                # by default two gigabytes, which would hide everything else
                "zero_optimization": {"stage": 1, "reduce_bucket_size": 100_000},
                "steps_per_print": 2**31,
            },
        )
        step = GradCache(engine, ContrastiveLoss(0.05), 4096, keep_graphs=0)
        step.step(ragged(64))
        for size in sizes:
            batch, output = ragged(size), {}
            peak = peak_bytes(lambda b=batch, o=output: o.update(x=step.step(b)), ranks.device)
            vectors = len(batch.rows) * encoder.dim * 4
            found[size] = {
                "peak": peak,
                "chunks": output["x"].num_chunks,
                # vectors, their gradients, unit vectors and the sorted copies; ids and positions
                "proportional": 10 * vectors + 24 * batch.num_tokens,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]])
