from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from drama.prune import statistics
from drama.prune.loss import lm_loss, pass_dtype
from drama.prune.statistics import collect


def reference(model: LlamaForCausalLM, ids_N: Tensor) -> tuple[dict[str, list[Tensor]], Tensor]:
    """A Llama written out by hand for one row: what the statistics are of, and the logits."""
    config, weights = model.config, model.state_dict()
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = len(ids_N)
    angle = torch.arange(length)[:, None] * model.model.rotary_emb.inv_freq.double()
    rotation = torch.polar(torch.ones_like(angle), angle)

    def rotate(x_NHE: Tensor) -> Tensor:
        pairs = torch.complex(x_NHE[..., : width // 2], x_NHE[..., width // 2 :])
        turned = pairs * rotation[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    seen: dict[str, list[Tensor]] = {"ffn": [], "attention": [], "normed": [], "unit": []}

    def norm(x: Tensor, name: str) -> Tensor:
        unit = x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        seen["unit"].append(x / x.pow(2).mean(-1, keepdim=True).sqrt())
        seen["normed"].append(unit * weights[name])
        return seen["normed"][-1]

    x = weights["model.embed_tokens.weight"][ids_N]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        y = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            (y @ weights[f"{at}self_attn.{n}_proj.weight"].T).view(length, -1, width) for n in "qkv"
        )
        q, k = rotate(q), rotate(k)
        context = []
        for head in range(heads):
            group = head // (heads // groups)
            logits = q[:, head] @ k[:, group].T / math.sqrt(width)
            logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
            context.append(logits.softmax(-1) @ v[:, group])
        seen["attention"].append(torch.cat(context, -1))
        x = x + seen["attention"][-1] @ weights[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (y @ weights[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        seen["ffn"].append(F.silu(gate) * up)
        x = x + seen["ffn"][-1] @ weights[at + "mlp.down_proj.weight"].T
    return seen, norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


@pytest.fixture(name="rows_RN")
def token_rows() -> Tensor:
    return torch.randint(2, 64, (7, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("head_dim", [None, 16])
@pytest.mark.usefixtures("exact_norms")
def test_statistics_are_those_of_a_llama_written_by_hand(
    make_llama: Any, rows_RN: Tensor, head_dim: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "TOKENS_PER_BATCH", 48)  # three rows, three rows, one row
    model = make_llama(head_dim=head_dim)
    runs = [reference(model, row)[0] for row in rows_RN]

    def over_tokens(name: str) -> Tensor:
        """[layers or norms, all tokens, channels]"""
        return torch.stack([torch.stack(seen[name]) for seen in runs], 1).flatten(1, 2)

    found = collect(model, rows_RN, torch.float32)
    torch.testing.assert_close(found.ffn, over_tokens("ffn").abs().mean(1))
    torch.testing.assert_close(found.attention, over_tokens("attention").pow(2).mean(1))
    torch.testing.assert_close(found.normed, over_tokens("normed").abs().mean(1))
    torch.testing.assert_close(found.energy, over_tokens("unit").pow(2).mean(1))
    assert found.num_tokens == 7 * 16


@pytest.mark.usefixtures("exact_norms")
def test_lm_loss_is_the_cross_entropy_of_the_next_token(make_llama: Any, rows_RN: Tensor) -> None:
    model = make_llama()
    losses = [
        -reference(model, row)[1].log_softmax(-1)[position, row[position + 1]].item()
        for row in rows_RN
        for position in range(15)
    ]
    assert lm_loss(model, rows_RN) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_bfloat16_changes_the_statistics_by_its_rounding_only(
    make_llama: Any, rows_RN: Tensor
) -> None:
    model = make_llama().float()
    exact = collect(model, rows_RN, torch.float32)
    rounded = collect(model, rows_RN, torch.bfloat16)
    assert not torch.equal(exact.ffn, rounded.ffn)
    for name in ("ffn", "attention", "normed", "energy"):
        a, b = getattr(exact, name), getattr(rounded, name)
        assert (a - b).norm() < 0.03 * a.norm(), name


def test_the_hooks_are_gone_afterwards(make_llama: Any, rows_RN: Tensor) -> None:
    model = make_llama()
    collect(model, rows_RN, torch.float32)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_pass_dtype_is_one_of_two() -> None:
    assert pass_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
