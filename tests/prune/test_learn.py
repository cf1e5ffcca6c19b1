"""Real runs of the launcher on a tiny model: ranks, ZeRO stages, resuming, what comes out."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from drama.killing import Job, deepspeed_command, steps_done
from drama.optimizer import Pace, learning_rate_factor
from drama.prune.alive import Alive, install, make_maskable
from drama.prune.lm import LanguageModel
from drama.prune.loss import lm_loss
from drama.prune.masks import Masks
from drama.prune.recipe import PruneRecipe
from drama.prune.shape import Shape, parse_target
from drama.prune.source import load_llm
from drama.prune.text import TextStream, open_domain
from drama.testing import byte_tokenizer, run_deepspeed, tiny_llama

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launchers" / "prune.py"
WORKER = ROOT / "tests" / "workers" / "prune_ranks.py"
BAD_MASKS = ROOT / "tests" / "workers" / "bad_masks.py"
TO = "layers=2,hidden=32,heads=2,kv_heads=2,ffn=48"
STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, two domains of text and a recipe."""
    folder = tmp_path_factory.mktemp("prune")
    tiny_llama(folder / "source", tie_word_embeddings=True)
    torch.manual_seed(0)
    other = Qwen3Config(
        vocab_size=260, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, head_dim=16, max_position_embeddings=2048,
        tie_word_embeddings=False, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(other).save_pretrained(folder / "qwen3")
    byte_tokenizer().save_pretrained(folder / "qwen3")
    (folder / "code.txt").write_text(
        "\n\n".join(f"def f{i}(x): return x * {i}" for i in range(400))
    )
    rows = [{"title": f"Nr. {i}", "text": f"Das ist der {i}. Satz."} for i in range(400)]
    (folder / "de.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {
        "name": "tiny",
        "output": str(folder / "run"),
        "model": {"path": str(folder / "source"), "to": TO},
        "data": {
            "domains": {"code": str(folder / "code.txt"), "de": [str(folder / "de.jsonl")]},
            "length": 32,
            "held_out_rows": 3,
            "update_every": 2,
            "clip_gaps": False,
        },
        "masks": {"ramp_ratio": 0.5, "warmup_ratio": 0.0, "lr": 2.0},
        "train": {
            "steps": STEPS, "batch_rows": 8, "rows_per_pass": 2, "lr": 1e-3, "warmup_ratio": 0.0,
            "precision": "fp32", "deepspeed": "zero0", "save_every": 2,
        },
        "eval": {"every": 3},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stages(world: Path) -> Path:
    """Every ZeRO stage on two ranks; ZeRO 3 with recomputed blocks and one pass a step, and in bf16
    with a Qwen3, untied, whose KV groups are cut."""
    out = world / "stages"
    out.mkdir()
    runs = [f"zero{stage}=train.deepspeed=zero{stage}" for stage in range(4)]
    runs += ["other=train.deepspeed=zero3;train.rows_per_pass=4;train.recompute_blocks=true"]
    runs += [
        f"bf16=train.deepspeed=zero3;train.precision=bf16;model.path={world / 'qwen3'};"
        "model.to=layers=2,hidden=48,heads=2,ffn=64"
    ]
    done = run_deepspeed(WORKER, str(world / "recipe.yaml"), str(out), *runs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def plain(world: Path, stages: Path) -> dict[str, Any]:
    """The same steps in one process: no engine, no ranks, torch's AdamW, the whole batch once."""
    recipe = PruneRecipe.load(world / "recipe.yaml")
    model, _ = load_llm(world / "source")
    source = Shape.of(model.config)
    masks = Masks(source, parse_target(TO, source), seed=0, device=torch.device("cpu"))
    make_maskable(model)
    text = TextStream(
        [
            open_domain(name, stages / "zero0" / "text" / f"{name}.bin", length=32, held_out=3,
                        seed=0)
            for name in ("code", "de")
        ], 0,
    )  # fmt: skip
    betas = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    weights = torch.optim.AdamW(model.parameters(), lr=1e-3, **betas)
    closing = torch.optim.AdamW(list(masks.log_alpha.values()), lr=2.0, **betas)
    holding = torch.optim.AdamW(masks.multipliers, lr=1.0, maximize=True, **betas)
    shares = {"code": 0.5, "de": 0.5}
    found: dict[str, Any] = {"loss": [], "grad_norm": []}
    loss_of = LanguageModel(model)
    for step in range(2):  # up to the first update of the domains' weights
        ids_RN, _ = text.batch(step, shares, 8)
        rates = [
            learning_rate_factor(step, train=part, pace=Pace.of(part, STEPS))
            for part in (recipe.train, recipe.masks, recipe.masks)
        ]
        for optimizer, rate, base in zip(
            (weights, closing, holding), rates, (1e-3, 2.0, 1.0), strict=True
        ):
            optimizer.param_groups[0]["lr"] = base * rate
            optimizer.zero_grad()
        alive = Alive(masks.sample(step), source)
        install(model, alive)
        loss = loss_of(ids_RN).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        alive.backward(alive.gradients(), masks.penalty(min(1.0, (step + 1) / 3)))
        for optimizer in (weights, closing, holding):
            optimizer.step()
        masks.clamp()
        found["loss"].append(loss.item())
        found["grad_norm"].append(norm.item())
    return found


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "other"])
def test_every_stage_learns_as_one_process_does(
    stages: Path, plain: dict[str, Any], name: str
) -> None:
    found = lines(stages / name)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([x[key] for x in found[:2]], plain[key], rtol=1e-5)
    whole = lines(stages / "zero0")
    assert len(found) == STEPS
    for key in ("loss", "penalty", "grad_norm"):
        a, b = ([line[key] for line in run] for run in (found, whole))
        np.testing.assert_allclose(a, b, rtol=2e-3, err_msg=key)
    masks = json.loads((stages / "masks.json").read_text())
    for key, x in masks["zero0"].items():
        np.testing.assert_allclose(masks[name][key], x, rtol=1e-2, atol=5e-2, err_msg=key)


def test_what_a_line_says(stages: Path) -> None:
    found = lines(stages / "zero3")
    assert found[0]["tokens"] == 8 * 32
    for kind, goal in {"layer": 1 / 3, "hidden": 0.5, "query_head": 0.5, "ffn": 0.5}.items():
        assert found[-1]["target_sparsity"][kind] == pytest.approx(goal)
        assert found[0]["target_sparsity"][kind] == pytest.approx(goal / 3)
    assert found[0]["alive"] > found[-1]["alive"] > 0
    assert sum(found[0]["rows_by_domain"].values()) == 8
    assert found[0]["domain_weights"] == {"code": 0.5, "de": 0.5}
    assert found[1]["domain_weights"] != found[0]["domain_weights"]
    assert found[2]["evaluation"].keys() == {"code", "de"}
    assert "evaluation" not in found[3]
    assert list((stages / "zero3" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("name", "family", "limit"),
    [("zero0", "source", 1e-4), ("zero3", "source", 1e-4), ("bf16", "qwen3", 3e-2)],
)
def test_the_written_model_is_the_masked_one(
    world: Path, stages: Path, name: str, family: str, limit: float
) -> None:
    """Loss of the exported folder on the held-out rows against that of the masked model."""
    folder = stages / name / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole, _ = load_llm(world / family)
    recipe = PruneRecipe.load(stages / name / "recipe.yaml")
    assert Shape.of(model.config) == parse_target(recipe.model.to, Shape.of(whole.config))
    assert AutoTokenizer.from_pretrained(folder)("x").input_ids
    facts = json.loads((folder / "pruning.json").read_text())
    for domain, masked in facts["loss_after"].items():
        text = stages / name / "text" / f"{domain}.bin"
        rows = open_domain(domain, text, length=32, held_out=3, seed=0).held_out_rows
        assert lm_loss(model, rows) == pytest.approx(masked, abs=limit)
        assert facts["loss_before"][domain] == pytest.approx(lm_loss(whole, rows), abs=limit)
    assert facts["expected_sparsity"].keys() == facts["kept_at_zero"].keys()
    assert ("kv_group" in facts["kept_at_zero"]) == (family == "qwen3")


def start(world: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(LAUNCHER), "--recipe", str(world / "recipe.yaml"),
               "--set", f"output={out}"]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def test_a_killed_run_goes_on_to_the_last_bit(world: Path, tmp_path: Path) -> None:
    assert start(world, tmp_path / "whole").wait(300) == 0
    run = start(world, tmp_path / "killed")
    deadline = time.time() + 300
    while not (tmp_path / "killed" / "checkpoints" / "step-2").exists():
        assert time.time() < deadline
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert start(world, tmp_path / "killed").wait(300) == 0
    whole, resumed = lines(tmp_path / "whole"), lines(tmp_path / "killed")
    clock = {"seconds", "seconds_by_phase", "tokens_per_s", "peak_mem_mib"}
    assert [{k: x for k, x in line.items() if k not in clock} for line in resumed] == [
        {k: x for k, x in line.items() if k not in clock} for line in whole
    ]
    a, b = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_step_whose_masks_have_no_gradient_leaves_no_residue(
    world: Path, tmp_path: Path, stage: str
) -> None:
    """Weights, masks, multipliers and their moments equal those of a run that left it out."""
    settings = (f"train.deepspeed={stage}", "masks.lr=0.1")
    done = run_deepspeed(BAD_MASKS, str(world / "recipe.yaml"), str(tmp_path), *settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bad"] == "nan"
    assert len(found["same"]) > 40
    assert [name for name, same in found["same"].items() if not same] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_one_of_two_ranks_is_killed(world: Path, tmp_path: Path, stage: str) -> None:
    """Two ranks go on to the last bit, one alone to the same losses."""

    def command(run: str, num_ranks: int) -> list[str]:
        options = ("--set", f"output={tmp_path / run}", "--set", f"train.deepspeed={stage}")
        return deepspeed_command(
            LAUNCHER, "--recipe", str(world / "recipe.yaml"), *options, num_ranks=num_ranks
        )

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
    clock = {"seconds", "seconds_by_phase", "tokens_per_s", "peak_mem_mib"}
    whole, again = (
        [{k: x for k, x in line.items() if k not in clock} for line in lines(tmp_path / run)]
        for run in ("whole", "killed")
    )
    assert again == whole
    a, b = (tmp_path / run / "model" / "model.safetensors" for run in ("whole", "killed"))
    assert a.read_bytes() == b.read_bytes()
    moved = lines(tmp_path / "moved")
    assert [x["rows_by_domain"] for x in moved] == [x["rows_by_domain"] for x in whole]
    for key in ("loss", "penalty", "grad_norm"):
        ours, theirs = ([x[key] for x in found] for found in (moved, whole))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.batch_rows=9"], ["train.batch_rows 9", "1 ranks", "8"]),
        (["model.to=hidden=128"], ["hidden=128", "source's 64"]),
        (["model.to=layers=3"], ["source's own shape"]),
        (["data.domains.fr=no.txt"], ["data.domains.fr", "no.txt is no file"]),
        (["data.lenght=5"], ["data.lenght", "did you mean 'length'"]),
        (["data.length=20000"], ["data.domains.code", "too short"]),
        (["model.path=nothing"], ["nothing", "no such model folder"]),
        (["train.precision=bf16"], ["bf16", "zero1"]),
    ],
)
def test_bad_input_ends_with_one_line(
    world: Path, tmp_path: Path, settings: list[str], words: list[str]
) -> None:
    options = [x for setting in (*settings, f"output={tmp_path}") for x in ("--set", setting)]
    command = [sys.executable, str(LAUNCHER), "--recipe", str(world / "recipe.yaml"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("prune: error: ")
    for word in words:
        assert word in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()


def test_a_full_disk_is_one_line_and_what_was_saved_stays(world: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 300 kB: text and metrics fit, a checkpoint does not."""
    out = tmp_path / "run"
    command = [sys.executable, str(LAUNCHER), "--recipe", str(world / "recipe.yaml"),
               "--set", f"output={out}", "--set", "train.deepspeed=zero1"]  # fmt: skip

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, preexec_fn=limit
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("prune: error: ")
    assert "step-2" in last
    assert len(lines(out)) == 2
    assert not list((out / "checkpoints").glob("step-*"))
    assert not (out / "model").exists()
