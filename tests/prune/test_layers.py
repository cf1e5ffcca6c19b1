from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from drama.prune import layers
from drama.prune.layers import LayerOrder, drop_layers, losses_without
from drama.prune.loss import lm_loss
from drama.prune.shape import Shape
from drama.prune.surgery import Plan, cut

FORMS = [
    {"tie_word_embeddings": tied, "num_key_value_heads": kv_heads, "attn_implementation": attention}
    for tied, kv_heads, attention in ((True, 3, "sdpa"), (False, 6, "sdpa"), (True, 3, "eager"))
]


def keep_layers(model: LlamaForCausalLM, kept: Sequence[int]) -> LlamaForCausalLM:
    shape, count = Shape.of(model.config), len(kept)
    return cut(
        model,
        Plan(
            layers=tuple(kept),
            hidden=tuple(range(shape.hidden)),
            kv_groups=(tuple(range(shape.kv_heads)),) * count,
            query_heads=(tuple(range(shape.group)),) * count,
            ffn=(tuple(range(shape.ffn)),) * count,
            norm_scales=(1.0,) * (2 * count + 1),
        ),
    )


def silence(model: LlamaForCausalLM, silent: Sequence[int]) -> None:
    with torch.no_grad():
        for i in silent:
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()


@pytest.fixture(name="rows_RN")
def token_rows() -> Tensor:
    return torch.randint(2, 64, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kept", "tried"),
    [(range(4), range(4)), (range(4), (1, 2)), ((0, 2, 3), (0, 3)), ((2,), (2,)), ((1, 3), ())],
)
@pytest.mark.usefixtures("exact_norms")
def test_losses_are_those_of_models_rebuilt_without_the_layer(
    make_llama: Any,
    rows_RN: Tensor,
    form: dict[str, Any],
    kept: Sequence[int],
    tried: Sequence[int],
) -> None:
    model = make_llama(**form)
    found = losses_without(model, rows_RN[0], kept, tried, torch.float32).tolist()
    assert len(found) == len(tried) + 1
    assert found[0] == pytest.approx(lm_loss(keep_layers(model, kept), rows_RN[:1]), abs=1e-12)
    for i, loss in zip(tried, found[1:], strict=True):
        rest = [layer for layer in kept if layer != i]
        if rest:
            small = keep_layers(model, rest)
            assert loss == pytest.approx(lm_loss(small, rows_RN[:1]), abs=1e-12), i


@pytest.mark.parametrize("window", [2, 6])
@pytest.mark.usefixtures("exact_norms")
def test_the_order_is_that_of_a_search_by_hand(
    make_llama: Any, rows_RN: Tensor, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "TRIED", window)
    model = make_llama(num_hidden_layers=6)
    found = drop_layers(model, rows_RN, 2, torch.float32)
    kept, dropped, losses = list(range(6)), [], [lm_loss(model, rows_RN)]
    harm = dict.fromkeys(kept, 0.0)
    while len(kept) > 2:
        least = sorted(kept, key=lambda i: harm[i])
        fresh = {}
        for i in least[:window] if dropped else least:
            fresh[i] = lm_loss(keep_layers(model, [k for k in kept if k != i]), rows_RN)
            harm[i] = fresh[i] - losses[-1]
        best = min(fresh, key=lambda i: fresh[i])
        kept.remove(best)
        dropped.append(best)
        losses.append(fresh[best])
    assert list(found.dropped) == dropped
    assert found.losses == pytest.approx(losses, abs=1e-12)
    scores = found.scores()
    assert [scores[i].item() for i in dropped] == [0, 1, 2, 3]
    assert [scores[i].item() for i in kept] == [4, 4]


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("silent", [(1, 2), (0, 5), (3,)])
def test_layers_that_do_nothing_go_first(
    make_llama: Any, own_text: Any, silent: tuple[int, ...]
) -> None:
    model = make_llama(num_hidden_layers=6)
    silence(model, silent)
    order = drop_layers(model, own_text(model), 6 - len(silent), torch.float32)
    assert sorted(order.dropped) == list(silent)
    assert order.losses == pytest.approx([order.losses[0]] * (len(silent) + 1), abs=1e-12)


def test_the_model_is_as_before(make_llama: Any, rows_RN: Tensor) -> None:
    model = make_llama()
    before_layers = model.model.layers
    with torch.no_grad():
        before = model(rows_RN).logits
    drop_layers(model, rows_RN, 1, torch.float32)
    with pytest.raises(IndexError):  # no such token id
        losses_without(model, rows_RN[0] + 1000, range(4), range(4), torch.float32)
    with torch.no_grad():
        assert torch.equal(model(rows_RN).logits, before)
    assert model.model.layers is before_layers
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_measured_where_every_layer_stays(make_llama: Any, rows_RN: Tensor) -> None:
    order = drop_layers(make_llama(), rows_RN, 4, torch.float32)
    assert order == LayerOrder((), (), 4)
    assert order.scores().tolist() == [0, 0, 0, 0]
