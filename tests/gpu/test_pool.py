"""Pooling on CUDA: the same criterion as on the CPU, and the sizes that only a GPU can take."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from drama.kernels.pool import MAX_TRITON_WIDTH, choose_backend, pool_last, pool_mean
from drama.kernels.pool_reference import pool_reference
from drama.testing import PackedStates, assert_as_exact, packed_states, with_gradients

pytestmark = pytest.mark.gpu

POOLS = {"last": pool_last, "mean": pool_mean}
LENGTHS = (1, 63, 3, 1000, 1, 130, *[17] * 300)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(
    states: PackedStates, dtype: torch.dtype, function: partial[Tensor], weighted: bool
) -> list[Tensor]:
    inputs = [states.hidden_TD, states.weight_D][: 1 + weighted]
    return with_gradients(
        lambda h, *w: function(h, states.cu_seqlens, *w), inputs, states.grad_BD, dtype
    )


@pytest.mark.parametrize("pooling", POOLS)
@pytest.mark.parametrize("weighted", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "any"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [63, 768, 1000, 2048, MAX_TRITON_WIDTH])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_errors_are_at_most_twice_those_of_plain_torch(
    backend: str, width: int, dtype: torch.dtype, normalize: bool, weighted: bool, pooling: str
) -> None:
    states = packed_states(LENGTHS, width, dtype=dtype, device="cuda")
    reference = partial(pool_reference, pooling=pooling, normalize=normalize)
    ours = partial(POOLS[pooling], normalize=normalize, backend=backend)
    exact, plain, got, again = (
        run(states, kind, function, weighted)
        for function, kind in (
            (reference, torch.float64), (reference, dtype), (ours, dtype), (ours, dtype)
        )
    )  # fmt: skip
    assert_as_exact(got, plain, exact)
    for x, y in zip(got, again, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("pooling", POOLS)
def test_rows_beyond_two_to_the_31_elements(pooling: str) -> None:
    """Offsets are int64: the last sequence lies past 2^31 elements."""
    width, length = 4096, 2**18 + 1000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * 2 * length * width:
        pytest.skip("needs 13 GB of GPU memory")
    hidden_TD = torch.ones(2 * length, width, dtype=torch.bfloat16, device="cuda")
    hidden_TD[length:] = 3
    cu_seqlens = torch.tensor([0, length, 2 * length], dtype=torch.int32, device="cuda")
    hidden_TD.requires_grad_()
    out_BD = POOLS[pooling](hidden_TD, cu_seqlens)
    assert out_BD[:, ::1000].tolist() == [[1.0] * 5, [3.0] * 5]
    (dh_TD,) = torch.autograd.grad(out_BD.sum(), hidden_TD)
    assert dh_TD[-1].gt(0).all()


def test_strides_and_torch_compile() -> None:
    states = packed_states(LENGTHS, 96, dtype=torch.bfloat16, device="cuda")
    cu_seqlens, weight_D = states.cu_seqlens, states.weight_D
    apart_TD = torch.cat([states.hidden_TD, states.hidden_TD], 1)[:, :96]
    assert choose_backend("auto", apart_TD) == "triton"
    assert choose_backend("auto", apart_TD.double()) == "torch"
    for pool in POOLS.values():
        want_BD = pool(states.hidden_TD, cu_seqlens, weight_D, normalize=True)
        for hidden_TD in (apart_TD, states.hidden_TD.T.contiguous().T):
            assert torch.equal(pool(hidden_TD, cu_seqlens, weight_D, normalize=True), want_BD)
        compiled = torch.compile(pool, fullgraph=True)
        got_BD = compiled(states.hidden_TD, cu_seqlens, weight_D, normalize=True)
        assert torch.equal(got_BD, want_BD)
