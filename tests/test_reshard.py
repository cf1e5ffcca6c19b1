"""Shards that are read by another number of ranks than have saved them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from drama.reshard import Span, spans_of_parts, spans_of_slices
from drama.testing import read_metrics, run_alone, run_deepspeed

TRAIN = Path(__file__).parents[1] / "launchers" / "train.py"
SIZES = {"a": 7, "b": 1, "c": 12, "d": 3}


def flat_of(spans: list[Span], weights: dict[str, torch.Tensor], length: int) -> torch.Tensor:
    flat = torch.zeros(length)
    for name, start, at, count in spans:
        flat[at : at + count] = weights[name][start : start + count]
    return flat


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_parts_of_one_flat_group(num_ranks):
    """ZeRO 1 and 2, against the group written out and cut by torch."""
    weights = {name: torch.rand(size) for name, size in SIZES.items()}
    paddings = [0, 2, 0, 5]
    padded = [
        torch.cat([w, torch.zeros(n)]) for w, n in zip(weights.values(), paddings, strict=True)
    ]
    group = torch.cat(padded)
    part = -(-len(group) // num_ranks)
    group = torch.cat([group, torch.zeros(part * num_ranks - len(group))])
    for rank, want in enumerate(group.split(part)):
        spans = spans_of_parts(SIZES, paddings, part, rank)
        assert torch.equal(flat_of(spans, weights, part), want)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_slices_of_every_weight(num_ranks):
    """ZeRO 3, against every weight cut by torch; with 8 ranks some have nothing of it."""
    weights = {name: torch.rand(size) for name, size in SIZES.items()}
    slices: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]
    for weight in weights.values():
        part = -(-len(weight) // num_ranks)
        whole = torch.cat([weight, torch.zeros(part * num_ranks - len(weight))])
        for rank, piece in enumerate(whole.split(part)):
            slices[rank].append(piece)
    for rank, pieces in enumerate(slices):
        want = torch.cat(pieces)
        spans = spans_of_slices(SIZES, num_ranks, rank)
        assert torch.equal(flat_of(spans, weights, len(want)), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "tolerance"),
    [
        ("zero0", "fp32", 1e-5),
        ("zero1", "fp32", 1e-5),
        ("zero2", "fp32", 1e-5),
        ("zero3", "fp32", 1e-5),
        ("zero3_offload", "fp32", 1e-5),
        # the weights are the same to the bit; sums of another order are rounded to 8 bits
        ("zero1", "bf16", 5e-3),
        ("zero2", "bf16", 5e-3),
        ("zero3", "bf16", 5e-3),
    ],
)
def test_two_ranks_then_one_then_four(world, tmp_path, stage, precision, tolerance):
    """Against one rank that was never stopped: the same batches, the same losses."""
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    recipe["data"]["workers"] = 0
    recipe["loss"]["learn_temperature"] = True
    recipe["train"] |= {
        "save_every": 2, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 5.0,
        "deepspeed": stage, "precision": precision,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def go(run: str, steps: int, num_ranks: int) -> str:
        options = [
            "--recipe", str(tmp_path / "recipe.yaml"), "--set", f"output={tmp_path / run}",
            "--set", f"train.steps={steps}",
        ]  # fmt: skip
        if num_ranks == 1:
            done = run_alone(TRAIN, *options)
        else:
            done = run_deepspeed(TRAIN, *options, num_ranks=num_ranks)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    go("never", 6, 1)
    go("moved", 2, 2)
    weights = tmp_path / "moved" / "model" / "model.safetensors"
    before = weights.read_bytes()
    go("moved", 2, 1)  # which has nothing to do but to write the model
    assert weights.read_bytes() == before
    assert "step-2 was saved by 2 ranks and is dealt to 1" in go("moved", 4, 1)
    assert "step-4 was saved by 1 ranks and is dealt to 4" in go("moved", 6, 4)
    never, moved = (read_metrics(tmp_path / run) for run in ("never", "moved"))
    assert [x["tokens"] for x in moved] == [x["tokens"] for x in never]
    exact = ("grad_norm",) if precision == "fp32" else ()
    for name in ("loss", "temperature", *exact):
        ours, theirs = ([x[name] for x in lines] for lines in (moved, never))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, err_msg=name)
