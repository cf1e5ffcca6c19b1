"""Options of a run, judged and resumed: real ranks, real shards, a BEIR folder."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from drama.average import average_checkpoints
from drama.data.packing import pack
from drama.data.sources import read_source
from drama.data.writer import write_shards
from drama.encoder import Encoder
from drama.errors import UserError
from drama.kernels.infonce_reference import infonce_reference
from drama.retrieve.evaluate import evaluate
from drama.settings import DS_CONFIGS
from drama.teach import write_teacher_vectors
from drama.testing import run_deepspeed
from drama.validation import better

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "launchers" / "train.py"
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, str(TRAIN), *arguments],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip


def records_with_scores():
    """Hard negatives from the next records, and a teacher's scores for all but every third."""
    records = list(islice(read_source(PAIRS), 160))
    for number, record in enumerate(records):
        negatives = tuple(records[(number + k) % 160].positives[0] for k in (1, 2))
        documents = (*record.positives, *negatives)
        scores = {d.id: float(len(d.text) % 7) for d in documents} if number % 3 else None
        yield replace(record, negatives=negatives, scores=scores)


def small_beir(folder: Path) -> Path:
    """Questions of the pairs against their answers."""
    (folder / "qrels").mkdir(parents=True)
    pairs = list(islice(read_source(PAIRS), 200, 241))
    lines = {
        "corpus.jsonl": [
            {"_id": f"d{i}", "text": p.positives[0].full_text} for i, p in enumerate(pairs)
        ],
        "queries.jsonl": [{"_id": f"q{i}", "text": p.query} for i, p in enumerate(pairs)],
    }
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    qrels = "".join(f"q{i}\td{i}\t1\n" for i in range(0, 41, 2))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


@pytest.fixture(scope="module")
def options(world, tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder, and a run's options: everything at once."""
    folder = tmp_path_factory.mktemp("options")
    write_shards(records_with_scores(), folder / "shards")
    write_shards(
        (  # one positive and nothing to draw, so that the test knows what is encoded
            replace(r, negatives=(), positives=r.positives[:1])
            for r in islice(read_source(PAIRS), 160, 199)
        ),
        folder / "held-out",
    )
    small_beir(folder / "beir")
    write_teacher_vectors([folder / "shards"], world / "backbone", folder / "t")
    settings = {
        "data.shards": f"[{folder / 'shards'}]",
        "data.max_query_tokens": "90",  # where `drama evaluate` cuts queries: at the model's length
        "model.freeze_embeddings": "true",
        "loss.learn_temperature": "true",
        "loss.own_negatives": "true",
        "loss.symmetric": "true",
        "loss.scores_weight": "0.5",
        "loss.spread_weight": "0.1",
        "loss.teacher": folder / "t",
        "train.schedule": "wsd",
        "train.keep_last": "3",
        "train.steps": "8",
        "eval.every": "3",
        "eval.shards": f"[{folder / 'held-out'}]",
        "eval.beir": f"[{folder / 'beir'}]",
    }
    pairs = [["--set", f"{key}={value}"] for key, value in settings.items()]
    return folder, ["--recipe", str(world / "recipe.yaml"), *(x for pair in pairs for x in pair)]


@pytest.fixture(scope="module")
def whole(options) -> Path:
    """The run on two ranks under ZeRO 3 that was never stopped."""
    folder, arguments = options
    done = run_deepspeed(TRAIN, *arguments, "--set", f"output={folder / 'whole'}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "whole"


def test_every_option_shows_in_the_metrics(world, whole):
    lines = metrics(whole)
    for line in lines:
        assert set(line["loss_terms"]) == {
            "scores",
            "spread_queries",
            "spread_documents",
            "teacher",
        }
        assert all(value > 0 for value in line["loss_terms"].values())
        total = sum(line["loss_by_prefix"].values()) + sum(line["loss_terms"].values())
        assert line["loss"] == pytest.approx(total)
        assert 0 < line["padding_avoided"] < 1
        assert set(line["seconds_by_phase"]) >= {
            "data",
            "embed",
            "loss",
            "replay",
            "reduce",
            "step",
        }
    temperatures = [line["temperature"] for line in lines]
    assert len(set(temperatures)) == len(temperatures)
    assert temperatures[0] != 0.1
    assert lines[-1]["loss"] < lines[0]["loss"]
    trained = load_file(whole / "model" / "model.safetensors")
    start = load_file(world / "backbone" / "model.safetensors")
    for name, weight in trained.items():
        frozen = torch.equal(weight, start[f"model.{name}"])
        assert frozen == (name == "embed_tokens.weight"), name


@pytest.mark.slow
def test_one_rank_learns_what_two_learn(options, whole):
    folder, arguments = options
    one = ["--set", f"output={folder / 'one'}", "--set", "train.deepspeed=zero1"]
    done = alone(*arguments, *one, "--set", "data.workers=0")
    assert done.returncode == 0, done.stderr[-3000:]
    for key in ("loss", "temperature", "grad_norm"):
        ours, theirs = ([line[key] for line in metrics(r)] for r in (folder / "one", whole))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, err_msg=key)
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, err_msg=key)


