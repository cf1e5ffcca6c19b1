"""The CUDA back ends in bf16: never further from float64 than twice plain torch in bf16."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from drama.attention import PackedLayout, _by_run, _torch_varlen, choose_backend, varlen_attention

pytestmark = pytest.mark.gpu

LENGTHS = {
    "ragged": (1, 63, 130, 5, 1000, 17),
    "equal": (128,) * 8,
    "single-tokens": (1, 1, 1),
    "long-runs": (7, 90, *(512,) * 17, 600, 2100, 2100),
}
Attention = Callable[[Tensor, Tensor, Tensor, PackedLayout, float], Tensor]


def plain_torch(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    """Text by text, every product and the softmax in the inputs' dtype."""
    group = q_THE.shape[1] // k_TGE.shape[1]
    k_THE, v_THE = (x.repeat_interleave(group, 1) for x in (k_TGE, v_TGE))
    outputs = []
    for q, k, v in zip(*(x.split(layout.lengths) for x in (q_THE, k_THE, v_THE)), strict=True):
        logits = torch.einsum("the,she->hts", q, k) * scale
        if layout.causal:
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            logits = logits.masked_fill(hidden, -math.inf)
        outputs.append(torch.einsum("hts,she->the", logits.softmax(-1), v))
    return torch.cat(outputs)


def flash_attn_varlen(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    assert choose_backend("cuda", torch.bfloat16)[0] == "flash-attn varlen"
    return varlen_attention(q_THE, k_TGE, v_TGE, layout, scale)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("heads", [(4, 4), (12, 3)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(
    "attention",
    [_torch_varlen, _by_run, flash_attn_varlen, varlen_attention],
    ids=lambda f: f.__name__,
)
def test_errors_are_at_most_twice_those_of_plain_torch(
    attention: Attention, lengths: tuple[int, ...], heads: tuple[int, int], causal: bool
) -> None:
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    layout = PackedLayout(cu_seqlens, lengths, causal)
    generator = torch.Generator("cuda").manual_seed(0)
    *leaves, grad_THE = (
        torch.randn(sum(lengths), count, 64, generator=generator, device="cuda").bfloat16()
        for count in (heads[0], heads[1], heads[1], heads[0])
    )

    def run(way: Attention, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in (x.detach().clone() for x in leaves))
        out_THE = way(q, k, v, layout, 0.125)
        grads = torch.autograd.grad(out_THE, (q, k, v), grad_THE.to(dtype))
        return [x.double() for x in (out_THE, *grads)]

    exact = run(plain_torch, torch.float64)
    plain = run(plain_torch, torch.bfloat16)
    ours = run(attention, torch.bfloat16)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), exact, plain, ours, strict=True):
        # the floor: dq and dk of a text of one token are 0, but for a difference of float32 sums
        bound = 2 * (b - a).norm() + 1e-3 * a.norm() + 1e-4 * grad_THE.double().norm()
        assert (c - a).norm() <= bound, name
