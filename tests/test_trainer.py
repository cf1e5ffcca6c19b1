"""The main job as a user starts it: `deepspeed launchers/train.py`, real ranks, real shards."""

import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from drama.checkpoint import faults
from drama.data.records import Document, Record
from drama.data.sources import read_source
from drama.data.writer import write_shards
from drama.encoder import Encoder
from drama.killing import digests
from drama.optimizer import Pace, learning_rate_factor
from drama.recipe import Recipe
from drama.testing import read_metrics, run_alone, run_deepspeed, tiny_llama

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "launchers" / "train.py"
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"
STEPS = 9


def test_the_run_folder_holds_what_was_promised(world):
    run = world / "whole"
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(STEPS))
    fields = ["loss", "lr", "grad_norm", "tokens", "mfu", "peak_mem_mib", "data_wait_s"]
    for line in lines:
        assert all(math.isfinite(line[field]) for field in fields)
        assert line["pairs"] == 32
        assert line["texts"] == 32 * 4
        assert line["chunks"] > 2
        assert math.isclose(line["loss"], sum(line["loss_by_prefix"].values()), rel_tol=1e-6)
        assert math.isclose(line["tokens_per_s"], line["tokens"] / line["seconds"], rel_tol=1e-6)
        assert line["texts_cut"] > 0  # real answers are longer than 90 bytes
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    stored = Recipe.load(run / "recipe.yaml")
    assert stored.train.steps == STEPS
    assert stored.step.grad_reduction in ("step", "chunk")  # a resumed run sums in the same order
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-8", "step-9"]
    assert list((run / "tensorboard").glob("events*"))
    trained, start = (
        load_file(folder / "model.safetensors") for folder in (run / "model", world / "backbone")
    )
    moved = [n for n in trained if not torch.equal(trained[n], start.get(n, start[f"model.{n}"]))]
    assert len(moved) == len(trained)
    encoder = Encoder.from_pretrained(run / "model")
    assert encoder.matryoshka_dims == (32, 64)
    assert encoder.max_tokens == 90


def test_the_metrics_have_the_rate_that_each_step_was_taken_with(world):
    lines = read_metrics(world / "whole")
    train = Recipe.load(world / "whole" / "recipe.yaml").train
    pace = Pace.of(train, STEPS)
    want = [train.lr * learning_rate_factor(step, train=train, pace=pace) for step in range(STEPS)]
    assert [line["lr"] for line in lines] == pytest.approx(want)


