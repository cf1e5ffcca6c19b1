"""What `drama plan` predicts: against counting by hand, and against the memory of real steps."""

import json
import os
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from drama.cli import main as cli
from drama.data.sources import read_source
from drama.data.writer import write_shards
from drama.plan import BUDGETS, Model, Work, choose, count_model, count_work, make_plan, memory
from drama.recipe import Recipe
from drama.testing import tiny_llama

WORKER = Path(__file__).parent / "workers" / "plan_memory.py"
PAIRS = Path(__file__).parents[1] / "data" / "demo" / "pairs.jsonl.xz"


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory) -> Path:
    """A model large enough to stand out of a process's own memory: 24M weights."""
    folder = tmp_path_factory.mktemp("plan")
    tiny_llama(
        folder / "backbone", hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=2048, initializer_range=0.02,
    )  # fmt: skip
    write_shards(islice(read_source(PAIRS), 256), folder / "shards")
    recipe = {
        "name": "plan",
        "output": str(folder / "run"),
        "model": {"path": str(folder / "backbone")},
        "data": {
            "shards": [str(folder / "shards")],
            "hard_negatives": 1,
            "max_query_tokens": 64,
            "max_document_tokens": 256,
            "lanes": 8,
        },
        "train": {"batch_size": 64, "steps": 10, "token_budget": 2048, "precision": "fp32"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("freeze", [False, True])
def test_weights_are_counted(recipe_path, freeze):
    recipe = Recipe.load(recipe_path, [f"model.freeze_embeddings={freeze}"])
    model = count_model(recipe, torch.float32)
    block = 2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 2048 + 2 * 512
    assert model.weights == 260 * 512 + 6 * block + 512
    assert model.frozen == (260 * 512 if freeze else 0)
    assert model.width == 512


def test_a_steps_work_is_that_of_its_batches(recipe_path):
    """All records are in the sample, so an epoch's batches have its mean."""
    recipe = Recipe.load(recipe_path)
    work = count_work(recipe)
    assert work.sampled
    assert work.queries == 64
    assert work.documents == 128
    longest = count_work(Recipe.load(recipe_path, ["data.shards=[nowhere]"]))
    assert not longest.sampled
    assert longest.tokens == 64 * (64 + 2 * 256)
    assert work.tokens < longest.tokens
    assert work.flops < longest.flops


def test_memory_by_hand():
    """8 ranks, bf16: what every stage divides."""
    model = Model(trained=10**8, frozen=0, width=768, graph_bytes=1000.0)
    work = Work(queries=1024, documents=2048, tokens=10**6, flops=1e15, sampled=True)
    common = {"ranks": 8, "token_budget": 8192, "dtype": torch.bfloat16}
    one, two, three = (memory(model, work, stage=s, **common) for s in (1, 2, 3))
    assert one.weights == two.weights == 2 * 10**8
    assert three.weights == 2 * 10**8 // 8 + 2 * 10**8  # its shard, and all of it while in use
    assert one.optimizer == two.optimizer == three.optimizer == 12 * 10**8 // 8
    assert one.gradients == 2 * 10**8
    assert one.activations == 8192 * 1000
    assert one.total == max(one.phases.values())
    away = memory(model, work, stage=3, offload=True, **common)
    assert away.optimizer == 0
    by_chunk = memory(model, work, stage=2, reduce_by_step=False, **common)
    assert by_chunk.gradients == 2 * 10**8 // 8
    added_up = memory(model, work, stage=1, reduce_by_step=False, **common)
    assert added_up.gradients == 3 * one.gradients


LARGE = Model(trained=10**9, frozen=0, width=2048, graph_bytes=10**5)
WORK = Work(queries=1024, documents=2048, tokens=10**6, flops=1e15, sampled=True)
BF16 = {"ranks": 8, "dtype": torch.bfloat16}


def test_the_recommendation_fits_and_the_next_larger_chunk_does_not(recipe_path):
    recipe = Recipe.load(recipe_path, ["train.precision=bf16"])
    at = {b: memory(LARGE, WORK, stage=1, token_budget=b, **BF16) for b in BUDGETS}
    for budget, larger in pairwise(BUDGETS):
        if at[budget].total == at[larger].total:  # another phase is the highest
            continue
        room = at[budget].total
        plan = choose(recipe, LARGE, WORK, room=room, **BF16)
        assert (plan.stage, plan.token_budget) == ("zero1", budget)
        rest = at[budget].phases
        alone = max(rest["replay"] - at[budget].activations, rest["loss"])
        kept = (room - alone) // at[budget].activations
        assert plan.kept_chunks == min(kept, plan.num_chunks)
    roomy = choose(recipe, LARGE, WORK, room=10**12, **BF16)
    assert roomy.token_budget == BUDGETS[-1]
    assert roomy.kept_chunks == roomy.num_chunks
    assert make_plan(recipe, gpus=4, gpu_gib=4).stage == "zero1"
    assert make_plan(recipe, gpus=4, gpu_gib=0.5).stage is None


@pytest.mark.parametrize("wanted", ["auto", "step", "chunk"])
def test_a_stage_is_predicted_in_the_form_that_the_run_takes(recipe_path, wanted):
    """Reduced after every chunk, ZeRO 2 holds a part of the gradient: it fits where 1 does not."""
    recipe = Recipe.load(recipe_path, [f"step.grad_reduction={wanted}"])
    rooms = [int(gib * 2**30) for gib in (2, 3, 4, 5, 5.5, 6, 6.5, 7, 8, 12, 16, 80)]
    plans = [choose(recipe, LARGE, WORK, room=room, **BF16) for room in rooms]
    stages = [plan.stage for plan in plans]
    assert ("zero2" in stages) == (wanted != "step"), stages
    for plan in plans:
        if wanted != "auto":
            assert set(plan.reductions.values()) == {wanted}
        if plan.stage in ("zero3", "zero3_offload") and plan.reductions[plan.stage] == "chunk":
            assert plan.kept_chunks == 0
    if wanted == "auto":
        assert plans[-1].reductions["zero1"] == "chunk"  # in one go too, behind the last backward
        assert plans[-1].reductions["zero2"] == "step"
        two = plans[stages.index("zero2")]
        assert two.reductions["zero2"] == "chunk"


def test_the_command_says_what_to_set(recipe_path):
    arguments = ["plan", "--recipe", str(recipe_path), "--gpus", "2", "--gpu-memory", "80"]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    for expected in ("zero1", "zero3_offload", "activations", "tokens/s", "recommended: --set"):
        assert expected in shown.output
    shown = CliRunner().invoke(cli, [*arguments[:-1], "1"])
    assert shown.exit_code == 2


@pytest.mark.parametrize("name", ["zero1", "zero1:chunk", "zero3"])
def test_predicted_memory_is_within_15_percent_of_real_steps(memories, name):
    real, planned = memories[name]
    assert planned == pytest.approx(real, rel=0.15)


@pytest.fixture(scope="module")
def memories(recipe_path) -> dict[str, list[int]]:
    out = recipe_path.parent / "memories.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    names = ["zero1", "zero1:chunk", "zero3"]
    command = [sys.executable, str(WORKER), str(recipe_path), str(out), *names]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(out.read_text())
