"""InfoNCE on CUDA: the criterion of the CPU tests, and what only a GPU shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from drama.kernels.infonce import choose_backend, infonce
from drama.kernels.infonce_reference import infonce_reference
from drama.testing import ContrastiveBatch, contrastive_batch, loss_gradients, relative_error

pytestmark = pytest.mark.gpu

BACKENDS = ["triton", "torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(63, 63, 64), (1000, 1000, 96), (100, 4099, 768)]
RULES: dict[str, dict[str, Any]] = {
    "nothing left out": {},
    "margin": {"margin": 0.1},
    "own negatives": {"own_negatives": True},
    "symmetric": {"symmetric": True},
    "all": {"margin": 0.05, "own_negatives": True, "symmetric": True},
}


def prefixes_and_weights(width: int, count: int) -> dict[str, Any]:
    prefixes = [width // 3, width // 2, width][-count:]
    return {"prefixes": prefixes, "prefix_weights": [0.5, 2.0, 1.0][-count:]}


def inputs(batch: ContrastiveBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.q_BD, batch.k_ND, batch.positive_B


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("num_prefixes", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_that_of_plain_torch(
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    num_prefixes: int,
    rules: dict[str, Any],
) -> None:
    # in 768 dimensions others are so far away that 1 - p would be less than float64 resolves
    cosine = 0.4 if shape[2] == 768 else 0.67
    batch = contrastive_batch(*shape, cosine=cosine, dtype=dtype, device="cuda")
    wide = (batch.q_BD.double(), batch.k_ND.double(), batch.positive_B)
    for temperature in (0.01, 0.02, 0.05, 0.1):
        options = {"temperature": temperature, "k_ids_N": batch.ids_N, **rules}
        options |= prefixes_and_weights(shape[2], num_prefixes)
        exact = loss_gradients(infonce_reference, *wide, **options)
        plain = loss_gradients(infonce_reference, *inputs(batch), **options)
        ours, again = (
            loss_gradients(infonce, *inputs(batch), **options, backend=backend) for _ in range(2)
        )
        # a rounding of the largest logit, 1 / temperature, moves a softmax by as much; and bf16 or
        # fp16 gradients are rounded where they are stored
        floor = torch.finfo(torch.float32).eps / temperature
        floor += 0 if dtype == torch.float32 else torch.finfo(dtype).eps
        names = "dq", "dk", "dtemperature"
        for name, got, base, want in zip(names, ours[1:], plain[1:], exact[1:], strict=True):
            slack = 1 if want.ndim else 8  # the temperature's is one sum, whose terms cancel
            error, allowed = relative_error(got, want), 2 * relative_error(base, want)
            assert error <= allowed + slack * floor, (name, temperature)
        for got, same in zip(ours, again, strict=True):
            assert torch.equal(got, same), "twice the same call, twice the same bits"
        error, base = ((x[0] - exact[0]).abs().item() for x in (ours, plain))
        assert error <= 2 * base + 2**-24 / temperature, temperature

        got = infonce(*inputs(batch), **options, backend=backend)
        want = infonce_reference(*wide, **options)
        torch.testing.assert_close(got.loss_P.double(), want.loss_P, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.lse_PB.double(), want.lse_PB, rtol=1e-4, atol=1e-4)
        if "margin" not in rules:  # a score at the margin falls either way
            assert torch.equal(got.num_masked_B, want.num_masked_B)
        with torch.no_grad():
            alone = infonce(*inputs(batch), **options, backend=backend)
        torch.testing.assert_close(alone.loss, got.loss, rtol=1e-6, atol=1e-7)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every uninitialised allocation holds NaN, or the largest integer."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    # warn only: torch has no `cumsum` of floats on CUDA that it calls deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.filterwarnings("ignore:.*determinis.*:UserWarning")
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("num_prefixes", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_buffer_is_read_before_it_is_written(
    poisoned: None, backend: str, dtype: torch.dtype, num_prefixes: int, rules: dict[str, Any]
) -> None:
    """Rows, columns and widths that fill no tile, so that what lies outside could leak in."""
    assert torch.empty(3, dtype=dtype, device="cuda").isnan().all()
    batch = contrastive_batch(100, 333, 77, dtype=dtype, device="cuda")
    options = {"temperature": 0.05, "k_ids_N": batch.ids_N, **rules}
    options |= prefixes_and_weights(77, num_prefixes)
    wide = (batch.q_BD.double(), batch.k_ND.double(), batch.positive_B)
    exact = loss_gradients(infonce_reference, *wide, **options)
    plain = loss_gradients(infonce_reference, *inputs(batch), **options)
    ours = loss_gradients(infonce, *inputs(batch), **options, backend=backend)
    for got, base, want in zip(ours, plain, exact, strict=True):
        floor = 8 * torch.finfo(torch.float32).eps / 0.05 + torch.finfo(dtype).eps
        assert relative_error(got, want) <= 2 * relative_error(base, want) + floor


@pytest.mark.parametrize("backend", BACKENDS)
def test_peak_memory_at_65536(backend: str) -> None:
    """Below 1 GiB beyond inputs and gradients, where the logits alone are 8 GiB in bf16."""
    rows, width = 65536, 768

    def run(rows: int) -> int:
        generator = torch.Generator("cuda").manual_seed(0)
        q_BD, k_BD = (
            torch.randn(
                rows, width, generator=generator, dtype=torch.bfloat16, device="cuda"
            ).requires_grad_()
            for _ in range(2)
        )
        numbers_B = torch.arange(rows, device="cuda")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        infonce(
            q_BD, k_BD, numbers_B, temperature=0.05, k_ids_N=numbers_B // 2, backend=backend
        ).loss.backward()
        assert q_BD.grad is not None
        assert k_BD.grad is not None
        gradients = q_BD.grad.nbytes + k_BD.grad.nbytes
        return torch.cuda.max_memory_allocated() - before - gradients

    run(1024)  # what the first call takes for good, such as cuBLAS's workspace
    assert run(rows) < 2**30


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]], ids=["plain sum", "weighted"])
def test_nothing_waits_for_the_gpu(weights: list[float] | None, rules: dict[str, Any]) -> None:
    """With a tensor for the temperature, once the kernels are compiled."""
    batch = contrastive_batch(300, 500, 96, dtype=torch.bfloat16, device="cuda")
    temperature = torch.tensor(0.05, device="cuda", requires_grad=True)
    leaves = [batch.q_BD.requires_grad_(), batch.k_ND.requires_grad_(), temperature]

    def run() -> tuple[Tensor, ...]:
        loss = infonce(
            *inputs(batch), temperature=temperature, prefixes=[32, 48, 96], prefix_weights=weights,
            k_ids_N=batch.ids_N, backend="triton", **rules,
        ).loss  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    first = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_node_for_torch_compile(backend: str, rules: dict[str, Any]) -> None:
    batch = contrastive_batch(100, 333, 96, dtype=torch.bfloat16, device="cuda")
    options = {"temperature": 0.05, "k_ids_N": batch.ids_N, "backend": backend, **rules}
    options |= prefixes_and_weights(96, 3)
    compiled = torch.compile(infonce, fullgraph=True)
    want, got = (loss_gradients(f, *inputs(batch), **options) for f in (infonce, compiled))
    for x, y in zip(want, got, strict=True):
        assert torch.equal(x, y)


def test_auto_is_triton_where_the_matrix_is_large() -> None:
    for dtype in DTYPES:
        assert choose_backend("auto", torch.empty(4096, 8, dtype=dtype, device="cuda"), 4096) == (
            "triton"
        )
    double_BD = torch.empty(4096, 8, dtype=torch.float64, device="cuda")
    assert choose_backend("auto", double_BD, 4096) == "torch"
