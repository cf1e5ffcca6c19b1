"""The torch path, the facade and the Module against a loop over the sequences."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from drama.kernels import pool as facade
from drama.kernels import pool_torch
from drama.kernels.pool import PooledNorm, choose_backend, pool_last, pool_mean
from drama.kernels.pool_reference import pool_reference
from drama.testing import assert_as_exact, packed_states, with_gradients

POOLS = {"last": pool_last, "mean": pool_mean}
LENGTHS = (1, 63, 3, 1000, 1, 130)
EVERY = [
    pytest.mark.parametrize("pooling", POOLS),
    pytest.mark.parametrize("weighted", [True, False], ids=["norm", "raw"]),
    pytest.mark.parametrize("normalize", [True, False], ids=["unit", "any"]),
]


def every(test):
    for mark in EVERY:
        test = mark(test)
    return test


def compare(states, dtype, pooling, weighted, normalize, floor=1e-7):
    """Ours against the reference in the same dtype, both against it in float64."""
    inputs = [states.hidden_TD, states.weight_D][: 1 + weighted]
    ours = partial(POOLS[pooling], normalize=normalize)
    theirs = partial(pool_reference, pooling=pooling, normalize=normalize)
    exact, plain, got = (
        with_gradients(lambda h, *w, f=f: f(h, states.cu_seqlens, *w), inputs, states.grad_BD, kind)
        for f, kind in ((theirs, torch.float64), (theirs, dtype), (ours, dtype))
    )
    assert_as_exact(got, plain, exact, floor)


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    width=st.integers(1, 70),
    piece=st.integers(1, 50),
    pooling=st.sampled_from(list(POOLS)),
    weighted=st.booleans(),
    normalize=st.booleans(),
)
def test_float64_equals_autograd(lengths, width, piece, pooling, weighted, normalize):
    states = packed_states(lengths, width, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_torch, "PIECE", piece)
        compare(states, torch.float64, pooling, weighted, normalize, floor=1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [63, 1000])
def test_errors_are_at_most_twice_those_of_plain_torch(width, dtype, pooling, weighted, normalize):
    compare(packed_states(LENGTHS, width, dtype=dtype), dtype, pooling, weighted, normalize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_last_is_transformers_norm_to_the_last_bit(dtype):
    states = packed_states(LENGTHS, 100, dtype=dtype)
    norm = LlamaRMSNorm(100, eps=1e-5).to(dtype)
    norm.weight.data = states.weight_D
    pooled = PooledNorm(norm, "last")
    assert pooled.weight is norm.weight
    assert list(pooled.state_dict()) == ["weight"]
    want_TD = norm(states.hidden_TD)
    assert torch.equal(pooled(states.hidden_TD), want_TD)
    last_B = states.cu_seqlens[1:].long() - 1
    assert torch.equal(pooled(states.hidden_TD, states.cu_seqlens), want_TD[last_B])
    assert torch.equal(pool_last(states.hidden_TD, states.cu_seqlens), states.hidden_TD[last_B])


def test_the_module_pools_as_told_and_trains_its_weight():
    states = packed_states(LENGTHS, 24, dtype=torch.float64)
    norm = LlamaRMSNorm(24, eps=1e-2).double()
    norm.weight.data = states.weight_D
    for pooling in POOLS:
        got = PooledNorm(norm, pooling)(states.hidden_TD, states.cu_seqlens)
        arguments = (states.hidden_TD, states.cu_seqlens, norm.weight)
        want = pool_reference(*arguments, pooling=pooling, eps=1e-2)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
        grads = [torch.autograd.grad(x, norm.weight, states.grad_BD)[0] for x in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-13)


@every
def test_strides(pooling, weighted, normalize):
    """Rows apart, elements apart, transposed; gradients of any strides."""
    states = packed_states(LENGTHS, 40)
    pool = partial(POOLS[pooling], normalize=normalize)
    weights = [states.weight_D][:weighted]
    for twist in (
        lambda x: torch.cat([x, x], 1)[:, :40],
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x.T.contiguous().T,
    ):
        results = []
        for change in (lambda x: x.contiguous(), twist):
            hidden_TD = change(states.hidden_TD).requires_grad_()
            out_BD = pool(hidden_TD, states.cu_seqlens, *weights)
            grad_BD = change(states.grad_BD)
            results += [(out_BD, torch.autograd.grad(out_BD, hidden_TD, grad_BD)[0])]
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    spread = torch.autograd.grad(pool(hidden_TD, states.cu_seqlens, *weights).sum(), hidden_TD)[0]
    assert spread.shape == hidden_TD.shape


@every
def test_same_bits_twice_from_poisoned_memory(pooling, weighted, normalize, monkeypatch):
    """Every uninitialised allocation is filled with NaN first."""
    states = packed_states(LENGTHS, 40)
    inputs = [states.hidden_TD, states.weight_D][: 1 + weighted]
    pool = partial(POOLS[pooling], normalize=normalize)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        first, second = (
            with_gradients(
                lambda h, *w: pool(h, states.cu_seqlens, *w), inputs, states.grad_BD, torch.float32
            )
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert x.isfinite().all()


@every
def test_rows_of_next_to_nothing(pooling, weighted, normalize):
    """Zero has a finite gradient, and below 1e-12 the L2 norm is a constant."""
    states = packed_states((2, 3, 4), 16, dtype=torch.float64)
    states.hidden_TD[2:5] = 0
    states.hidden_TD[5:] *= 1e-18
    compare(states, torch.float64, pooling, weighted, normalize, floor=1e-12)


@every
def test_no_grad_autocast_and_torch_compile(pooling, weighted, normalize):
    states = packed_states((1, 5, 90), 24)
    inputs = [states.hidden_TD, states.weight_D][: 1 + weighted]

    def run(pool):
        return with_gradients(
            lambda h, *w: pool(h, states.cu_seqlens, *w, normalize=normalize),
            inputs, states.grad_BD, torch.float32,
        )  # fmt: skip

    pool = POOLS[pooling]
    want = run(pool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(pool)
    compiled = run(torch.compile(pool, fullgraph=True, backend="aot_eager"))
    for got in (cast, compiled):
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            weights = [states.weight_D][:weighted]
            out_BD = pool(states.hidden_TD, states.cu_seqlens, *weights, normalize=normalize)
        assert not out_BD.requires_grad
        assert torch.equal(out_BD.double(), want[0])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_keeps_its_contract(pooling, weighted, normalize, dtype):
    states = packed_states((2, 5), 8, dtype=dtype)
    weight_D = states.weight_D.requires_grad_() if weighted else None
    arguments = (states.hidden_TD.requires_grad_(), states.cu_seqlens, weight_D)
    torch.library.opcheck(facade._pool, (*arguments, pooling, 1e-6, normalize, "torch"))


def test_a_weight_of_another_dtype_keeps_it():
    states = packed_states((2, 5), 8, dtype=torch.bfloat16)
    weight_D = states.weight_D.float().requires_grad_()
    for pool in POOLS.values():
        out_BD = pool(states.hidden_TD, states.cu_seqlens, weight_D)
        assert out_BD.dtype == torch.bfloat16
        assert torch.autograd.grad(out_BD.sum(), weight_D)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pooling", POOLS)
def test_what_is_saved(pooling, dtype):
    """Inputs, and beside them two scalars a row, or one a token and B rows in float32."""
    lengths, width = (600, 700, 900), 32
    states = packed_states(lengths, width, dtype=dtype)
    hidden_TD, weight_D = states.hidden_TD.requires_grad_(), states.weight_D.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        POOLS[pooling](hidden_TD, states.cu_seqlens, weight_D, normalize=True)
    inputs = {x.data_ptr() for x in (hidden_TD, states.cu_seqlens, weight_D)}
    beside = sum(x.nbytes for x in kept if x.data_ptr() not in inputs)
    num_rows = len(lengths)
    assert beside == 4 * (2 * num_rows if pooling == "last" else sum(lengths) + 33 * num_rows)


@pytest.mark.parametrize("pooling", POOLS)
def test_work_memory_does_not_grow_with_the_tokens(pooling, monkeypatch):
    """Live bytes at their highest, counted by the profiler: nothing near a T x D tensor."""
    monkeypatch.setattr(pool_torch, "PIECE", 32)
    states = packed_states((3000, 1, 1000), 256)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        POOLS[pooling](states.hidden_TD, states.cu_seqlens, states.weight_D, normalize=True)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()  # negative where memory is freed
        peak = max(peak, live)
    assert 0 < peak < 4 * (4 * 32 * 256 + 4001) + 2**14
    assert peak < states.hidden_TD.nbytes / 20


def test_backends_by_device_and_what_does_not_fit():
    states = packed_states((2, 5), 8)
    hidden_TD, cu_seqlens, weight_D = states[:3]
    assert choose_backend("auto", hidden_TD) == "torch"
    for message, arguments, backend in (
        ("hidden is torch.float32 of shape", (hidden_TD[0], cu_seqlens), "auto"),
        ("hidden is torch.int64", (hidden_TD.long(), cu_seqlens), "auto"),
        ("cu_seqlens is torch.float32", (hidden_TD, cu_seqlens.float()), "auto"),
        ("weight has shape", (hidden_TD, cu_seqlens, weight_D[:7]), "auto"),
        ("backend 'cuda' is none of auto, triton", (hidden_TD, cu_seqlens), "cuda"),
        ("no float64, not torch.float64", (hidden_TD.double(), cu_seqlens), "triton"),
        ("up to 4096", (torch.zeros(7, 5000), cu_seqlens), "triton"),
    ):  # fmt: skip
        for pool in POOLS.values():
            with pytest.raises(ValueError, match=message):
                pool(*arguments, backend=backend)


def test_triton_where_it_is_missing_is_named(monkeypatch):
    states = packed_states((2, 5), 8)
    monkeypatch.setattr(facade.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package triton"):
        pool_last(states.hidden_TD, states.cu_seqlens, backend="triton")
