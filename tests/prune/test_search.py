from __future__ import annotations

import json
import re
import weakref
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from drama.console import console
from drama.errors import UserError
from drama.prune import run, search
from drama.prune.calibration import read_calibration
from drama.prune.importance import choose, score
from drama.prune.layers import drop_layers
from drama.prune.loss import lm_loss
from drama.prune.run import prune
from drama.prune.search import Budget, Sizes, measure, parse_budget, propose, search_table
from drama.prune.shape import KEYS, Shape, parse_target
from drama.prune.statistics import collect
from drama.prune.surgery import cut

LLAMA_1B = (Shape(16, 2048, 32, 8, 8192, 64), Sizes(128_256, True))
LLAMA_8B = (Shape(32, 4096, 32, 8, 14336, 128), Sizes(128_256, False))
SMOLLM2 = (Shape(30, 576, 9, 3, 1536, 64), Sizes(49_152, True))
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 160,
}


def build(shape: Shape, sizes: Sizes) -> LlamaForCausalLM:
    """A real model without memory."""
    config = LlamaConfig(
        vocab_size=sizes.vocab_size, tie_word_embeddings=sizes.tied, hidden_size=shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, head_dim=shape.head_dim,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.ffn,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@cache
def built_parameters(shape: Shape, sizes: Sizes) -> int:
    return sum(weight.numel() for weight in build(shape, sizes).parameters())


def built_flops(shape: Shape, sizes: Sizes) -> float:
    """What torch counts in the blocks of a real model, per token of a text of 512."""
    ids_BN = torch.zeros(1, 512, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 512, 512, device="meta")
    with FlopCounterMode(display=False) as counter:
        build(shape, sizes).model(ids_BN, use_cache=False, attention_mask=mask)
    return counter.get_total_flops() / 512


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("60M", "params", 60_000_000),
        ("0.1b", "params", 100_000_000),
        (" 1.5 G", "params", 1_500_000_000),
        ("123456789", "params", 123_456_789),
        ("params=.25k", "params", 250),
        ("FLOPs = 0.2g", "flops", 200_000_000),
    ],
)
def test_parse_budget(text: str, kind: str, limit: int) -> None:
    assert parse_budget(text) == Budget(kind, limit, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("60X", ["'60X' is not a size", "60M", "flops=0.2G"]),
        ("", ["'' is not a size"]),
        ("-60M", ["'-60M' is not a size"]),
        ("1e8", ["'1e8' is not a size"]),
        ("nan", ["'nan' is not a size"]),
        ("params=", ["'' is not a size"]),
        ("flop=0.2G", ["unknown key 'flop'", "did you mean 'flops'"]),
        ("layers=3=4M", ["unknown key", "known: params, flops"]),
    ],
)
def test_budgets_that_cannot_be_read(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_budget(text)
    for word in [f"budget '{text}'", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    ("model", "text"),
    [
        (SMOLLM2, "110M"), (SMOLLM2, "90M"), (SMOLLM2, "60M"), (SMOLLM2, "flops=0.1G"),
        (SMOLLM2, "134M"), (LLAMA_1B, "0.2b"), (LLAMA_1B, "0.4b"), (LLAMA_1B, "flops=0.3G"),
        (LLAMA_8B, "1b"),
    ],
)  # fmt: skip
def test_proposals_obey_the_budget_and_what_a_gpu_likes(
    model: tuple[Shape, Sizes], text: str, count: int
) -> None:
    source, sizes = model
    budget = parse_budget(text)
    found = propose(budget, source, sizes, count)
    assert found == propose(budget, source, sizes, count)
    assert len({candidate.shape for candidate in found}) == len(found) <= count
    assert len(found) >= min(count, 8) or text == "134M"
    for candidate in found:
        shape = candidate.shape
        assert parse_target(str(shape), source) == shape != source
        assert candidate.parameters == built_parameters(shape, sizes)
        cost = candidate.flops if budget.kind == "flops" else candidate.parameters
        assert 0.92 * budget.limit < cost <= budget.limit
        assert shape.hidden % (128 if source.hidden >= 2048 else 64) == 0
        assert shape.ffn % (128 if source.ffn >= 4096 else 64) == 0
        assert shape.hidden <= 128 * shape.layers
        assert shape.hidden / 2 <= shape.heads * shape.head_dim <= shape.hidden
        assert shape.hidden <= shape.ffn <= 4 * shape.hidden


@pytest.mark.parametrize(("model", "text"), [(SMOLLM2, "flops=0.1G"), (LLAMA_1B, "flops=0.3G")])
def test_flops_are_those_that_torch_counts(model: tuple[Shape, Sizes], text: str) -> None:
    for candidate in propose(parse_budget(text), *model, 3):
        assert candidate.flops == built_flops(candidate.shape, model[1])


def test_proposals_are_unlike_each_other() -> None:
    shapes = [c.shape for c in propose(parse_budget("60M"), *SMOLLM2, 8)]
    assert {shape.hidden for shape in shapes} == {384, 576}
    assert max(s.layers for s in shapes) >= 2 * min(s.layers for s in shapes)
    assert max(s.ffn for s in shapes) >= 2 * min(s.ffn for s in shapes)
    for i, a in enumerate(shapes):
        for b in shapes[:i]:
            assert max(getattr(a, k) / getattr(b, k) for k in KEYS) > 1.1 or (
                max(getattr(b, k) / getattr(a, k) for k in KEYS) > 1.1
            )


def test_the_papers_shape_is_among_those_of_its_size() -> None:
    source, sizes = LLAMA_1B
    paper = parse_target("0.1b", source)
    size = sizes.candidate(paper).parameters
    shapes = [c.shape for c in propose(Budget("params", size, "x"), source, sizes, 10_000)]
    assert paper in shapes


@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize("model", [SMOLLM2, LLAMA_1B, LLAMA_8B])
def test_the_nearest_budget_that_a_refusal_names_is_valid(
    model: tuple[Shape, Sizes], kind: str
) -> None:
    source, sizes = model
    for text, words in (
        (f"{kind}=1", "too small for a sane shape"),
        (f"{kind}={sizes.cost(source, kind)}", "nothing would be cut"),
        (f"{kind}=100000G", "nothing would be cut"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            propose(parse_budget(text), source, sizes, 8)
        assert f"budget '{text}'" in str(caught.value)
        named = re.search(rf"valid choice is ({kind}=\S+)$", str(caught.value))
        assert named is not None
        limit = parse_budget(named[1])
        (only, *_) = propose(limit, source, sizes, 1)
        assert sizes.cost(only.shape, kind) == pytest.approx(limit.limit, rel=0.05)


def test_less_than_one_candidate_is_refused() -> None:
    with pytest.raises(UserError, match="candidates: 0; give at least 1"):
        propose(parse_budget("60M"), *SMOLLM2, 0)


def test_the_table_shows_every_shape() -> None:
    budget = parse_budget("60M")
    found = propose(budget, *SMOLLM2, 3)
    with console.capture() as captured:
        console.print(search_table(found, budget), width=120)
        console.print(search_table([replace(c, loss=9.8765) for c in found], budget), width=120)
    text = captured.get()
    for candidate in found:
        assert text.count(f"{candidate.parameters / 1e6:,.2f}") >= 2
        assert text.count(f"{candidate.flops / 1e9:,.3f}") >= 2
    assert text.count("9.877") == 3


@pytest.fixture(name="tiny_folder")
def folder_of_a_tiny_model(make_llama: Any, tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    make_llama(**TINY).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_losses_are_those_of_each_cut_and_one_cut_is_held(
    make_llama: Any, own_text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama(**TINY)
    source, rows_RN = Shape.of(model.config), own_text(model)
    statistics = collect(model, rows_RN, torch.float32)
    importance = score(statistics, source, drop_layers(model, rows_RN, 1, torch.float32))
    alive: weakref.WeakSet[LlamaForCausalLM] = weakref.WeakSet()

    def watched(*args: Any) -> LlamaForCausalLM:
        small = cut(*args)
        alive.add(small)
        assert len(alive) == 1
        return small

    monkeypatch.setattr(search, "cut", watched)
    proposals = propose(parse_budget("150K"), source, Sizes(64, True), 3)
    found = measure(model, proposals, importance, statistics.energy, rows_RN, torch.float32)
    assert {c.shape for c in found} == {c.shape for c in proposals}
    losses = [c.loss for c in found]
    assert len(set(losses)) == len(losses) == 3
    for candidate in found:
        small = cut(model, choose(importance, statistics.energy, candidate.shape))
        assert candidate.loss == lm_loss(small, rows_RN)
    assert losses == sorted(losses, key=lambda loss: loss or 0.0)


def test_the_best_of_the_table_is_written_twice_the_same(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROW_LENGTH", 64)
    out, weights = tmp_path / "small", []
    for _ in range(2):
        report = prune(tiny_folder, None, text_file, out, budget="150K", candidates=3,
                       calibration_tokens=1000)  # fmt: skip
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    facts = json.loads((out / "pruning.json").read_text())
    assert facts["search"] == [asdict(candidate) for candidate in report.search]
    assert len(facts["search"]) == 3
    best = min(facts["search"], key=lambda tried: tried["loss"])
    assert facts["target"] == best["shape"]
    model = LlamaForCausalLM.from_pretrained(out)
    assert asdict(Shape.of(model.config)) == best["shape"]
    assert sum(weight.numel() for weight in model.parameters()) == best["parameters"] <= 150_000
    text = read_calibration(
        text_file, AutoTokenizer.from_pretrained(out), num_tokens=1000, length=64,
        held_out_tokens=run.HELD_OUT_TOKENS,
    )  # fmt: skip
    assert best["loss"] == pytest.approx(lm_loss(model, text.held_out), rel=0.01)
    assert report.loss_after == best["loss"]


def test_a_dry_run_shows_the_proposals_without_the_weights(
    tiny_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_folder / "model.safetensors").write_bytes(b"weights are not read")
    report = prune(tiny_folder, None, text_file, tmp_path / "small", budget="150K", candidates=3,
                   calibration_tokens=500, dry_run=True)  # fmt: skip
    assert report.target is None
    assert len(report.search) == 3
    shown = capsys.readouterr().err
    assert "shapes for a budget of 150K" in shown
    assert "pruning plan" not in shown
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("target", "budget", "message"),
    [
        (None, None, "--calibration without --to or --budget"),
        ("layers=2", "150K", "--to and --budget: give a shape or a budget"),
    ],
)
def test_either_a_shape_or_a_budget(
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    target: str | None,
    budget: str | None,
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        prune(tiny_folder, target, text_file, tmp_path / "small", budget=budget)
