"""Masks on a GPU: the widths filled up to 64, against the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drama.prune.alive import Alive, install, make_maskable
from drama.prune.masks import Masks
from drama.prune.shape import Shape

pytestmark = pytest.mark.gpu


def test_logits_and_gradients_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=384, head_dim=64,
    )  # fmt: skip
    on_cpu = LlamaForCausalLM(config)
    models = {"cpu": on_cpu, "cuda": copy.deepcopy(on_cpu).cuda()}
    source = Shape.of(config)
    target = replace(source, layers=2, hidden=128, heads=2, kv_heads=1, ffn=192)
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    found = {}
    for name, model in models.items():
        masks = Masks(source, target, seed=0, device=torch.device(name))
        with torch.no_grad():
            for kind, log_alpha in masks.log_alpha.items():
                chance = torch.randn(log_alpha.shape, generator=torch.Generator().manual_seed(1))
                masks.log_alpha[kind] = (3 * chance).to(name).requires_grad_()
        make_maskable(model)
        alive = Alive(masks.sample(5), source, multiple=64 if name == "cuda" else 1)
        install(model, alive)
        logits = model(ids.to(name)).logits
        logits.square().mean().backward()
        alive.backward(alive.gradients(), masks.penalty(0.5))
        grads = [x.grad for x in (*model.parameters(), *masks.log_alpha.values())]
        found[name] = [x.detach().cpu() for x in (logits, *grads) if x is not None]
    for a, b in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * a.abs().max().item())