def test_held_out_figures_are_those_of_the_exported_model(options, whole):
    """nDCG by `drama evaluate`, after the last step and at the best."""
    folder, _ = options
    figures = [line["evaluation"] for line in metrics(whole) if "evaluation" in line]
    steps = [line["step"] + 1 for line in metrics(whole) if "evaluation" in line]
    assert steps == [3, 6, 8]
    assert set(figures[-1]) == {"loss", "ndcg@10 beir", "ndcg@10"}
    system = evaluate(folder / "beir", {"ours": whole / "model"}, max_tokens=90).systems["ours"]
    assert figures[-1]["ndcg@10"] == pytest.approx(system.metrics["nDCG@10"], abs=1e-6)
    best = max(figures, key=lambda x: x["ndcg@10"])
    stored = json.loads((whole / "best.json").read_text())
    assert stored["ndcg@10"] == best["ndcg@10"]
    again = evaluate(folder / "beir", {"ours": whole / "best"}, max_tokens=90).systems["ours"]
    assert again.metrics["nDCG@10"] == pytest.approx(best["ndcg@10"], abs=1e-6)


def test_the_held_out_loss_is_the_references(options, whole):
    """39 records in batches of 32, as in training; contrastive only."""
    lines = metrics(whole)
    encoder, total = Encoder.from_pretrained(whole / "model"), 0.0
    records = list(islice(read_source(PAIRS), 160, 199))
    for batch in (records[:32], records[32:]):
        queries = encoder.tokenize([r.query for r in batch], "query", 90)
        texts = [r.positives[0].full_text for r in batch]
        documents = encoder.tokenize(texts, "document", 90)
        with torch.no_grad():
            q_BD, k_ND = (encoder(pack(rows)).double() for rows in (queries, documents))
        loss = infonce_reference(
            q_BD, k_ND, torch.arange(len(batch)), temperature=lines[-1]["temperature"],
            prefixes=[32, 64], symmetric=True,
            k_ids_N=torch.tensor([texts.index(text) for text in texts]),
        ).loss  # fmt: skip
        total += loss.item() * len(batch)
    assert lines[-1]["evaluation"]["loss"] == pytest.approx(total / 39, rel=1e-5)


def test_a_run_goes_on_with_its_temperature_and_its_best(options, whole):
    """Cut after the checkpoint of step 4; the rest equals the whole run to the last bit."""
    folder, arguments = options
    run = folder / "cut"
    shutil.copytree(whole, run)
    stored = run / "recipe.yaml"
    stored.write_text(stored.read_text().replace(str(whole), str(run)))
    for gone in ("checkpoints/step-8", "model"):
        shutil.rmtree(run / gone)
    done = run_deepspeed(TRAIN, *arguments, "--set", f"output={run}")
    assert "resumed at step 4" in done.stdout + done.stderr
    for key in ("loss", "temperature"):
        assert [x[key] for x in metrics(run)] == [x[key] for x in metrics(whole)]
    evaluations = [[x.get("evaluation") for x in metrics(r)] for r in (run, whole)]
    assert evaluations[0] == evaluations[1]
    assert (run / "best.json").read_text() == (whole / "best.json").read_text()


def test_the_mean_of_checkpoints(whole, tmp_path):
    assert average_checkpoints(whole, 2, tmp_path / "mean") == [4, 8]
    parts = [
        load_file(whole / "checkpoints" / f"step-{step}" / "model" / "model.safetensors")
        for step in (4, 8)
    ]
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    for name, weight in mean.items():
        want = (parts[0][name].double() + parts[1][name].double()) / 2
        torch.testing.assert_close(weight.double(), want, rtol=1e-7, atol=1e-9)
    Encoder.from_pretrained(tmp_path / "mean")
    with pytest.raises(UserError, match="holds 2 whole checkpoints, 3 are asked for"):
        average_checkpoints(whole, 3, tmp_path / "more")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("eval.split=dev", ("no split dev", "test")),
        ("loss.margin=0.1", ("loss.margin", "loss.symmetric")),
        ("loss.teacher=nowhere", ("drama teach",)),
        ("eval.beir=[{0}/beir, {0}/other/../beir]", ("two folders are called beir", "rename")),
    ],
)
def test_what_does_not_fit_is_one_line(options, setting, words, tmp_path):
    folder, arguments = options
    (folder / "other").mkdir(exist_ok=True)
    setting = setting.format(folder)
    done = alone(*arguments, "--set", f"output={tmp_path / 'run'}", "--set", setting)
    assert done.returncode == 2
    lines = [x for x in done.stderr.splitlines() if x.startswith("train: error:")]
    assert len(lines) == 1, done.stderr[-2000:]
    for word in words:
        assert word in lines[0]


