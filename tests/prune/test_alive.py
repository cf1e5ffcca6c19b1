from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drama.prune.alive import Alive, fold, install, make_maskable
from drama.prune.masks import Gates, Masks
from drama.prune.shape import Shape
from drama.prune.surgery import cut

IDS_RN = torch.arange(2, 62).view(3, 20)
TARGET = {"layers": 2, "hidden": 24, "heads": 2, "kv_heads": 2, "ffn": 17}
FORMS = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"num_key_value_heads": 2, "head_dim": 16}),
    ("qwen2", {"num_key_value_heads": 3}),
    ("qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
]


def masks_of(model: Any, *, seed: int = 0, spread: float = 3.0, **target: int) -> Masks:
    """Masks about half of whose units are closed, each kind that `target` cuts."""
    source = Shape.of(model.config)
    masks = Masks(source, replace(source, **(target or TARGET)), seed=seed,
                  device=torch.device("cpu"))  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for kind, log_alpha in masks.log_alpha.items():
            masks.log_alpha[kind] = (
                spread * torch.randn(log_alpha.shape, generator=generator, dtype=torch.float64)
            ).requires_grad_()
    return masks


def by_hand(model: Any, gates: Gates, ids_RN: Tensor) -> Tensor:
    """Logits of the whole model with every mask multiplied in where the definition says, nothing
    left out; differentiable in the weights and the masks."""
    config, weights = model.config, dict(model.named_parameters())
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    source, length = Shape.of(config), ids_RN.shape[1]
    ones = {
        "layer": torch.ones(source.layers), "hidden": torch.ones(source.hidden),
        "kv_group": torch.ones(source.layers, source.kv_heads),
        "query_head": torch.ones(source.layers, source.group),
        "ffn": torch.ones(source.layers, source.ffn),
    }  # fmt: skip
    z = {kind: gates.z.get(kind, one.double()) for kind, one in ones.items()}
    kept_D = gates.kept.get("hidden", torch.ones(source.hidden) > 0).double()
    positions = torch.arange(length)[None]
    rotary = model.model.rotary_emb(weights["model.norm.weight"][None], positions)
    cos, sin = (x[:, :, None] for x in rotary)

    def norm(x: Tensor, name: str) -> Tensor:
        mean = (x.square() * kept_D).sum(-1, keepdim=True) / kept_D.sum()
        return weights[name] * z["hidden"] * x / (mean + config.rms_norm_eps).sqrt()

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    def head_norm(x: Tensor, name: str) -> Tensor:
        if name not in weights:
            return x
        return weights[name] * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def rotate(x: Tensor) -> Tensor:
        half = source.head_dim // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    x = weights["model.embed_tokens.weight"][ids_RN]
    for i in range(source.layers):
        at = f"model.layers.{i}.self_attn."
        y = norm(x, f"model.layers.{i}.input_layernorm.weight")
        q, k, v = (linear(y, f"{at}{n}_proj").unflatten(-1, (-1, source.head_dim)) for n in "qkv")
        q, k = (
            rotate(head_norm(q, at + "q_norm.weight")),
            rotate(head_norm(k, at + "k_norm.weight")),
        )
        context = []
        for head in range(source.heads):
            group, place = divmod(head, source.group)
            scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / math.sqrt(source.head_dim)
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
            of_head = z["kv_group"][i, group] * z["query_head"][i, place]
            context.append(scores.softmax(-1) @ v[:, :, group] * of_head)
        x = x + linear(torch.cat(context, -1), at + "o_proj") * z["layer"][i]
        at = f"model.layers.{i}.mlp."
        y = norm(x, f"model.layers.{i}.post_attention_layernorm.weight")
        inner = F.silu(linear(y, at + "gate_proj")) * linear(y, at + "up_proj")
        x = x + linear(inner * z["ffn"][i], at + "down_proj") * z["layer"][i]
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


@pytest.mark.parametrize(("family", "form"), FORMS)
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.usefixtures("exact_norms")
def test_logits_and_all_gradients_are_those_of_the_whole_masked_model(
    make_llama: Any, family: str, form: dict[str, Any], multiple: int
) -> None:
    model = make_llama(family, **form)
    masks = masks_of(model)
    gates = masks.sample(7)
    assert not gates.kept["layer"].all()
    assert gates.kept["layer"].any()
    weight = torch.randn(3, 20, 64, dtype=torch.float64)
    expected = by_hand(model, gates, IDS_RN)
    parameters = list(model.parameters())
    alphas = list(masks.log_alpha.values())
    wanted = torch.autograd.grad((expected * weight).sum(), [*parameters, *alphas])

    make_maskable(model)
    alive = Alive(masks.sample(7), Shape.of(model.config), multiple=multiple)
    install(model, alive)
    found = model(IDS_RN).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    # twice half of it: the scales' gradients add up over the passes of a step
    (found * weight / 2).sum().backward()
    (model(IDS_RN).logits * weight / 2).sum().backward()
    alive.backward(alive.gradients(), torch.zeros((), requires_grad=True))
    for x, grad in zip([*parameters, *alphas], wanted, strict=True):
        assert x.grad is not None  # a closed layer's too: the reduction over ranks waits for it
        torch.testing.assert_close(x.grad, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "form"), FORMS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.usefixtures("exact_norms")
