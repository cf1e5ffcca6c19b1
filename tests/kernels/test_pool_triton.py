"""The Triton kernels: run by the interpreter, and compiled ahead of time for every target."""

import itertools
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from drama.kernels import pool_triton
from drama.kernels.aot import TARGETS, compile_report
from drama.kernels.pool import MAX_TRITON_WIDTH, pool_last, pool_mean
from drama.kernels.pool_reference import pool_reference
from drama.testing import assert_as_exact, packed_states, with_gradients

POOLS = {"last": pool_last, "mean": pool_mean}
MODULE = "drama.kernels.pool_triton"
OPTIONS = list(itertools.product(POOLS, [True, False], [True, False]))
FLAGS = pytest.mark.parametrize(("pooling", "weighted", "normalize"), OPTIONS)
# the interpreter cuts float32 to bfloat16 off, a GPU rounds: one unit in the last place
FLOORS = {torch.float32: 1e-7, torch.float16: 1e-7, torch.bfloat16: 2**-8}


def run(states, dtype, function, weighted, **options):
    inputs = [states.hidden_TD, states.weight_D][: 1 + weighted]
    return with_gradients(
        lambda h, *w: function(h, states.cu_seqlens, *w, **options), inputs, states.grad_BD, dtype
    )


def compare(states, dtype, pooling, weighted, normalize):
    reference = partial(pool_reference, pooling=pooling)
    plain, exact = (
        run(states, kind, reference, weighted, normalize=normalize)
        for kind in (dtype, torch.float64)
    )
    options = {"normalize": normalize, "backend": "triton"}
    got = run(states, dtype, POOLS[pooling], weighted, **options)
    assert_as_exact(got, plain, exact, FLOORS[dtype])


@FLAGS
def test_nothing_outside_the_outputs_is_written(
    pooling, weighted, normalize, interpreted, monkeypatch
):
    """Masks of rows and columns: a margin round every output keeps its value."""
    kernels = interpreted(MODULE)
    margins = []

    def allocate(shape, dtype, device):
        size = torch.Size(shape).numel() if not isinstance(shape, int) else shape
        whole = torch.full((size + 8192,), 7.0, dtype=dtype, device=device)
        margins.append((whole[:4096], whole[4096 + size :]))
        return whole[4096 : 4096 + size].view(shape)

    states = packed_states((3, 1, 9), 40)
    hidden_TD, cu_seqlens, weight_D, grad_BD = states
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.Tensor,
            "new_empty",
            lambda self, shape, dtype=None, device=None: allocate(
                shape, dtype or self.dtype, device or self.device
            ),
        )
        patch.setattr(torch, "empty", allocate)
        patch.setattr(torch, "zeros", lambda *a, **k: allocate(*a, **k).zero_())
        weight = weight_D if weighted else None
        _, *saved = kernels.forward(hidden_TD, cu_seqlens, weight, pooling, 1e-6, normalize)
        kernels.backward(grad_BD, hidden_TD, cu_seqlens, weight, *saved, pooling)
    assert len(margins) >= 6
    for before, after in margins:
        assert (before == 7).all()
        assert (after == 7).all()


@FLAGS
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize(
    ("lengths", "width"), [((1, 7, 3, 1, 30), 63), ((2, 9), 1000)], ids=["narrow", "wide"]
)
def test_errors_are_at_most_twice_those_of_plain_torch(
    lengths, width, dtype, pooling, weighted, normalize, interpreted
):
    interpreted(MODULE)
    compare(packed_states(lengths, width, dtype=dtype), dtype, pooling, weighted, normalize)


@FLAGS
@pytest.mark.parametrize("width", [5, 512, 513, 4096])
def test_every_block_size(width, pooling, weighted, normalize, interpreted):
    interpreted(MODULE)
    compare(packed_states((3, 1), width), torch.float32, pooling, weighted, normalize)


@FLAGS
def test_rows_of_next_to_nothing(pooling, weighted, normalize, interpreted):
    """Zero has a finite gradient, and below 1e-12 the L2 norm is a constant."""
    interpreted(MODULE)
    states = packed_states((2, 3, 4), 16)
    states.hidden_TD[2:5] = 0
    states.hidden_TD[5:] *= 1e-18
    compare(states, torch.float32, pooling, weighted, normalize)


@FLAGS
def test_many_rows_a_program_and_many_programs_a_row(
    pooling, weighted, normalize, interpreted, monkeypatch
):
    kernels = interpreted(MODULE)
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    monkeypatch.setattr(kernels, "TILES", 1)
    compare(packed_states((50, 1, 2, 90, 4), 40), torch.float32, pooling, weighted, normalize)
    monkeypatch.setattr(kernels, "MAX_SPLITS", 2)
    compare(packed_states((50, 1, 2, 90, 4), 40), torch.float32, pooling, weighted, normalize)


