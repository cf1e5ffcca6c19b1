"""Started by `deepspeed` on two ranks: the gradient of one global batch under ZeRO 0, 1, 2 and 3,
with all features of the step, and with each of them off in turn.

usage: zero_gradients.py FOLDER   (model/, batch.json, gradients.safetensors) -> errors.json
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file

from drama import fusion
from drama.blocks import Execution
from drama.console import quiet_libraries
from drama.data.batches import RankBatch
from drama.data.packing import TokenRows
from drama.distributed import Ranks
from drama.encoder import Encoder
from drama.folder import RetrieverSettings
from drama.gradcache import GradCache
from drama.loss import ContrastiveLoss

ON = {
    **asdict(Execution()), "fused": True, "keep_graphs": 2, "reduction": "step", "balance": True,
}  # fmt: skip
VARIANTS = {
    "all on": {},
    "whole last block": {"pooled_last_block": False},
    "norm of every token": {"pooled_norm": False},
    "transformers' norm and SwiGLU": {"fused": False},
    "blocks recomputed": {"recompute_blocks": True},
    "no graph kept": {"keep_graphs": 0},
    "every graph kept": {"keep_graphs": 99},
    "reduced chunk by chunk": {"reduction": "chunk"},
    "ranks as they read": {"balance": False},
    "all off": {
        "pooled_last_block": False, "pooled_norm": False, "fused": False, "keep_graphs": 0,
        "reduction": "chunk", "balance": False,
    },
}  # fmt: skip


def main(folder: Path) -> None:
    quiet_libraries()
    task = json.loads((folder / "batch.json").read_text())
    expected = load_file(folder / "gradients.safetensors")
    report = {}
    with Ranks.start() as ranks:
        share = task["ranks"][ranks.rank]
        count, documents = share["num_queries"], len(share["document_ids"])
        batch = RankBatch(
            TokenRows.of(share["rows"]),
            count,
            torch.tensor(share["document_ids"]),
            num_cut=0,
            query_ids=torch.arange(count) + 1000 * ranks.rank,
            negatives_of=torch.arange(documents - count) % count,
            scores=torch.full((documents,), torch.nan, dtype=torch.float64),
        )
        for stage in (0, 1, 2, 3):
            for name, changes in VARIANTS.items():
                report[f"ZeRO {stage}, {name}"] = run(
                    folder, task, batch, expected, stage, {**ON, **changes}
                )
                dist.barrier()
        if ranks.is_main:
            (folder / "errors.json").write_text(json.dumps(report))


def run(folder, task, batch, expected, stage, options) -> dict:
    settings = RetrieverSettings(attention=task["attention"], pooling=task["pooling"])
    encoder = Encoder.from_pretrained(folder / "model", settings=settings).train()
    encoder.execution = Execution(**{key: options[key] for key in asdict(Execution())})
    if options["fused"]:
        fusion.fuse(encoder.backbone, "auto", torch.device("cpu"))
    engine, *_ = deepspeed.initialize(
        model=encoder,
        optimizer=torch.optim.AdamW(encoder.parameters(), lr=1e-4),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": task["precision"] == "bf16"},
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "reduce_bucket_size": 5000,
            },
        },
    )
    step = GradCache(
        engine,
        ContrastiveLoss(task["temperature"], tuple(task["prefixes"]), tuple(task["weights"])),
        task["token_budget"],
        keep_graphs=options["keep_graphs"],
        reduction=options["reduction"],
        balance=options["balance"],
    )
    output = step.backward(batch)
    errors, total = {}, 0.0
    for name, parameter in encoder.backbone.named_parameters():
        grad = safe_get_full_grad(parameter)
        error = (grad.double() - expected[name]).norm().item()
        errors[name] = error / expected[name].norm().item()
        total += error**2
    size = sum(want.norm().item() ** 2 for want in expected.values())
    return {
        "loss": output.loss,
        "num_chunks": output.num_chunks,
        "num_kept": output.num_kept,
        "num_masked": output.num_masked,
        "worst": max(errors.values()),
        "whole": (total / size) ** 0.5,
        "errors": errors,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
