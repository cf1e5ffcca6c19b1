"""Packed attention against dense attention with a block mask, in float64.

T packed tokens, H query heads, G key/value heads, E head width.
"""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from drama import attention as module
from drama.attention import PackedLayout, choose_backend, varlen_attention

RAGGED = {
    "ragged": (1, 7, 3, 12),
    "equal-neighbours": (5, 5, 5, 2, 2, 9),
    "one-text": (11,),
    "single-tokens": (1, 1, 1),
}


def layout_of(lengths: tuple[int, ...], causal: bool) -> PackedLayout:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PackedLayout(ends, lengths, causal)


def dense_attention(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    """softmax(q k' * scale + mask) v with one T x T mask: a token sees its own text alone."""
    group = q_THE.shape[1] // k_TGE.shape[1]
    k_THE, v_THE = (x.repeat_interleave(group, 1) for x in (k_TGE, v_TGE))
    text_T = torch.repeat_interleave(torch.tensor(layout.lengths))
    seen_TT = text_T[:, None] == text_T[None]
    if layout.causal:
        seen_TT = seen_TT.tril()
    logits_HTT = torch.einsum("the,she->hts", q_THE, k_THE) * scale
    logits_HTT = logits_HTT.masked_fill(~seen_TT.to(logits_HTT.device), -math.inf)
    return torch.einsum("hts,she->the", logits_HTT.softmax(-1), v_THE)


def inputs(
    num_tokens: int, heads: tuple[int, int], width: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and the gradient of the output, float64."""
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    return tuple(  # type: ignore[return-value]
        torch.randn(num_tokens, count, width, generator=generator, dtype=torch.float64)
        for count in (query_heads, kv_heads, kv_heads, query_heads)
    )


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED.keys())
def test_output_and_gradients_are_those_of_dense_attention(
    lengths: tuple[int, ...], heads: tuple[int, int], causal: bool
) -> None:
    layout = layout_of(lengths, causal)
    *leaves, grad_THE = inputs(sum(lengths), heads, width=8)
    results = []
    for attention in (varlen_attention, dense_attention):
        q, k, v = (x.clone().requires_grad_() for x in leaves)
        out_THE = attention(q, k, v, layout, 0.3)
        results.append((out_THE, *torch.autograd.grad(out_THE, (q, k, v), grad_THE)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", [*RAGGED, "long"])
def test_long_runs_of_one_length_are_dense_batches(
    name: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a Hopper GPU, with the CPU's kernels in the place of cuDNN's and of varlen's."""
    monkeypatch.setattr(module, "DENSE_WORK", 40)
    monkeypatch.setattr(module, "DENSE_STEP", 1)
    between: list[tuple[int, ...]] = []

    def rest(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float) -> Tensor:
        between.append(layout.lengths)
        assert layout.cu_seqlens.tolist() == [0, *accumulate(layout.lengths)]
        return module._sdpa_per_sequence(q, k, v, layout, scale)

    monkeypatch.setattr(module, "_torch_varlen", rest)
    lengths = RAGGED.get(name, (2, 3, 5, 5, 8, 8, 8))
    layout = layout_of(lengths, causal)
    *leaves, grad_THE = inputs(sum(lengths), (4, 2), width=8)
    results = []
    for attention in (module._by_run, dense_attention):
        q, k, v = (x.clone().requires_grad_() for x in leaves)
        out_THE = attention(q, k, v, layout, 0.3)
        results.append((out_THE, *torch.autograd.grad(out_THE, (q, k, v), grad_THE)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-13)
    dense = {"ragged": 2, "equal-neighbours": 3, "one-text": 1, "single-tokens": 0, "long": 5}[name]
    assert sum(map(len, between)) == len(lengths) - dense


def test_views_as_transformers_hands_them_over() -> None:
    """Heads first and then transposed: not contiguous."""
    lengths = (4, 9, 2)
    layout = layout_of(lengths, causal=False)
    q, k, v, _ = inputs(sum(lengths), (4, 2), width=8)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(
        varlen_attention(*strided, layout, 0.3), dense_attention(q, k, v, layout, 0.3)
    )


def test_the_choice_says_why() -> None:
    assert choose_backend("cpu", torch.float32)[0] == "sdpa per sequence"
    assert choose_backend("cuda", torch.float32) == (
        "sdpa per sequence", "the varlen kernels take 16-bit types only"
    )  # fmt: skip
    assert choose_backend("cuda", torch.bfloat16)[0] in ("flash-attn varlen", "torch varlen")
