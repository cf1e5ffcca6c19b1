"""Packed attention against dense attention with a block mask, in float64.

T packed tokens, H query heads, G key/value heads, E head width.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from drama import attention as module
from drama import block_attention as blocks
from drama.attention import PackedLayout, choose_backend, varlen_attention
from drama.memory import GraphBytes

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
    bf16 = "blocks of scores" if blocks.has_bf16_instructions() else "sdpa per sequence"
    assert choose_backend("cpu", torch.bfloat16)[0] == bf16
    assert choose_backend("cuda", torch.float32) == (
        "sdpa per sequence", "the varlen kernels take 16-bit types only"
    )  # fmt: skip
    assert choose_backend("cuda", torch.bfloat16)[0] in ("flash-attn varlen", "torch varlen")


def in_blocks(layout: PackedLayout, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients in bf16 of the inputs of `inputs`."""
    *leaves, grad_THE = (x.bfloat16() for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    out_THE = blocks.block_attention(*leaves, layout.runs, causal=layout.causal, scale=0.3)
    return (out_THE.detach(), *torch.autograd.grad(out_THE, leaves, grad_THE))


@pytest.mark.parametrize("block", [2**21, 600, 1], ids=["whole", "some", "row-by-row"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("lengths", [*RAGGED.values(), (33, 70, 70)], ids=[*RAGGED, "long"])
def test_blocks_of_scores_are_dense_attention(
    lengths: tuple[int, ...],
    heads: tuple[int, int],
    causal: bool,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within bf16's roundings, 2^-9 each: results, probabilities, the scores' gradient; a key's
    gradient is a sum of rounded parts."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    layout = layout_of(lengths, causal)
    given = [x.bfloat16().double() for x in inputs(sum(lengths), heads, width=32)]
    *leaves, grad_THE = given
    leaves = [x.requires_grad_() for x in leaves]
    want_THE = dense_attention(*leaves, layout, 0.3)
    wanted = (want_THE, *torch.autograd.grad(want_THE, leaves, grad_THE))
    for ours, want in zip(in_blocks(layout, *given), wanted, strict=True):
        # a text of one token has no gradient of its scores; what is left of it is rounding
        scale = want.norm() if max(lengths) > 1 else grad_THE.norm()
        assert (ours.double() - want).norm() <= 4e-3 * scale


def test_a_text_in_blocks_has_the_same_bits_whatever_lies_beside_it() -> None:
    *texts, grad_THE = inputs(5 * 70, (6, 2), width=64)
    several = in_blocks(layout_of((70,) * 5, causal=False), *texts, grad_THE)
    alone = in_blocks(layout_of((70,), causal=False), *(x[70:140] for x in (*texts, grad_THE)))
    for among, single in zip(several, alone, strict=True):
        assert torch.equal(among[70:140], single)


def test_blocks_keep_queries_keys_and_values_and_leave_no_setting_behind() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    q, k, v, _ = (x.bfloat16().requires_grad_() for x in inputs(300, (6, 2), width=64))
    counter = GraphBytes([])
    with counter.watch():
        out_THE = varlen_attention(q, k, v, layout_of((100, 200), causal=False), 0.3)
    if blocks.has_bf16_instructions():
        assert counter.total == 2 * 300 * (6 + 2 + 2) * 64
    out_THE.sum().backward()
    assert matmul.fp32_precision == before


def test_threads_attend_in_blocks_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting is the process's: who leaves first would take it from the others, who leaves last
    would leave it behind."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    inside: list[str] = []
    whole = blocks._Scores.probabilities

    def slow(*arguments: Any) -> Tensor:
        time.sleep(0.002)
        inside.append(matmul.fp32_precision)
        return whole(*arguments)

    monkeypatch.setattr(blocks._Scores, "probabilities", slow)
    layout, given = layout_of((30, 80), causal=False), inputs(110, (6, 2), width=64)
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: in_blocks(layout, *given), range(20)))
    for result in results:
        assert all(map(torch.equal, result, results[0]))
    assert set(inside) == {"bf16"}
    assert matmul.fp32_precision == before


def test_inference_leaves_the_setting_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are encoded in threads beside each other."""
    taken: list[int] = []
    whole = blocks.block_attention
    monkeypatch.setattr(
        module, "block_attention", lambda *a, **o: taken.append(1) or whole(*a, **o)
    )
    q, k, v, _ = (x.bfloat16() for x in inputs(20, (6, 2), width=64))
    layout = layout_of((10, 10), causal=False)
    with torch.inference_mode():
        encoded = varlen_attention(q, k, v, layout, 0.3)
    assert not taken
    with torch.no_grad():
        trained = varlen_attention(q, k, v, layout, 0.3)
    assert len(taken) == blocks.has_bf16_instructions()
    torch.testing.assert_close(encoded, trained, rtol=2**-6, atol=2**-7)
