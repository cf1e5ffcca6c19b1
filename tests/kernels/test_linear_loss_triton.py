"""The Triton back end: run by Triton's interpreter, and compiled ahead of time for every target."""

import pytest
import torch

pytest.importorskip("triton")

from drama.kernels import linear_loss_triton
from drama.kernels.aot import TARGETS, compile_report
from drama.kernels.linear_loss import linear_loss
from drama.kernels.linear_loss_reference import linear_loss_reference
from drama.testing import relative_error, token_batch, token_gradients

# numpy, which the interpreter computes with, warns of what `tl.where` leaves out
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

WEIGHTS = {"ce": {}, "kl": {"ce_weight": 0.0, "kl_weight": 2.0}, "both": {"kl_weight": 0.7}}
TERMS = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


@pytest.fixture
def kernels(interpreted, monkeypatch):
    """Small blocks and chunks: several of each, none of them full."""
    module = interpreted("drama.kernels.linear_loss_triton")
    monkeypatch.setattr(module, "BLOCK_V", 64)
    monkeypatch.setattr(module, "WORK_ELEMENTS", 500)
    return module


@TERMS
@pytest.mark.parametrize("temperature", [0.5, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(kernels, dtype, temperature, weights):
    """The criterion of `test_linear_loss.py`; in fp16 the logits' gradient is rounded too."""
    batch = token_batch(9, 101, 13, 7, dtype=dtype)
    options = {"temperature": temperature, **weights}
    exact, plain = (
        token_gradients(linear_loss_reference, batch, wide, **options)
        for wide in (torch.float64, torch.float32)
    )
    ours, again = (
        token_gradients(linear_loss, batch, dtype, **options, backend="triton") for _ in range(2)
    )
    for number, (got, same, base, want) in enumerate(zip(ours, again, plain, exact, strict=True)):
        allowed = 2 * relative_error(base, want) + torch.finfo(torch.float32).eps
        allowed += 2 * relative_error(want.to(got.dtype), want)
        if dtype == torch.float16 and number in (1, 2):
            allowed += torch.finfo(dtype).eps
        assert relative_error(got, want) <= allowed, number
        assert torch.equal(got, same), "twice the same call, twice the same bits"


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 64, 65])
def test_every_edge_of_a_block(kernels, vocabulary):
    batch = token_batch(5, vocabulary, 4, 3)
    options = {"kl_weight": 0.5, "temperature": 2.0}
    got = token_gradients(linear_loss, batch, torch.float32, **options, backend="triton")
    want = token_gradients(linear_loss_reference, batch, torch.float64, **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_buffer_is_read_before_it_is_written(kernels, dtype):
    """Every uninitialised allocation is filled with NaN first, the rows' padding too."""
    batch = token_batch(9, 50, 8, 5, dtype=dtype)
    options = {"temperature": 2.0, "kl_weight": 0.5, "backend": "triton"}
    want = token_gradients(linear_loss, batch, dtype, **options)
    torch.use_deterministic_algorithms(True)  # fill_uninitialized_memory is on by default
    try:
        assert torch.empty(3).isnan().all()
        got = token_gradients(linear_loss, batch, dtype, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_certain_and_impossible_tokens(kernels):
    """Small losses and gradients keep their digits, large ones are finite."""
    hidden_TD = torch.tensor([[20.7], [12.0], [80.0], [-500.0], [0.3]]).requires_grad_()
    weight_VD = torch.tensor([[1.0], [0.0], [0.0]])
    target_T = torch.zeros(5, dtype=torch.int64)
    output = linear_loss(hidden_TD, weight_VD, target_T, backend="triton")
    (dhidden_TD,) = torch.autograd.grad(output.loss, hidden_TD)
    above_T = torch.tensor(2.0).double().log() - hidden_TD.detach()[:, 0].double()
    want_T = torch.nn.functional.softplus(above_T, threshold=1000)
    torch.testing.assert_close(output.ce_T.double(), want_T, rtol=1e-5, atol=0)
    torch.testing.assert_close(dhidden_TD[:, 0].double(), torch.expm1(-want_T), rtol=1e-5, atol=0)


@pytest.mark.parametrize("apart", [0.0, 1e-4, 1e-2])
def test_a_student_close_to_its_teacher_keeps_the_digits(kernels, apart):
    batch = token_batch(6, 200, 16)
    noise_TD = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    teacher = {
        "teacher_hidden_TE": batch.hidden_TD + apart * noise_TD,
        "teacher_weight_VE": batch.weight_VD,
    }
    inputs = (batch.hidden_TD, batch.weight_VD, batch.target_T)
    got_T = linear_loss(*inputs, **teacher, backend="triton").kl_T
    exact_T = linear_loss_reference(
        *(x.double() for x in inputs[:2]), inputs[2],
        **{name: x.double() for name, x in teacher.items()},
    ).kl_T  # fmt: skip
    assert (got_T >= 0).all()
    rounding = 12 * torch.finfo(torch.float32).eps
    assert ((got_T - exact_T).abs() <= rounding * (2 * exact_T.sqrt() + rounding)).all()


def test_a_target_out_of_range_is_not_a_number(kernels):
    """Nothing waits for a GPU to look; on a CPU it is refused before."""
    step = kernels.RowStep(1.0, 1.0, 0.0, torch.float32, False)
    z_CV = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    ce_C, _, _ = kernels.rows(z_CV, None, torch.tensor([64, 3, -100]), step)
    assert ce_C.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)], ids=str)