def test_the_mean_of_a_long_text_is_as_exact_as_of_a_short_one(interpreted):
    kernels = interpreted(MODULE)
    states = packed_states((8_000,), 2)
    got_BD = pool_mean(states.hidden_TD, states.cu_seqlens, states.weight_D, backend="triton")
    doubles = (states.hidden_TD.double(), states.cu_seqlens, states.weight_D.double())
    want_BD = pool_reference(*doubles, pooling="mean")
    typical = 8_000**-0.5  # of a mean of so many rows of both signs
    assert (got_BD - want_BD).abs().max() <= 3e-7 * typical
    assert kernels.blocks(2).block_l < 8_000 / 500, "else there is little to add up"


@FLAGS
def test_strides(pooling, weighted, normalize, interpreted):
    interpreted(MODULE)
    states = packed_states((1, 7, 30), 40)
    options = {"normalize": normalize, "backend": "triton"}
    want = run(states, torch.float32, POOLS[pooling], weighted, **options)
    for twist in (lambda x: torch.cat([x, x], 1)[:, :40], lambda x: x.T.contiguous().T):
        hidden_TD, grad_BD = (twist(x) for x in (states.hidden_TD, states.grad_BD))
        twisted = states._replace(hidden_TD=hidden_TD, grad_BD=grad_BD)
        got = run(twisted, torch.float32, POOLS[pooling], weighted, **options)
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)


@FLAGS
def test_same_bits_twice_from_poisoned_memory(
    pooling, weighted, normalize, interpreted, monkeypatch
):
    interpreted(MODULE)
    states = packed_states((1, 7, 30, 4), 40)
    options = {"normalize": normalize, "backend": "triton"}
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            run(states, torch.float32, POOLS[pooling], weighted, **options) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert x.isfinite().all()


@FLAGS
def test_the_operator_says_what_the_kernels_return(pooling, weighted, normalize, interpreted):
    interpreted(MODULE)
    states = packed_states((2, 5), 8, dtype=torch.float16)
    weight_D = states.weight_D.requires_grad_() if weighted else None
    arguments = (states.hidden_TD.requires_grad_(), states.cu_seqlens, weight_D)
    tests = ("test_schema", "test_faketensor")
    options = (pooling, 1e-6, normalize, "triton")
    torch.library.opcheck(torch.ops.drama.pool, (*arguments, *options), test_utils=tests)


def kernel_and_arguments(name, dtype, block, flags):
    """What `compile_report` wants to know of one launch."""
    kernel = getattr(pool_triton, name)
    pointers = {"cu_ptr": "*i32"} | {
        f"{x}_ptr": "*fp32" for x in ("rstd", "inverse", "mean", "dw")
    }  # fmt: skip
    scalars = {"eps": "fp32", "stride": "i32", "width": "i32", "num_rows": "i32"}
    constants = dict(zip(("HAS_WEIGHT", "NORMALIZE"), flags, strict=True))
    constants |= {"BLOCK_D": block.block_d}
    warps = block.row_warps
    if name.startswith("_mean"):
        constants["BLOCK_L"], warps = block.block_l, block.tile_warps
    signature = {
        argument: (pointers | scalars).get(argument, f"*{dtype}")
        for argument in kernel.arg_names
        if argument not in constants
    }
    return kernel, signature, constants, warps


KERNELS = ("_last_forward", "_last_backward", "_mean_forward", "_mean_backward")
BLOCKS = sorted({pool_triton.blocks(width) for width in range(1, MAX_TRITON_WIDTH + 1)})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: str(block.block_d))
def test_every_configuration_fits_every_target(block, dtype, target):
    for name in KERNELS:
        kernel, signature, constants, warps = kernel_and_arguments(name, dtype, block, (True, True))
        report = compile_report(kernel, signature, constants, target, num_warps=warps, num_stages=3)
        assert report.fits, f"{name}: {report.spilled} spilled, {report.shared_bytes} bytes"


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)], ids=str)
def test_what_is_left_out_fits_too(flags):
    for name, block in itertools.product(KERNELS, (BLOCKS[0], BLOCKS[-1])):
        kernel, signature, constants, warps = kernel_and_arguments(name, "bf16", block, flags)
        report = compile_report(
            kernel, signature, constants, "sm_90", num_warps=warps, num_stages=3
        )
        assert report.fits, f"{name}: {report.spilled} spilled, {report.shared_bytes} bytes"
