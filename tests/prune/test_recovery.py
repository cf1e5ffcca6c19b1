from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from drama.data.records import Document, Record
from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.sources import Source
from drama.data.stream import ShardSet
from drama.data.writer import write_shards
from drama.distributed import Ranks
from drama.encoder import Encoder
from drama.killing import Job, deepspeed_command, steps_done
from drama.prune.output import REPORT_NAME, write_model
from drama.prune.recovery_data import Texts, _spread
from drama.prune.recovery_recipe import RecoveryRecipe
from drama.prune.run import prune
from drama.testing import byte_tokenizer, read_metrics, run_alone, run_deepspeed, tiny_llama
from drama.tokenizer import TextEncoder, load_tokenizer

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launchers" / "recover.py"
WORKER = ROOT / "tests" / "workers" / "recover_ranks.py"
STEPS = 6
CLOCK = {"seconds", "seconds_by_phase", "tokens_per_s", "peak_mem_mib", "mfu", "data_wait_s"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny parent, what was cut from it, texts of two sources, and a recipe."""
    folder = tmp_path_factory.mktemp("recovery")
    tiny_llama(folder / "parent", tie_word_embeddings=True)
    code = [f"def f{i}(x): return x * {i}" * (1 + i % 5) for i in range(200)]
    (folder / "code.txt").write_text("\n\n".join(code))
    rows = [{"title": f"Nr. {i}", "text": f"Das ist der {i}. Satz."} for i in range(200)]
    (folder / "de.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for name, picked in (("shards", slice(40, None)), ("held", slice(40))):
        parts = folder / name
        (folder / f"{name}.txt").write_text("\n\n".join(code[picked]))
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in rows[picked]))
        sources = [f"code={folder / name}.txt", f"de={folder / name}.jsonl"]
        shard_sources([Source.parse(x) for x in sources], parts, ShardingOptions())
    shard_sources(
        [Source.parse(f"code={folder / 'code.txt'}")], folder / "only-code", ShardingOptions()
    )
    tiny_llama(folder / "both", is_causal=False)
    tokens = tiny_llama(folder / "other") / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"a":', '"aa":'))
    prune(
        folder / "parent", "layers=2,hidden=32,heads=2,ffn=48", folder / "code.txt",
        folder / "cut", calibration_tokens=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    other = Qwen3Config(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, head_dim=8, max_position_embeddings=512,
        tie_word_embeddings=False, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    write_model(AutoModelForCausalLM.from_config(other), byte_tokenizer(), {}, folder / "qwen3")
    recipe = {
        "name": "tiny",
        "output": str(folder / "run"),
        "model": {"path": str(folder / "cut"), "parent": str(folder / "parent")},
        "data": {"shards": [str(folder / "shards")], "length": 48, "lanes": 8, "workers": 0},
        "loss": {"lm": 0.8, "kl": 0.5, "hidden": 0.3, "temperature": 2.0},
        "train": {
            "batch_texts": 16, "steps": STEPS, "lr": 3e-3, "token_budget": 128,
            "precision": "fp32", "deepspeed": "zero0", "save_every": 2, "warmup_ratio": 0.0,
            "schedule": "constant",
        },
        "eval": {"every": 3, "shards": [str(folder / "held")], "max_texts": 20},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def stages(world: Path) -> Path:
    """Every ZeRO stage on two ranks, both ways to reduce, recomputed blocks; a Qwen3 in bf16."""
    out = world / "stages"
    out.mkdir()
    runs = [f"zero{stage}=train.deepspeed=zero{stage}" for stage in range(4)]
    runs += [
        f"chunk{stage}=train.deepspeed=zero{stage};step.grad_reduction=chunk" for stage in (2, 3)
    ]
    runs += ["recomputed=train.deepspeed=zero1;step.recompute_blocks=true;train.token_budget=512"]
    other = f"train.deepspeed=zero3;train.precision=bf16;model.path={world / 'qwen3'}"
    # three held-out texts for two ranks
    runs += [f"bf16={other};eval.max_texts=3"] * 2
    done = run_deepspeed(WORKER, str(world / "recipe.yaml"), str(out), *runs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def plain(world: Path) -> dict[str, list[float]]:
    """The same steps without any of it: text by text through transformers, logits whole, torch's
    AdamW, one process."""
    recipe = RecoveryRecipe.load(world / "recipe.yaml")
    texts = Texts(
        recipe, TextEncoder(load_tokenizer(world / "cut")), Ranks(0, 1, torch.device("cpu"))
    )
    student, parent = (
        AutoModelForCausalLM.from_pretrained(world / name) for name in ("cut", "parent")
    )
    plan = json.loads((world / "cut" / REPORT_NAME).read_text())["plan"]
    mapping = torch.zeros(64, 32)
    mapping[plan["hidden"], torch.arange(32)] = 1
    mapping.requires_grad_()
    weights = [*student.parameters(), mapping]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    # a block's output against what the parent's next kept block reads
    blocks = [(1, plan["layers"][1]), (2, 3)]
    found: dict[str, list[float]] = {"loss": [], "lm": [], "kl": [], "hidden": [], "grad_norm": []}
    for step in range(3):
        batch = texts.batches[step]
        sums = dict.fromkeys(("lm", "kl", "hidden"), torch.zeros(()))
        count = 0
        for row in batch.rows:
            ids = torch.from_numpy(row).long()[None]
            ours = states(student, ids)
            with torch.no_grad():
                theirs = states(parent, ids)
            z, y = ours[-1][:-1], theirs[-1][:-1]
            p, q = (F.log_softmax(x / 2.0, -1) for x in (y, z))
            apart = [
                1 - F.cosine_similarity(ours[a][:-1] @ mapping.T, theirs[b][:-1])
                for a, b in blocks
            ]  # fmt: skip
            sums["lm"] = sums["lm"] + F.cross_entropy(z, ids[0, 1:], reduction="sum")
            sums["kl"] = sums["kl"] + 4.0 * (p.exp() * (p - q)).sum()
            sums["hidden"] = sums["hidden"] + torch.stack(apart).mean(0).sum()
            count += len(row) - 1
        loss = (0.8 * sums["lm"] + 0.5 * sums["kl"] + 0.3 * sums["hidden"]) / count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        for name, x in sums.items():
            found[name].append(x.item() / count)
        found["loss"].append(loss.item())
        found["grad_norm"].append(norm.item())
    return found


def states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Embedding and every block's output, not normed, then the logits; [N, ...] each."""
    found = [model.model.embed_tokens(ids)[0]]
    handles = [
        layer.register_forward_hook(lambda _, __, output: found.append(output[0]))
        for layer in model.model.layers
    ]
    logits = model(input_ids=ids).logits[0]
    for handle in handles:
        handle.remove()
    return [*found, logits]


@pytest.mark.parametrize(
    "name", ["zero0", "zero1", "zero2", "zero3", "chunk2", "chunk3", "recomputed"]
)
def test_every_stage_learns_as_one_process_does(
    stages: Path, plain: dict[str, list[float]], name: str
) -> None:
    found = read_metrics(stages / name)
    assert len(found) == STEPS
    for key, values in plain.items():
        np.testing.assert_allclose(
            [x[key] for x in found[:3]], values, rtol=2e-5, atol=1e-6, err_msg=key
        )
    whole = read_metrics(stages / "zero0")
    for key in ("loss", "lm", "kl", "hidden", "grad_norm"):
        a, b = ([line[key] for line in run] for run in (found, whole))
        np.testing.assert_allclose(a, b, rtol=1e-4, err_msg=key)


def held_out_loss(folder: Path, world: Path, max_texts: int = 20) -> float:
    """Of the held-out texts that a run judges by, text by text through transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    recipe = RecoveryRecipe.load(world / "recipe.yaml", [f"eval.max_texts={max_texts}"])
    encoder = TextEncoder(load_tokenizer(folder))
    texts = Texts(recipe, encoder, Ranks(0, 1, torch.device("cpu")))
    total = count = 0.0
    assert texts.held_out is not None
    for row in texts.held_out.rows:
        ids = torch.from_numpy(row).long()[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(row) - 1
    return total / count


@pytest.mark.parametrize(("name", "limit"), [("zero0", 1e-5), ("zero3", 1e-5), ("bf16", 3e-2)])
def test_the_written_model_is_the_trained_one(
    world: Path, stages: Path, name: str, limit: float
) -> None:
    folder, texts = stages / name / "model", 3 if name == "bf16" else 20
    last = read_metrics(stages / name)[-1]["evaluation"]
    assert held_out_loss(folder, world, texts) == pytest.approx(last["loss"], rel=limit)
    assert last["perplexity"] == pytest.approx(np.exp(last["loss"]))
    assert last.keys() == {"loss", "loss code", "loss de", "perplexity"}
    (facts,) = json.loads((folder / REPORT_NAME).read_text())["recoveries"]
    assert facts["losses_after"]["loss"] == last["loss"]
    before = facts["losses_before"]
    source = world / ("qwen3" if name == "bf16" else "cut")
    assert before["student"]["loss"] == pytest.approx(
        held_out_loss(source, world, texts), rel=limit
    )
    parent = held_out_loss(world / "parent", world, texts)
    assert before["parent"]["loss"] == pytest.approx(parent, rel=limit)
    assert last["loss"] < before["student"]["loss"]
    assert AutoTokenizer.from_pretrained(folder)("x").input_ids
    assert list((stages / name / "tensorboard").iterdir())
    at_step = stages / name / "checkpoints" / f"step-{STEPS}" / "model"
    assert (at_step / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_what_a_line_says(stages: Path) -> None:
    first, *_ = read_metrics(stages / "zero3")
    parts = 0.8 * first["lm"] + 0.5 * first["kl"] + 0.3 * first["hidden"]
    assert first["loss"] == pytest.approx(parts)
    assert first["texts"] == 16
    assert sum(first["tokens_by_source"].values()) == first["tokens"] - 16
    assert first["chunks"] > 1
    assert 0 < first["padding_avoided"] < 1
    assert "evaluation" not in first


def test_two_ranks_go_on_from_a_checkpoint(stages: Path) -> None:
    """The Qwen3 in bf16 took its last steps twice, the second time from the checkpoint before."""
    found = read_metrics(stages / "bf16")
    assert [line["step"] for line in found] == list(range(STEPS))
    assert (stages / "bf16" / "checkpoints" / f"step-{STEPS}").is_dir()


def start(world: Path, out: Path, *settings: str) -> subprocess.Popen[bytes]:
    options = [x for s in (f"output={out}", *settings) for x in ("--set", s)]
    command = [sys.executable, str(LAUNCHER), "--recipe", str(world / "recipe.yaml"), *options]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )


def test_a_killed_run_goes_on_to_the_last_bit(world: Path, tmp_path: Path) -> None:
    """With workers that read ahead, and sources whose weights follow their losses."""
    settings = ("data.update_every=1", "data.workers=1", "data.clip_gaps=false")
    assert start(world, tmp_path / "whole", *settings).wait(300) == 0
    run = start(world, tmp_path / "killed", *settings)
    deadline = time.time() + 300
    while not (tmp_path / "killed" / "checkpoints" / "step-2").exists():
        assert time.time() < deadline
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert start(world, tmp_path / "killed", *settings).wait(300) == 0
    whole, resumed = (
        [{k: x for k, x in line.items() if k not in CLOCK} for line in read_metrics(run)]
        for run in (tmp_path / "whole", tmp_path / "killed")
    )
    assert resumed == whole
    a, b = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed"))
    assert a.read_bytes() == b.read_bytes()
    weights = [line["source_weights"]["de"] for line in whole]
    assert weights[0] == pytest.approx(0.5)
    assert len(set(weights)) == STEPS, "the weights did not follow the losses"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_one_of_two_ranks_is_killed(world: Path, tmp_path: Path, stage: str) -> None:
    """Two ranks go on to the last bit, one alone to the same losses."""

    def command(run: str, num_ranks: int) -> list[str]:
        options = ("--set", f"output={tmp_path / run}", "--set", f"train.deepspeed={stage}")
        return deepspeed_command(
            LAUNCHER, "--recipe", str(world / "recipe.yaml"), *options,
            "--set", "step.grad_reduction=step", num_ranks=num_ranks,
        )  # fmt: skip

    def to_the_end(run: str, num_ranks: int) -> str:
        with Job(command(run, num_ranks), tmp_path / "log") as job:
            assert job.ended() == 0, job.said()
            return job.said(10**6)

    to_the_end("whole", 2)
    for run, killed in (("killed", 1), ("moved", 0)):
        with Job(command(run, 2), tmp_path / "log") as job:
            job.kill_at(lambda run=run: steps_done(tmp_path / run) >= 3, killed)
    to_the_end("killed", 2)
    assert "saved by 2 ranks and is dealt to 1" in to_the_end("moved", 1)
    whole, again, moved = (read_metrics(tmp_path / run) for run in ("whole", "killed", "moved"))
    assert [{k: x for k, x in line.items() if k not in CLOCK} for line in again] == [
        {k: x for k, x in line.items() if k not in CLOCK} for line in whole
    ]
    a, b = (tmp_path / run / "model" / "model.safetensors" for run in ("whole", "killed"))
    assert a.read_bytes() == b.read_bytes()
    assert [x["tokens_by_source"] for x in moved] == [x["tokens_by_source"] for x in whole]
    for key in ("loss", "lm", "kl", "hidden", "grad_norm"):
        ours, theirs = ([x[key] for x in found] for found in (moved, whole))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=key)


def test_held_out_texts_may_come_later(world: Path, tmp_path: Path) -> None:
    """A run that was begun without them is judged from then on; other ones drop what was said."""
    run = ("train.steps=4", "train.schedule=constant", "loss.hidden=0")
    assert start(world, tmp_path / "run", *run, "eval.shards=[]").wait(300) == 0
    assert "evaluation" not in read_metrics(tmp_path / "run")[-1]
    assert start(world, tmp_path / "run", *run, "train.steps=5").wait(300) == 0
    found = read_metrics(tmp_path / "run")
    assert [line["step"] for line in found] == list(range(5))
    assert found[-1]["evaluation"]["loss"] > 0
    report = json.loads((tmp_path / "run" / "model" / REPORT_NAME).read_text())
    assert report["recoveries"][0]["losses_before"].keys() == {"parent"}


def test_sources_may_not_change_where_weights_follow_them(world: Path, tmp_path: Path) -> None:
    settings = ("data.update_every=1", "train.schedule=constant", "loss.hidden=0")
    only = f"data.shards=[{world / 'only-code'}]"
    assert start(world, tmp_path, *settings, only, "train.steps=2").wait(300) == 0
    options = [x for s in (*settings, f"output={tmp_path}", "train.steps=3") for x in ("--set", s)]
    done = run_alone(LAUNCHER, "--recipe", str(world / "recipe.yaml"), *options)
    assert done.returncode == 2
    assert "this run's sources were code, now they are code, de" in done.stderr


def test_a_rare_source_is_held_out_too(tmp_path: Path) -> None:
    records = [Record("", (Document(f"text {i}"),), source="a") for i in range(400)]
    records += [Record("", (Document(f"rare {i}"),), source="b") for i in range(2)]
    write_shards(records, tmp_path)
    shards = ShardSet([tmp_path])
    found = _spread(shards, 16)
    counts = np.bincount(shards.source_numbers(found)).tolist()
    assert counts == [16, 2]
    assert np.diff(found[:16]).max() <= 26


def test_masked_tokens_make_a_backbone_that_sees_both_sides(world: Path, tmp_path: Path) -> None:
    settings = ["model.parent=null", "loss.objective=mntp", "loss.kl=0", "loss.hidden=0"]
    assert start(world, tmp_path / "run", *settings).wait(300) == 0
    found = read_metrics(tmp_path / "run")
    predicted = sum(sum(line["tokens_by_source"].values()) for line in found)
    assert 0.1 < predicted / sum(line["tokens"] for line in found) < 0.3
    folder = tmp_path / "run" / "model"
    config = json.loads((folder / "config.json").read_text())
    assert (config["is_causal"], config["use_bidirectional_attention"]) == (False, True)
    Encoder.from_pretrained(folder)  # its probe runs both forwards
    ids = torch.arange(5, 15)[None]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        one, other = (
            model.model(torch.cat([ids[:, :9], x], 1)).last_hidden_state[0, 0]
            for x in (torch.tensor([[20]]), torch.tensor([[30]]))
        )
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.path=nothing"], ["nothing", "no such model folder"]),
        (["model.parent={both}"], ["sees both sides", "is_causal"]),
        (["data.shards=[nothing]"], ["nothing is no folder of shards"]),
        (["data.length=4096", "train.token_budget=4096"], ["data.length 4096", "2048"]),
        (["eval.shards=[{shards}]"], ["is trained on"]),
        (["model.parent={other}"], ["model.parent", "no token"]),
        (["data.lanes=1", "train.precision=bf16"], ["bf16", "zero1"]),
        (["data.update_every=1", "data.shards=[{held}]", "eval.shards=[{only-code}]"],
         ["source de has no held-out texts", "code"]),
        (["output={parent}/run"], ["overlaps the source model"]),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_line(
    world: Path, tmp_path: Path, settings: list[str], words: list[str]
) -> None:
    names = ("shards", "held", "only-code", "other", "parent", "both")
    places = {name: world / name for name in names}
    settings = [f"output={tmp_path}", *(s.format(**places) for s in settings)]
    options = [x for setting in settings for x in ("--set", setting)]
    done = run_alone(LAUNCHER, "--recipe", str(world / "recipe.yaml"), *options)
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("recover: error: ")
    for word in words:
        assert word in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()
