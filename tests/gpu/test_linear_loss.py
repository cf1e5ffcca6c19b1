"""The language-model loss on CUDA: the criterion of the CPU tests, and what only a GPU shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from drama.kernels import linear_loss_torch
from drama.kernels.linear_loss import choose_backend, linear_loss
from drama.kernels.linear_loss_reference import linear_loss_reference
from drama.testing import relative_error, token_batch, token_gradients

pytestmark = pytest.mark.gpu

BACKENDS = ["triton", "torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WEIGHTS: dict[str, dict[str, float]] = {
    "ce": {},
    "kl": {"ce_weight": 0.0, "kl_weight": 2.0},
    "both": {"kl_weight": 0.7},
}
TERMS = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


@TERMS
@pytest.mark.parametrize("shape", [(63, 101, 37), (300, 32_003, 96), (1000, 4096, 768)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_that_of_plain_torch(
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    weights: dict[str, float],
) -> None:
    """In 16 bits the logits' gradient is rounded too."""
    batch = token_batch(*shape, dtype=dtype, device="cuda")
    for temperature in (0.5, 1.0, 2.0):
        options: dict[str, Any] = {"temperature": temperature, **weights}
        exact, plain = (
            token_gradients(linear_loss_reference, batch, wide, **options)
            for wide in (torch.float64, torch.float32)
        )
        ours, again = (
            token_gradients(linear_loss, batch, dtype, **options, backend=backend) for _ in range(2)
        )
        names = ("loss", "dhidden", "dweight", "ce", "kl")[: len(ours)]
        for name, got, same, base, want in zip(names, ours, again, plain, exact, strict=True):
            # the GPU's exponential is off by two units in the last place, in one direction
            allowed = 2 * relative_error(base, want) + 10 * torch.finfo(torch.float32).eps
            allowed += 2 * relative_error(want.to(got.dtype), want)
            if dtype != torch.float32 and name.startswith("d"):
                allowed += torch.finfo(dtype).eps
            assert relative_error(got, want) <= allowed, (name, temperature)
            assert torch.equal(got, same), "twice the same call, twice the same bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_buffer_is_read_before_it_is_written(backend: str, dtype: torch.dtype) -> None:
    """Vocabularies that fill no block and no row of the buffer."""
    batch = token_batch(100, 333, 77, dtype=dtype, device="cuda")
    options: dict[str, Any] = {"temperature": 2.0, "kl_weight": 0.5, "backend": backend}
    want = token_gradients(linear_loss, batch, dtype, **options)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, dtype=dtype, device="cuda").isnan().all()
        got = token_gradients(linear_loss, batch, dtype, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("vocabulary", [128_256, 151_936])
def test_peak_memory_of_a_real_vocabulary(vocabulary: int, teacher: bool) -> None:
    """Buffers of 512 MiB, the weight's gradient in float32 and in its dtype, where the logits of
    16,384 tokens alone are 8 GiB in float32."""
    tokens, width = 16_384, 768
    batch = token_batch(64, vocabulary, width, width, dtype=torch.bfloat16, device="cuda")
    hidden_TD, teacher_TE = (x.repeat(tokens // 64, 1) for x in (batch[0], batch[3]))
    inputs = (hidden_TD.requires_grad_(), batch.weight_VD.requires_grad_())
    options: dict[str, Any] = batch.teacher() | {"teacher_hidden_TE": teacher_TE, "kl_weight": 1.0}
    target_T = batch.target_T.repeat(tokens // 64)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_loss(*inputs, target_T, **(options if teacher else {})).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    buffers = (1 + teacher) * 4 * linear_loss_torch.GPU_WORK_ELEMENTS
    assert peak <= buffers + 8 * vocabulary * width + 8 * tokens * width + 2**26


@TERMS
def test_nothing_waits_for_the_gpu(weights: dict[str, float]) -> None:
    batch = token_batch(300, 5000, 96, dtype=torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_() for x in (batch.hidden_TD, batch.weight_VD)]

    def run() -> tuple[Tensor, ...]:
        loss = linear_loss(
            *leaves, batch.target_T, **batch.teacher(), temperature=2.0, **weights, backend="triton"
        ).loss
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


def test_a_target_out_of_range_is_not_a_number() -> None:
    batch = token_batch(3, 64, 16, device="cuda")
    target_T = torch.tensor([64, 3, -100], device="cuda")
    output = linear_loss(batch.hidden_TD, batch.weight_VD, target_T)
    assert output.ce_T.isnan().tolist() == [True, False, True]


def test_auto_is_triton_but_for_float64() -> None:
    for dtype in DTYPES:
        assert choose_backend("auto", torch.empty(4, 8, dtype=dtype, device="cuda")) == "triton"
    double_TD = torch.empty(4, 8, dtype=torch.float64, device="cuda")
    assert choose_backend("auto", double_TD) == "torch"