def test_the_exported_model_is_the_masked_one(
    make_llama: Any, monkeypatch: pytest.MonkeyPatch, family: str, form: dict[str, Any],
    dtype: torch.dtype, limit: float, hard: bool,
) -> None:  # fmt: skip
    model = make_llama(family, **form).to(dtype)
    if family in ("mistral", "qwen2"):
        exact = type(make_llama().model.norm).forward  # the fixture's
        monkeypatch.setattr(type(model.model.norm), "forward", exact)
    gates = masks_of(model).final()
    if hard:
        gates = Gates({kind: kept.double() for kind, kept in gates.kept.items()}, gates.kept)
    else:  # kept units that evaluation closes would hide a wrong place
        soft = {k: (z.clamp_min(0.3) * gates.kept[k]).to(dtype) for k, z in gates.z.items()}
        gates = Gates(soft, gates.kept)
    alive = Alive(gates, Shape.of(model.config))
    exported = copy.deepcopy(model)
    fold(exported, alive)
    exported = cut(exported, alive.plan())
    assert replace(Shape.of(model.config), **TARGET) == Shape.of(exported.config)
    blocks = [  # the projections' weights, counted in both models
        sum(x.numel() for name, x in m.model.layers.named_parameters() if "proj.weight" in name)
        for m in (exported, model)
    ]
    assert alive.share() == pytest.approx(blocks[0] / blocks[1])
    make_maskable(model)
    install(model, alive)
    with torch.no_grad():
        a, b = model(IDS_RN).logits, exported(IDS_RN).logits
    assert a.dtype == dtype
    scale = a.abs().max().item()
    assert (a - b).abs().max() < limit * max(1.0, scale if dtype == torch.float32 else 1.0)


def test_without_masks_a_maskable_model_is_what_it_was(make_llama: Any) -> None:
    model = make_llama(attention_bias=True).float()
    with torch.no_grad():
        before = model(IDS_RN).logits
        make_maskable(model)
        make_maskable(model)
        assert torch.equal(model(IDS_RN).logits, before)
        source = Shape.of(model.config)
        install(model, Alive(Gates({}, {}), source))
        assert torch.equal(model(IDS_RN).logits, before)
    assert sorted(model.state_dict()) == sorted(make_llama(attention_bias=True).state_dict())


@pytest.mark.usefixtures("exact_norms")
def test_recomputed_blocks_give_the_same_gradients(make_llama: Any) -> None:
    grads = []
    for recompute in (False, True):
        model = make_llama().train()
        make_maskable(model)
        masks = masks_of(model)
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        alive = Alive(masks.sample(7), Shape.of(model.config))
        install(model, alive)
        model(IDS_RN, use_cache=False).logits.square().sum().backward()
        alive.backward(alive.gradients(), torch.zeros((), requires_grad=True))
        tensors = [*model.parameters(), *masks.log_alpha.values()]
        grads.append([x.grad for x in tensors])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("exact_norms")
def test_everything_closed_is_still_a_number(make_llama: Any) -> None:
    model = make_llama()
    make_maskable(model)
    masks = masks_of(model)
    with torch.no_grad():
        for log_alpha in masks.log_alpha.values():
            log_alpha.fill_(-50)
    alive = Alive(masks.sample(0), Shape.of(model.config))
    install(model, alive)
    logits = model(IDS_RN).logits
    assert torch.equal(logits, torch.zeros_like(logits))


def test_the_living_widths_are_filled_up_to_a_multiple(make_llama: Any) -> None:
    model = make_llama()
    gates = masks_of(model).sample(7)
    alive = Alive(gates, Shape.of(model.config), multiple=16)
    assert alive.hidden is not None
    assert len(alive.hidden) % 16 == 0
    assert set(gates.kept["hidden"].nonzero()[:, 0].tolist()) <= set(alive.hidden.tolist())
    assert alive.hidden.tolist() == sorted(set(alive.hidden.tolist()))
    for layer in alive.layers:
        assert layer.ffn_rows is not None
        assert len(layer.ffn_rows) in (16, 32, 40)  # 40 is all there are
