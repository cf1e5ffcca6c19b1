"""RMSNorm and SwiGLU in blocks of rows: against float64 and transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from drama import row_blocks
from drama.memory import GraphBytes

WIDTH, EPS = 24, 1e-5


@pytest.fixture(params=[2**19, 3 * WIDTH, 1], ids=["one-block", "three-rows", "row-by-row"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK", request.param)


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def norm(x: Tensor, weight_D: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight_D


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def run(function, given: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in given]
    out = function(*leaves)
    assert out.dtype == dtype
    return [x.double() for x in (out, *torch.autograd.grad(out, leaves, grad.to(dtype)))]


CASES = {
    "norm": (lambda x, w: row_blocks.rms_norm(x, w, EPS), norm, (WIDTH,)),
    "silu_mul": (row_blocks.silu_mul, silu_mul, (1, 10, WIDTH)),
}


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_formula(
    case: str, dtype: torch.dtype, limit: float
) -> None:
    ours, formula, second = CASES[case]
    given = [draw(1, 10, WIDTH, seed=0), draw(*second, seed=1)]
    given = [x.to(dtype).double() for x in given]
    grad = draw(1, 10, WIDTH, seed=2).to(dtype).double()
    for got, want in zip(
        run(ours, given, grad, dtype), run(formula, given, grad, torch.float64), strict=True
    ):
        assert (got - want).norm() <= limit * want.norm()


@pytest.mark.usefixtures("block")
def test_bf16_is_rounded_where_transformers_rounds_it() -> None:
    x = draw(40, WIDTH, seed=0).bfloat16()
    theirs = LlamaRMSNorm(WIDTH, EPS).bfloat16()
    theirs.weight.data = draw(WIDTH, seed=1).bfloat16()
    gate, up = (draw(40, WIDTH, seed=seed).bfloat16() for seed in (2, 3))
    assert torch.equal(row_blocks.silu_mul(gate, up), F.silu(gate) * up)
    ours = row_blocks.rms_norm(x, theirs.weight, EPS)
    # the sum of squares may differ by a rounding of float32
    assert (ours == theirs(x)).float().mean() > 0.99
    torch.testing.assert_close(ours, theirs(x), rtol=2**-7, atol=0)


def test_strided_rows_and_gradients() -> None:
    """As a slice or a transposition hands them over."""
    x, grad = (draw(WIDTH, 10, seed=seed).T for seed in (0, 1))
    weight_D = draw(WIDTH, seed=2)
    for got, want in zip(
        run(lambda x, w: row_blocks.rms_norm(x, w, EPS), [x, weight_D], grad, torch.float64),
        run(norm, [x, weight_D], grad, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_a_graph_keeps_what_goes_in() -> None:
    x, gate, up = (draw(50, WIDTH, seed=i).float().requires_grad_() for i in range(3))
    counter = GraphBytes([])
    with counter.watch():
        row_blocks.rms_norm(x, torch.ones(WIDTH), EPS)
        row_blocks.silu_mul(gate, up)
    assert counter.total == 4 * (3 * 50 * WIDTH + 50 + WIDTH)