def test_only_what_is_wanted(kernels, wants):
    batch = token_batch(5, 70, 8, 5)
    options = {"kl_weight": 0.5, "backend": "triton"}
    full = token_gradients(linear_loss, batch, torch.float32, **options)
    hidden_TD, weight_VD = (
        x.clone().requires_grad_(wanted) for x, wanted in zip(batch[:2], wants, strict=True)
    )
    output = linear_loss(hidden_TD, weight_VD, batch.target_T, **batch.teacher(), **options)
    for x, y in zip((output.loss.detach(), *output[1:]), (full[0], *full[3:]), strict=True):
        assert torch.equal(x, y)
    if any(wants):
        output.loss.backward()
    for x, want in ((hidden_TD, full[1]), (weight_VD, full[2])):
        assert x.grad is None if not x.requires_grad else torch.equal(x.grad, want)


def test_no_token_no_loss(kernels):
    batch = token_batch(0, 7, 4)
    loss, _, dweight_VD, ce_T = token_gradients(linear_loss, batch, torch.float32, backend="triton")
    assert loss == 0
    assert torch.equal(dweight_VD, torch.zeros(7, 4))
    assert ce_T.shape == (0,)


def test_float64_is_refused():
    batch = token_batch(4, 6, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="takes no float64"):
        linear_loss(*batch[:3], backend="triton")


TYPES = {"target_ptr": "*i64", "num_columns": "i32", "row_elements": "i32"}
FLAGS = {  # teacher, tempered, gradient
    "distillation": (True, True, True),
    "at temperature 1": (True, False, True),
    "cross-entropy": (False, False, True),
    "losses": (True, True, False),
}


def check(flags, dtype, target):
    """No spills, and loads of four elements, which rows at multiples of 16 allow."""
    kernel = linear_loss_triton.rows_kernel
    constants = dict(
        zip(("HAS_TEACHER", "TEMPERED", "WITH_GRADIENT"), FLAGS[flags], strict=True),
        IN_HALVES=dtype != "fp32",
        BLOCK_V=linear_loss_triton.BLOCK_V,
    )
    strides = [name for name in kernel.arg_names if name.endswith("stride")]
    types = TYPES | dict.fromkeys(strides, "i32") | {"g_ptr": f"*{dtype}"}
    signature = {
        name: types.get(name, "*fp32" if name.endswith("ptr") else "fp32")
        for name in kernel.arg_names
        if name not in constants
    }
    report = compile_report(
        kernel, signature, constants, target,
        num_warps=linear_loss_triton.NUM_WARPS, num_stages=3, aligned=(*strides, "row_elements"),
    )  # fmt: skip
    assert report.fits, f"{report.spilled} spilled, {report.shared_bytes} bytes"
    if target.startswith("sm"):
        assert "v4.b32" in report.assembly


@pytest.mark.parametrize("flags", ["distillation", "cross-entropy"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_fits_every_target(target, flags):
    check(flags, "bf16", target)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_call_fits_every_target(target, flags, dtype):
    check(flags, dtype, target)