@pytest.mark.slow
def test_a_run_prolonged_after_its_decay_goes_on_from_the_flat_part(world, tmp_path):
    """Half of 4 steps decay; the last checkpoint of the other half stays."""
    options = [
        "--recipe", str(world / "recipe.yaml"), "--set", "train.schedule=wsd",
        "--set", "train.decay_ratio=0.5", "--set", "train.warmup_ratio=0.25",
        "--set", "train.deepspeed=zero1", "--set", "data.workers=0",
        "--set", "train.save_every=2", "--set", "train.keep_last=1",
    ]  # fmt: skip
    run = tmp_path / "run"
    assert (
        run_alone(TRAIN, *options, "--set", f"output={run}", "--set", "train.steps=4").returncode
        == 0
    )
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["step-2", "step-4"]
    done = run_alone(TRAIN, *options, "--set", f"output={run}", "--set", "train.steps=8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step-2" in done.stderr
    rates = [line["lr"] / 3e-3 for line in read_metrics(run)]
    assert rates[:5] == [1, 1, 1, 1, 1]  # warmed up in one step, as when it was to have four
    assert rates[5] < 1
    for path in (run / "checkpoints").iterdir():
        if path.name != "step-8":
            shutil.rmtree(path)
    before = (run / "metrics.jsonl").read_bytes()
    longer = run_alone(TRAIN, *options, "--set", f"output={run}", "--set", "train.steps=16")
    refused(longer, "run of 8 steps", "16 steps", "another output")
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("what", ["step", pytest.param("evaluation", marks=pytest.mark.slow)])
def test_a_run_that_diverges_stops_before_it_writes(world, tmp_path, what):
    """Its last good checkpoint stays, whatever `keep_last` says, and so does the best model.

    Three steps in a row without a finite loss end it, a held-out loss that is none at once.
    """
    run = tmp_path / "run"
    command = [
        sys.executable, str(Path(__file__).parent / "workers" / "diverge.py"),
        str(world / "recipe.yaml"), what, "2", f"output={run}", "train.deepspeed=zero1",
        "data.workers=0", "train.save_every=2", "train.keep_last=1", "eval.every=1",
        f"eval.shards=[{world / 'held-out'}]",
    ]  # fmt: skip
    write_shards(islice(read_source(PAIRS), 160, 192), world / "held-out")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    saved, skipped, dumped = "step-2", [0, 0], []
    if what == "step":
        saved, skipped, dumped = "step-4", [0, 0, 1, 2], [2, 3, 4]
    at = f"step {len(skipped)} diverged"
    refused(done, at, "loss nan", f"{run / 'checkpoints' / saved};", "train.lr")
    assert [path.name for path in (run / "checkpoints").iterdir()] == [saved]
    assert not (run / "model").exists()
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [*range(len(skipped))]
    assert [line.get("skipped_steps", 0) for line in lines] == skipped
    assert json.loads((run / "best.json").read_text())["step"] <= 2
    paths = sorted(run.glob("bad-batch-*.json"))
    assert [path.name for path in paths] == [f"bad-batch-{step}.json" for step in dumped]
    for path in paths:
        (rank,) = json.loads(path.read_text())["ranks"]
        assert len(rank["records"]) == 32
        assert all({"record", "epoch", "query_id", "source"} == set(x) for x in rank["records"])


@pytest.mark.slow
def test_a_flipped_bit_means_an_older_checkpoint_and_chunks_may_be_smaller(world, tmp_path):
    """After a power cut, and after a device ran out of memory: neither ends a run for good."""
    run = tmp_path / "run"
    options = [
        "--recipe", str(world / "recipe.yaml"), "--set", f"output={run}",
        "--set", "train.deepspeed=zero1", "--set", "data.workers=0", "--set", "train.steps=3",
        "--set", "train.save_every=2",
    ]  # fmt: skip
    assert run_alone(TRAIN, *options).returncode == 0
    losses = [line["loss"] for line in read_metrics(run)]
    (shard,) = (run / "checkpoints" / "step-3" / "zero").glob("*optim_states.pt")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = run_alone(TRAIN, *options, "--set", "train.token_budget=512")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"step-3 is damaged and left alone: zero/{shard.name}" in done.stderr
    assert "resumed at step 2" in done.stderr
    np.testing.assert_allclose([line["loss"] for line in read_metrics(run)], losses, rtol=1e-5)


@pytest.mark.parametrize(
    "kind", ["model_states", pytest.param("optim_states", marks=pytest.mark.slow)]
)
def test_a_checkpoint_that_would_run_code_is_refused(world, tmp_path, kind):
    """Whoever writes it writes hashes that fit; only tensors are read of a pickle."""
    newest = tmp_path / "whole" / "checkpoints" / "step-9"
    shutil.copytree(world / "whole" / "checkpoints" / "step-9", newest)
    name = f"zero/zero_pp_rank_0_mp_rank_00_{kind}.pt"
    evil = newest / name
    torch.save({"module": _Evil(tmp_path / "evil")}, evil)
    state = json.loads((newest / "state.json").read_text())
    state["files"][name] = evil.stat().st_size
    state["sha256"][name] = hashlib.sha256(evil.read_bytes()).hexdigest()
    rest = json.dumps({k: x for k, x in state.items() if k != "digest"}, sort_keys=True)
    state["digest"] = hashlib.sha256(rest.encode()).hexdigest()
    (newest / "state.json").write_text(json.dumps(state))
    assert faults(newest) == []
    done = run_alone(
        TRAIN, "--recipe", str(world / "recipe.yaml"), "--resume", str(newest),
        "--set", f"output={tmp_path / 'run'}",
    )  # fmt: skip
    refused(done, name, "damaged or not a checkpoint")
    assert not (tmp_path / "evil").exists()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_other_inputs_under_the_same_paths_are_refused(world, tmp_path):
    """A finished run must not serve the old model as that of a new backbone or of new shards."""
    for name in ("backbone", "shards"):
        shutil.copytree(world / name, tmp_path / name)
    options = [
        "--recipe", str(world / "recipe.yaml"), "--set", f"output={tmp_path / 'run'}",
        "--set", f"model.path={tmp_path / 'backbone'}", "--set", "train.steps=2",
        "--set", f"data.shards=[{tmp_path / 'shards'}]", "--set", "train.deepspeed=zero1",
    ]  # fmt: skip
    assert run_alone(TRAIN, *options).returncode == 0
    tiny_llama(tmp_path / "backbone", seed=1)
    refused(run_alone(TRAIN, *options), "another backbone", "another output")
    shutil.copytree(world / "backbone", tmp_path / "backbone", dirs_exist_ok=True)
    write_shards(islice(read_source(PAIRS), 1, 161), tmp_path / "shards")
    refused(run_alone(TRAIN, *options), "another shards", "another output")


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_damaged_record_is_one_line_also_from_a_worker(world, tmp_path, workers):
    shutil.copytree(world / "shards", tmp_path / "shards")
    tar = tmp_path / "shards" / "train-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'{"query":', b'{"quer":x'))  # same size
    done = run_alone(TRAIN, 
        "--recipe", str(world / "recipe.yaml"), "--set", f"output={tmp_path / 'run'}",
        "--set", f"data.shards=[{tmp_path / 'shards'}]", "--set", f"data.workers={workers}",
    )  # fmt: skip
    refused(done, "train-000000.tar", "record", "byte", "drama shard")


def test_another_number_of_ranks_takes_the_same_step(world):
    """One rank goes on with ZeRO 3's shards of two, of the newest checkpoint that is whole."""
    run, whole = world / "moved", world / "whole"
    shutil.copytree(whole, run)
    (shard,) = (run / "checkpoints" / "step-9" / "zero").glob("*rank_1_mp*optim_states.pt")
    shard.write_bytes(shard.read_bytes()[:-1])
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(whole), str(run)))
    done = run_alone(TRAIN, "--recipe", str(recipe))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"step-9 is damaged and left alone: zero/{shard.name} cut" in done.stderr
    assert "step-8 was saved by 2 ranks and is dealt to 1" in done.stderr
    assert_same_last_step(run, whole)


