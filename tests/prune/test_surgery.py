from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from drama.hf import write_rope_keys
from drama.prune.importance import choose, score
from drama.prune.layers import drop_layers
from drama.prune.shape import Shape, parse_target
from drama.prune.statistics import collect
from drama.prune.surgery import Plan, cut

IDS_RN = torch.arange(2, 62).view(3, 20)
FORMS = [
    {"tie_word_embeddings": tied, "head_dim": head_dim, "num_key_value_heads": kv_heads}
    for tied in (True, False)
    for head_dim in (None, 16)
    for kv_heads in (3, 6)
]


def everything(model: LlamaForCausalLM, **changes: Any) -> Plan:
    shape = Shape.of(model.config)
    whole: dict[str, Any] = {
        "layers": tuple(range(shape.layers)),
        "hidden": tuple(range(shape.hidden)),
        "kv_groups": (tuple(range(shape.kv_heads)),) * shape.layers,
        "query_heads": (tuple(range(shape.group)),) * shape.layers,
        "ffn": (tuple(range(shape.ffn)),) * shape.layers,
        "norm_scales": (1.0,) * (2 * shape.layers + 1),
    }
    return Plan(**whole | changes)


def prune_by_importance(
    model: LlamaForCausalLM, target: str, rows_RN: Tensor = IDS_RN
) -> tuple[Plan, LlamaForCausalLM]:
    shape = Shape.of(model.config)
    goal = parse_target(target, shape)
    statistics = collect(model, rows_RN, torch.float32)
    order = drop_layers(model, rows_RN, goal.layers, torch.float32)
    plan = choose(score(statistics, shape, order), statistics.energy, goal)
    small = cut(model, plan)
    assert plan.shape(shape) == Shape.of(small.config) == goal
    return plan, small


def logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(IDS_RN).logits


def scattered(size: int, count: int, seed: int) -> list[int]:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("exact_norms")
class TestWhatIsZeroIsFoundAndCutExactly:
    def test_ffn_channels(self, make_llama: Any, form: dict[str, Any]) -> None:
        model = make_llama(**form)
        kept = [scattered(40, 24, seed=i) for i in range(4)]
        with torch.no_grad():
            for layer, stays in zip(model.model.layers, kept, strict=True):
                goes = sorted(set(range(40)) - set(stays))
                layer.mlp.up_proj.weight[goes] = 0
        plan, small = prune_by_importance(model, "ffn=24")
        assert [list(x) for x in plan.ffn] == kept
        torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-10)

    def test_kv_groups(self, make_llama: Any, form: dict[str, Any]) -> None:
        model = make_llama(**form)
        shape = Shape.of(model.config)
        # of three groups one goes, of six three: 48 hidden channels must divide by what is left
        gone = [[i % 3] if shape.kv_heads == 3 else [i, (i + 2) % 6, (i + 3) % 6] for i in range(4)]
        with torch.no_grad():
            for layer, groups in zip(model.model.layers, gone, strict=True):
                for group in groups:
                    rows = slice(group * shape.head_dim, (group + 1) * shape.head_dim)
                    layer.self_attn.v_proj.weight[rows] = 0
        left = shape.kv_heads - len(gone[0])
        plan, small = prune_by_importance(model, f"kv_heads={left}")
        for groups, kept in zip(gone, plan.kv_groups, strict=True):
            assert sorted([*groups, *kept]) == list(range(shape.kv_heads))
        torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("silent", [(1, 2), (0, 3)])
    def test_layers(
        self, make_llama: Any, own_text: Any, form: dict[str, Any], silent: tuple[int, int]
    ) -> None:
        model = make_llama(**form)
        with torch.no_grad():
            for i in silent:
                model.model.layers[i].self_attn.o_proj.weight.zero_()
                model.model.layers[i].mlp.down_proj.weight.zero_()
        plan, small = prune_by_importance(model, "layers=2", own_text(model))
        assert sorted([*plan.layers, *silent]) == [0, 1, 2, 3]
        torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-10)

    def test_hidden_channels(self, make_llama: Any, form: dict[str, Any]) -> None:
        """The variance then runs over fewer channels with the same sum: the factors undo it."""
        model = make_llama(**form, rms_norm_eps=1e-30)
        kept = scattered(48, 36, seed=7)
        goes = sorted(set(range(48)) - set(kept))
        with torch.no_grad():
            model.model.embed_tokens.weight[:, goes] = 0
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[goes] = 0
                layer.mlp.down_proj.weight[goes] = 0
        plan, small = prune_by_importance(model, "hidden=36")
        assert list(plan.hidden) == kept
        assert plan.norm_scales == pytest.approx([(48 / 36) ** 0.5] * 9)
        torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("exact_norms")
