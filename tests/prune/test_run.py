from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from drama.errors import UserError
from drama.prune import output, run
from drama.prune.calibration import read_calibration
from drama.prune.importance import choose, score
from drama.prune.layers import drop_layers
from drama.prune.loss import lm_loss, pass_dtype
from drama.prune.run import prune
from drama.prune.shape import Shape, parse_target
from drama.prune.source import load_llm
from drama.prune.statistics import collect
from drama.prune.surgery import cut

TARGET = "layers=3,hidden=36,heads=4,ffn=20"
DEMO_TEXT = Path(__file__).parents[2] / "data" / "demo" / "calibration.txt.gz"


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROW_LENGTH", 64)


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_prune_writes_a_folder_that_reloads(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    before = digest(model_folder)
    out = tmp_path / "deep" / "small"
    report = prune(model_folder, TARGET, text_file, out, calibration_tokens=1000)
    assert digest(model_folder) == before
    assert list(out.parent.iterdir()) == [out]

    model = LlamaForCausalLM.from_pretrained(out)
    assert Shape.of(model.config) == report.target == Shape(3, 36, 4, 2, 20, 8)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = read_calibration(text_file, tokenizer, num_tokens=1000, held_out_tokens=4096, length=64)
    assert report.loss_after == pytest.approx(lm_loss(model, text.held_out), rel=0.01)

    facts = json.loads((out / "pruning.json").read_text())
    assert report.plan is not None
    assert facts["plan"]["hidden"] == list(report.plan.hidden)
    assert len(facts["plan"]["ffn"]) == 3
    assert facts["source"]["hidden"] == 48
    assert facts["target"]["hidden"] == 36
    assert facts["calibration"]["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert facts["calibration"]["scoring_tokens"] == 1024
    assert (facts["loss_before"], facts["loss_after"]) == (report.loss_before, report.loss_after)
    kept, dropped = facts["scores"]["hidden"]["kept"], facts["scores"]["hidden"]["dropped"]
    assert kept[0] >= dropped[-1]
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500_000.0
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["head_dim"] == 8
    assert str(tmp_path) not in (out / "config.json").read_text()


def test_the_same_run_twice_writes_the_same_files(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    prune(model_folder, TARGET, text_file, out, calibration_tokens=500)
    first = digest(out)
    prune(model_folder, TARGET, text_file, out, calibration_tokens=500)
    assert digest(out) == first
    prune(model_folder, "layers=2", text_file, out, calibration_tokens=500)
    assert LlamaForCausalLM.from_pretrained(out).config.num_hidden_layers == 2


def test_dry_run_prints_the_plan_and_writes_nothing(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "model.safetensors").write_bytes(b"weights are not read")
    report = prune(model_folder, TARGET, text_file, tmp_path / "small", dry_run=True,
                   calibration_tokens=500)  # fmt: skip
    assert "pruning plan" in capsys.readouterr().err
    assert report.target.hidden == 36
    assert report.loss_after is None
    assert not (tmp_path / "small").exists()
    with pytest.raises(UserError, match="too short"):
        prune(model_folder, TARGET, text_file, tmp_path / "small", dry_run=True)


def test_outputs_that_would_destroy_something_are_refused(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    before = digest(model_folder)
    for out in (model_folder, model_folder / "small", tmp_path):
        with pytest.raises(UserError, match="overlaps the source model"):
            prune(model_folder, TARGET, text_file, out)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"full: holds files that are no pruned model"):
        prune(model_folder, TARGET, text_file, full)
    with pytest.raises(UserError, match=r"text\.txt: is a file"):
        prune(model_folder, TARGET, text_file, text_file)
    assert digest(model_folder) == before
    assert (full / "thesis.txt").read_text() == "mine"


def test_a_disk_too_small_is_seen_before_the_work(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = output.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"small: the pruned model takes .* MB free"):
        prune(model_folder, TARGET, text_file, tmp_path / "small")


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writes beyond `num_bytes` of one file fail, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_failed_write_leaves_what_was_there(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "small"
    prune(model_folder, "layers=2", text_file, out, calibration_tokens=500)
    before = digest(out)
    with file_size_limit(20_000), pytest.raises(Exception, match=r"(?i)file too large"):
        prune(model_folder, TARGET, text_file, out, calibration_tokens=500)
    assert digest(out) == before
    assert list(out.parent.iterdir()) == [out]


def test_importance_beats_chance_on_a_real_llama(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M, 2k calibration tokens: every dimension, and all together, against random."""
    model, tokenizer = load_llm(smollm2)
    dtype = pass_dtype(model.device)
    text = read_calibration(DEMO_TEXT, tokenizer, num_tokens=2048, held_out_tokens=512, length=512)
    source = Shape.of(model.config)
    statistics = collect(model, text.scoring, dtype)
    order = drop_layers(model, text.scoring[:1, :64], 28, dtype)
    scores = score(statistics, source, order)
    generator = torch.Generator().manual_seed(0)
    chance: Any = {
        name: torch.rand(x.shape, generator=generator, dtype=torch.float64)
        for name, x in vars(scores).items()
    }
    whole = lm_loss(model, text.held_out, dtype)
    assert 2.0 < whole < 4.5

    def loss(target: str, **other: Any) -> float:
        plan = choose(replace(scores, **other), statistics.energy, parse_target(target, source))
        small = cut(model, plan)
        return lm_loss(small, text.held_out, dtype)

    for target, name in (
        ("ffn=1024", "ffn"),
        ("heads=6", "kv_group"),
        ("hidden=504", "hidden"),
        ("layers=28", "layer"),
    ):
        ours, random_choice = loss(target), loss(target, **{name: chance[name]})
        assert whole < ours < random_choice - 0.5, (target, whole, ours, random_choice)

    plan = choose(scores, statistics.energy, parse_target("layers=12,hidden=384,heads=6", source))
    small = cut(model, plan)
    small.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = text.held_out[:1, :32]
    assert torch.equal(again(ids).logits, small(ids).logits)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