def assert_same_last_step(run: Path, whole: Path) -> None:
    ours, theirs = (read_metrics(folder)[-1] for folder in (run, whole))
    assert ours["step"] == theirs["step"]
    assert ours["seconds"] != theirs["seconds"]  # it was taken anew
    for name in ("loss", "grad_norm", "lr", "temperature"):
        assert math.isclose(ours[name], theirs[name], rel_tol=1e-5), name
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (run, whole)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-6)


def test_a_run_begins_from_a_named_checkpoint_of_another(world, tmp_path):
    """Which stays as it is; started again, it goes on from its own."""
    whole, run = world / "whole", tmp_path / "branch"
    before = digests(whole)
    options = [
        "--recipe", str(world / "recipe.yaml"), "--set", f"output={run}", "--set", "name=branch",
        "--resume", str(whole / "checkpoints" / "step-8"),
    ]  # fmt: skip
    other = run_alone(TRAIN, *options, "--set", "train.lr=1.0")
    refused(other, "step-8 holds a run with train.lr = 0.003", "1.0")
    assert not run.exists()
    done = run_alone(TRAIN, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step 8" in done.stderr
    assert [line["step"] for line in read_metrics(run)] == [8]
    assert_same_last_step(run, whole)
    assert digests(whole) == before
    none = run_alone(TRAIN, *options[:-1], "none")
    refused(none, f"--resume none: {run} holds 1 checkpoints, the newest is step-9")


def test_one_process_gives_the_same_model_as_two_ranks(world):
    """Also when it was told to end in between, which it does with exit code 0."""
    run = world / "single"
    options = [
        "--recipe", str(world / "recipe.yaml"), "--set", f"output={run}",
        "--set", "train.deepspeed=zero1",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen([sys.executable, str(TRAIN), *options], env=environment)
    while not (run / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(120) == 0
    assert not (run / "model").exists()
    done = run_alone(TRAIN, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step" in done.stderr
    ours, whole = ([line["loss"] for line in read_metrics(r)] for r in (run, world / "whole"))
    np.testing.assert_allclose(ours, whole, rtol=1e-4)
    np.testing.assert_allclose(ours[0], whole[0], rtol=1e-6)
    texts = ["What is diabetes?", "An answer."]
    vectors = [
        Encoder.from_pretrained(r / "model").encode(texts, "query") for r in (run, world / "whole")
    ]
    np.testing.assert_allclose(*vectors, atol=2e-3)


def test_bfloat16_exports_the_float32_master_weights(world):
    run = world / "half"
    done = run_alone(TRAIN, 
        "--recipe", str(world / "recipe.yaml"), "--set", f"output={run}",
        "--set", "train.precision=bf16", "--set", "train.steps=3", "--set", "train.deepspeed=zero2",
        "--set", "model.freeze_embeddings=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    weights = load_file(run / "model" / "model.safetensors")
    start = load_file(world / "backbone" / "model.safetensors")
    # what is frozen is written as it came, not as bf16 has it
    assert torch.equal(weights["embed_tokens.weight"], start["model.embed_tokens.weight"])
    weight = weights["layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())
    half, whole = (read_metrics(r)[0]["loss"] for r in (run, world / "whole"))
    assert abs(half - whole) < 0.02 * whole


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one line that says what, where and how to mend."""
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [x for x in done.stderr.splitlines() if x.startswith("train: error:")]
    assert len(lines) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


def test_a_run_folder_of_another_recipe_is_refused_and_kept(world):
    before = (world / "whole" / "metrics.jsonl").read_bytes()
    done = run_alone(TRAIN, "--recipe", str(world / "recipe.yaml"), "--set", "train.lr=1.0")
    refused(done, "train.lr = 0.003", "1.0", "another output")
    longer = run_alone(TRAIN, "--recipe", str(world / "recipe.yaml"), "--set", "train.steps=90")
    refused(longer, "train.steps = 9", "90")  # a cosine has an end
    assert (world / "whole" / "metrics.jsonl").read_bytes() == before


def test_bad_input_ends_before_anything_is_written(world, tmp_path):
    output = tmp_path / "run"
    recipe = ["--recipe", str(world / "recipe.yaml"), "--set", f"output={output}"]
    refused(
        run_alone(TRAIN, "--recipe", str(tmp_path / "none.yaml")), "none.yaml", "does not exist"
    )
    refused(run_alone(TRAIN, *recipe, "--set", "train.bach_size=1"), "bach_size", "batch_size")
    refused(run_alone(TRAIN, *recipe, "--set", f"data.shards=[{tmp_path}]"), "manifest.json")
    refused(run_alone(TRAIN, *recipe, "--set", "loss.matryoshka_dims=[32,48]"), "48", "width 64")
    refused(run_alone(TRAIN, *recipe, "--set", "train.batch_size=800"), "160 records", "800")
    write_shards([Record("", (Document("a text"),))], tmp_path / "texts")
    words = ("texts: 1 of its 1 records are texts without a query", "launchers/recover.py")
    refused(run_alone(TRAIN, *recipe, "--set", f"data.shards=[{tmp_path / 'texts'}]"), *words)
    half = ["--set", "train.precision=bf16", "--set", "train.deepspeed=zero0"]
    refused(run_alone(TRAIN, *recipe, *half), "stage 0 in bf16", "zero1")
    assert not output.exists()
    held_out = ["--set", f"eval.shards=[{tmp_path / 'texts'}]"]  # read when the model is there
    refused(run_alone(TRAIN, *recipe, *held_out), *words)


def test_a_port_in_use_is_named(world, tmp_path):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = str(server.getsockname()[1])
        environment = os.environ | {
            "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(TRAIN), "--recipe", str(world / "recipe.yaml"),
             "--set", f"output={tmp_path / 'run'}"],
            capture_output=True, text=True, timeout=120, env=environment, check=False,
        )  # fmt: skip
    refused(done, f"port {port} is in use", "--master_port")


def test_the_deepspeed_launcher_passes_the_exit_code_on(tmp_path):
    done = run_deepspeed(TRAIN, "--recipe", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "does not exist" in done.stderr