def test_deepspeeds_monitors_get_what_the_metrics_say(world, tmp_path):
    """By its CSV monitor; W&B and Comet are fed by the same call. TensorBoard is as the JSON says,
    and a term of the loss that finds nothing to do is said."""
    config = json.loads((DS_CONFIGS / "zero1.json").read_text())
    config["csv_monitor"] = {"enabled": True, "output_path": f"{tmp_path}/csv", "job_name": "job"}
    config["tensorboard"] = {"enabled": False}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    done = alone(
        "--recipe", str(world / "recipe.yaml"), "--set", f"output={tmp_path / 'run'}",
        "--set", f"train.deepspeed={tmp_path / 'mine.json'}", "--set", "train.steps=2",
        "--set", "loss.scores_weight=0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    tables = {path.stem.removeprefix("train_"): path for path in (tmp_path / "csv").rglob("*.csv")}
    for name in ("loss", "lr", "temperature"):
        rows = tables[name].read_text().splitlines()[1:]
        values = [float(row.split(",")[1]) for row in rows]
        assert values == pytest.approx([line[name] for line in metrics(tmp_path / "run")])
    assert {"loss_32", "loss_64", "seconds_data", "seconds_embed"} <= set(tables)
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert "loss.scores_weight is set, but no query of the first batch" in done.stderr


def test_training_shards_are_no_held_out_ones_under_whatever_name(options, tmp_path):
    folder, arguments = options
    shutil.copytree(folder / "shards", tmp_path / "copy")
    shards = f"eval.shards=[{folder / 'held-out'}, {tmp_path / 'copy'}]"
    done = alone(*arguments, "--set", f"output={tmp_path / 'run'}", "--set", shards)
    assert done.returncode == 2
    assert "copy is trained on" in done.stderr
    assert "loss.scores_weight is set" not in done.stderr


def test_better_is_more_ndcg_or_less_loss():
    assert better({"loss": 1.0}, None)
    assert better({"loss": 1.0}, {"loss": 1.1, "step": 3})
    assert not better({"loss": 1.1}, {"loss": 1.1, "step": 3})
    assert better({"loss": 2.0, "ndcg@10": 0.5}, {"loss": 1.0, "ndcg@10": 0.4, "step": 3})


def test_what_is_no_number_is_never_the_best():
    assert not better({"loss": math.nan}, None)
    assert not better({"loss": math.nan}, {"loss": 1.0})
    assert better({"loss": 1.0}, {"loss": math.nan})
    assert better({"ndcg@10": 0.1}, {"ndcg@10": math.nan})


@pytest.mark.slow
def test_bests_of_other_data_are_not_compared(world, options, tmp_path):
    """Judged by a loss first, then by nDCG, then by the loss again."""
    folder, _ = options
    run = tmp_path / "run"

    def going_on(steps: int, *keys: str) -> str:
        pairs = [
            f"output={run}", "train.schedule=constant", "train.deepspeed=zero1", "eval.every=1",
            "data.workers=0", f"train.steps={steps}", *keys,
        ]  # fmt: skip
        sets = [x for pair in pairs for x in ("--set", pair)]
        done = alone("--recipe", str(world / "recipe.yaml"), *sets)
        assert done.returncode == 0, done.stderr[-3000:]
        return " ".join(done.stderr.split())

    def best() -> dict:
        return json.loads((run / "best.json").read_text())

    shards = f"eval.shards=[{folder / 'held-out'}]"
    going_on(1, shards)
    assert set(best()["judge"]) == {"shards", "max_records"}
    forgotten = "what was best (step 1) was judged by other data and is forgotten"
    assert forgotten in going_on(2, shards, f"eval.beir=[{folder / 'beir'}]")
    assert set(best()["judge"]) == {"beir", "split"}
    assert best()["step"] == 2
    assert "step 2) was judged by other data" in going_on(3, shards, "eval.max_records=32")
    assert best()["step"] == 3
    assert "judged by" not in going_on(4, shards, "eval.max_records=32")
