"""Pooling against a loop over the sequences, in float64."""

import torch

from drama.kernels.pool import pool_last, pool_mean

LENGTHS = [1, 7, 3, 64]


def packed(dtype: torch.dtype):
    hidden_TD = torch.randn(sum(LENGTHS), 24, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return hidden_TD.to(dtype), cu_seqlens


def test_last_takes_each_sequence_last_row():
    hidden_TD, cu_seqlens = packed(torch.float32)
    want = torch.stack([part[-1] for part in hidden_TD.split(LENGTHS)])
    assert torch.equal(pool_last(hidden_TD, cu_seqlens), want)


def test_mean_and_its_gradient():
    hidden_TD, cu_seqlens = packed(torch.float64)
    hidden_TD.requires_grad_()
    want = torch.stack([part.mean(0) for part in hidden_TD.split(LENGTHS)])
    got = pool_mean(hidden_TD, cu_seqlens)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    upstream = torch.randn_like(got)
    grads = [torch.autograd.grad(x, hidden_TD, upstream)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-14, atol=1e-14)


def test_mean_of_bfloat16_is_summed_in_float32():
    hidden_TD, cu_seqlens = packed(torch.bfloat16)
    want = torch.stack([part.double().mean(0) for part in hidden_TD.split(LENGTHS)])
    error = (pool_mean(hidden_TD, cu_seqlens).double() - want).abs().max()
    assert error <= want.abs().max() * 2**-8  # one rounding at the end