def test_keeping_everything_changes_nothing(make_llama: Any, form: dict[str, Any]) -> None:
    model = make_llama(**form)
    assert torch.equal(logits(cut(model, everything(model))), logits(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("places", [(0, 1), (1,)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_weight_comes_from_its_place(
    make_llama: Any, family: str, places: tuple[int, ...], tied: bool
) -> None:
    """Each weight is overwritten with its row and column number, and read back after the cut."""
    mlp_bias = {"mlp_bias": True} if family == "llama" else {}
    model = make_llama(
        family, tie_word_embeddings=tied, head_dim=8, attention_bias=True, **mlp_bias
    )
    with torch.no_grad():
        for weight in model.parameters():
            rows = torch.arange(weight.shape[0], dtype=torch.float64)
            weight.copy_(rows if weight.dim() == 1 else
                         rows[:, None] * 1000 + torch.arange(weight.shape[1]))  # fmt: skip
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    hidden = tuple(scattered(48, 24, seed=3))
    plan = Plan(
        layers=(1, 3),
        hidden=hidden,
        kv_groups=((0, 2), (1, 2)),
        query_heads=(places, places),
        ffn=((0, 5, 39), (1, 2, 20)),
        norm_scales=(2.0, 3.0, 4.0, 5.0, 6.0),
    )
    small = cut(model, plan)
    state = small.state_dict()

    def expect(name: str, rows: list[int], columns: tuple[int, ...] | list[int]) -> None:
        wanted = [[row * 1000.0 + column for column in columns] for row in rows]
        assert state.pop(name + ".weight").tolist() == wanted, name
        if name + ".bias" in before or name.replace("layers.0", "layers.1") + ".bias" in before:
            assert state.pop(name + ".bias").tolist() == [float(row) for row in rows], name

    # two query heads of eight rows to a group: the first place, the second, or both
    starts = {(0, 1): (0, 16), (1,): (8, 16)}[places]
    queries = {
        (0, 2): [*range(starts[0], 16), *range(starts[0] + 32, 48)],
        (1, 2): [*range(starts[0] + 16, 32), *range(starts[0] + 32, 48)],
    }
    keys = {(0, 2): [*range(0, 8), *range(16, 24)], (1, 2): list(range(8, 24))}
    for i, (groups, ffn) in enumerate(zip(plan.kv_groups, plan.ffn, strict=True)):
        at = f"model.layers.{i}."
        expect(at + "self_attn.q_proj", queries[groups], hidden)
        expect(at + "self_attn.k_proj", keys[groups], hidden)
        expect(at + "self_attn.v_proj", keys[groups], hidden)
        expect(at + "self_attn.o_proj", list(hidden), queries[groups])
        expect(at + "mlp.gate_proj", list(ffn), hidden)
        expect(at + "mlp.up_proj", list(ffn), hidden)
        expect(at + "mlp.down_proj", list(hidden), ffn)
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        for norm, factor in zip(norms, plan.norm_scales[2 * i : 2 * i + 2], strict=True):
            assert state.pop(at + norm).tolist() == [factor * channel for channel in hidden]
        if family == "qwen3":
            for norm in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
                assert state.pop(at + norm).tolist() == list(range(8))
    expect("model.embed_tokens", list(range(64)), hidden)
    expect("lm_head", list(range(64)), hidden)
    assert state.pop("model.norm.weight").tolist() == [6.0 * channel for channel in hidden]
    assert not state
    assert small.dtype == torch.float64
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.usefixtures("exact_norms")
def test_query_heads_that_nothing_reads_are_cut_exactly(make_llama: Any, family: str) -> None:
    """Two heads of three in each of two groups stay, at other places in every layer."""
    model = make_llama(family, num_key_value_heads=2, head_dim=8)
    gone = [0, 2, 1, 2]
    with torch.no_grad():
        for layer, place in zip(model.model.layers, gone, strict=True):
            for head in (place, 3 + place):
                layer.self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] = 0
    kept = tuple(tuple(j for j in range(3) if j != place) for place in gone)
    small = cut(model, everything(model, query_heads=kept))
    assert small.config.num_attention_heads == 4
    assert small.config.num_key_value_heads == 2
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("exact_norms")
def test_the_place_with_the_least_attention_output_goes(make_llama: Any) -> None:
    model = make_llama(num_key_value_heads=2, head_dim=8)
    plan, _ = prune_by_importance(model, "heads=4,kv_heads=2")
    heads_LGJE = collect(model, IDS_RN, torch.float32).attention.view(4, 2, 3, 8)
    least = [min(range(3), key=lambda j: layer[:, j].sum().item()) for layer in heads_LGJE]
    assert plan.query_heads == tuple(tuple(j for j in range(3) if j != i) for i in least)


@pytest.mark.parametrize("form", FORMS)
def test_the_written_folder_gives_the_same_logits(
    make_llama: Any, form: dict[str, Any], tmp_path: Path
) -> None:
    model = make_llama(**form)
    _, small = prune_by_importance(model, "layers=3,hidden=36,heads=6,ffn=20")
    small.save_pretrained(tmp_path)
    write_rope_keys(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(again), logits(small))
    assert again.config.head_dim == model.config.head_dim


def test_a_plan_out_of_order_is_refused(make_llama: Any) -> None:
    model = make_llama()
    with pytest.raises(AssertionError):
        everything(model, hidden=(1, 0))
    with pytest.raises(AssertionError):
        everything(model, norm_scales=(1.0,))
    with pytest.raises(AssertionError):
        everything(model, ffn=((0, 1), (0,), (0,), (0,)))
