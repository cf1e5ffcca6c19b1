"""Losses and gradients against float64 autograd over all logits; what it costs; the memory law."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from drama.bench.rows import peak_bytes
from drama.kernels import linear_loss_torch
from drama.kernels.linear_loss import choose_backend, linear_loss
from drama.kernels.linear_loss_reference import linear_loss_reference
from drama.testing import relative_error, token_batch, token_gradients

WEIGHTS = {"ce": {}, "kl": {"ce_weight": 0.0, "kl_weight": 2.0}, "both": {"kl_weight": 0.7}}
TERMS = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


@pytest.fixture
def chunked(monkeypatch):
    """Several chunks, and several blocks in each, for the sizes of these tests."""
    monkeypatch.setattr(linear_loss_torch, "WORK_ELEMENTS", 1500)
    monkeypatch.setattr(linear_loss_torch, "BLOCK_ELEMENTS", 400)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 40),
    vocabulary=st.integers(1, 90),
    width=st.integers(1, 24),
    rows=st.integers(1, 50),
    block=st.integers(1, 20),
    data=st.data(),
)
def test_float64_equals_autograd(tokens, vocabulary, width, rows, block, data):
    """Every weight, temperature, chunk and block; a teacher of any width."""
    batch = token_batch(
        tokens, vocabulary, width, data.draw(st.integers(1, 24)), dtype=torch.float64
    )
    options = {
        "temperature": data.draw(st.sampled_from([0.5, 1.0, 2.0])),
        "ce_weight": data.draw(st.sampled_from([0.0, 0.3, 1.0])),
    }
    if data.draw(st.booleans()):
        options["kl_weight"] = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss_torch, "WORK_ELEMENTS", vocabulary * rows)
        patch.setattr(linear_loss_torch, "BLOCK_ELEMENTS", vocabulary * block)
        got = token_gradients(linear_loss, batch, torch.float64, **options, backend="torch")
    want = token_gradients(linear_loss_reference, batch, torch.float64, **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@TERMS
@pytest.mark.parametrize("temperature", [0.5, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(chunked, dtype, temperature, weights):
    """Criterion: twice the error of plain torch in float32, whatever the inputs' dtype, and a
    rounding; and gradients are rounded to their dtype, where they are saved and scaled."""
    batch = token_batch(63, 101, 37, dtype=dtype)
    options = {"temperature": temperature, **weights}
    exact, plain = (
        token_gradients(linear_loss_reference, batch, wide, **options)
        for wide in (torch.float64, torch.float32)
    )
    ours, again = (
        token_gradients(linear_loss, batch, dtype, **options, backend="torch") for _ in range(2)
    )
    assert [x.dtype for x in ours[1:3]] == [dtype] * 2
    for got, same, base, want in zip(ours, again, plain, exact, strict=True):
        allowed = 2 * relative_error(base, want) + torch.finfo(torch.float32).eps
        allowed += 2 * relative_error(want.to(got.dtype), want)
        assert relative_error(got, want) <= allowed
        assert torch.equal(got, same), "twice the same call, twice the same bits"


def test_gradcheck(chunked):
    batch = token_batch(5, 11, 4, 3, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (batch.hidden_TD, batch.weight_VD)]
    for options in ({}, {**batch.teacher(), "kl_weight": 0.5, "temperature": 2.0}):

        def loss(hidden_TD, weight_VD, options=options):
            return linear_loss(hidden_TD, weight_VD, batch.target_T, **options).loss / 5

        assert torch.autograd.gradcheck(loss, inputs)


def test_no_token_no_loss():
    batch = token_batch(0, 7, 4)
    loss, dhidden_TD, dweight_VD, ce_T, kl_T = token_gradients(
        linear_loss, batch, torch.float32, kl_weight=1.0
    )
    assert loss == 0
    assert dhidden_TD.shape == (0, 4)
    assert torch.equal(dweight_VD, torch.zeros(7, 4))
    assert ce_T.shape == kl_T.shape == (0,)


def test_a_certain_token_keeps_its_digits():
    """Cross-entropy of 1e-9 and its gradient, which 1 - softmax would round to nothing."""
    hidden_TD = torch.tensor([[20.7], [12.0], [80.0]]).requires_grad_()
    weight_VD = torch.tensor([[1.0], [0.0], [0.0]]).requires_grad_()
    target_T = torch.zeros(3, dtype=torch.int64)
    output = linear_loss(hidden_TD, weight_VD, target_T)
    (dhidden_TD,) = torch.autograd.grad(output.loss, hidden_TD)
    want_T = torch.log1p(2 * torch.exp(-hidden_TD.detach()[:, 0].double()))
    torch.testing.assert_close(output.ce_T.double(), want_T, rtol=1e-5, atol=0)
    torch.testing.assert_close(dhidden_TD[:, 0].double(), torch.expm1(-want_T), rtol=1e-5, atol=0)


def test_an_impossible_token_has_a_finite_loss():
    hidden_TD = torch.tensor([[500.0]]).requires_grad_()
    weight_VD = torch.tensor([[1.0], [-1.0]])
    output = linear_loss(hidden_TD, weight_VD, torch.tensor([1]))
    assert output.ce_T.tolist() == [1000.0]
    assert torch.autograd.grad(output.loss, hidden_TD)[0].tolist() == [[2.0]]


@pytest.mark.parametrize("temperature", [0.5, 1, 2])
@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-4, 1e-2])
def test_a_student_close_to_its_teacher_keeps_the_digits(apart, temperature):
    """Never negative, and off by a rounding of the logits times the divergence's root, where the
    plain sum is off by a rounding of the logits."""
    batch = token_batch(50, 1000, 16)
    noise_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    teacher = {
        "teacher_hidden_TE": batch.hidden_TD + apart * noise_TD,
        "teacher_weight_VE": batch.weight_VD,
    }
    inputs = (batch.hidden_TD, batch.weight_VD, batch.target_T)
    got_T = linear_loss(*inputs, **teacher, temperature=temperature).kl_T
    exact_T = linear_loss_reference(
        *(x.double() for x in inputs[:2]), inputs[2],
        **{name: x.double() for name, x in teacher.items()}, temperature=temperature,
    ).kl_T  # fmt: skip
    assert (got_T >= 0).all()
    rounding = 12 * torch.finfo(torch.float32).eps
    assert ((got_T - exact_T).abs() <= rounding * (2 * exact_T.sqrt() + rounding)).all()


def test_a_teacher_without_a_likely_token_has_a_finite_divergence():
    """Its probability underflows, the student's does not; and the other way round."""
    hidden_TD = torch.tensor([[150.0], [-150.0]]).requires_grad_()
    teacher = {
        "teacher_hidden_TE": torch.tensor([[-150.0], [150.0]]),
        "teacher_weight_VE": torch.tensor([[1.0], [-1.0], [-1.0]]),
    }
    weight_VD, target_T = torch.tensor([[1.0], [-1.0], [-1.0]]), torch.tensor([0, 0])
    output = linear_loss(hidden_TD, weight_VD, target_T, **teacher, ce_weight=0, kl_weight=1)
    (gradient_TD,) = torch.autograd.grad(output.loss, hidden_TD)
    ln2 = torch.tensor(2.0).log()
    torch.testing.assert_close(output.kl_T, torch.stack((300 - ln2, 300 + ln2)))
    torch.testing.assert_close(gradient_TD, torch.tensor([[2.0], [-2.0]]))


@pytest.mark.parametrize("teacher", [False, True])
def test_nothing_is_computed_twice(chunked, teacher):
    """Three products of the student and one of the teacher; fewer where less is wanted."""
    tokens, vocabulary, width, teacher_width = 63, 101, 37, 24
    batch = token_batch(tokens, vocabulary, width, teacher_width)
    weights = {"kl_weight": 1.0} if teacher else {}
    options = {**batch.teacher(), **weights} if teacher else {}
    full = token_gradients(linear_loss, batch, torch.float32, **weights)
    for hidden_wants, weight_wants in ((1, 1), (1, 0), (0, 1), (0, 0)):
        hidden_TD = batch.hidden_TD.clone().requires_grad_(bool(hidden_wants))
        weight_VD = batch.weight_VD.clone().requires_grad_(bool(weight_wants))
        with FlopCounterMode(display=False) as counter:
            output = linear_loss(hidden_TD, weight_VD, batch.target_T, **options)
            if hidden_wants or weight_wants:
                output.loss.backward()
        products = (1 + hidden_wants + weight_wants) * width + teacher * teacher_width
        assert counter.get_total_flops() == 2 * tokens * vocabulary * products
        assert output.loss.requires_grad == bool(hidden_wants or weight_wants)
        assert torch.equal(output.loss.detach(), full[0])
        for x, want in ((hidden_TD, full[1]), (weight_VD, full[2])):
            assert x.grad is None if not x.requires_grad else torch.equal(x.grad, want)


@TERMS
def test_no_grad_strides_and_autocast(chunked, weights):
    batch = token_batch(13, 40, 20)
    want = token_gradients(linear_loss, batch, torch.float32, temperature=2.0, **weights)
    strided = batch._replace(
        hidden_TD=batch.hidden_TD.repeat_interleave(2, 1)[:, ::2],
        weight_VD=batch.weight_VD.T.contiguous().T,
        target_T=batch.target_T.repeat_interleave(3)[::3],
        teacher_hidden_TE=batch.teacher_hidden_TE.T.contiguous().T,
        teacher_weight_VE=batch.teacher_weight_VE.repeat_interleave(2, 0)[::2],
    )
    got = token_gradients(linear_loss, strided, torch.float32, temperature=2.0, **weights)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = token_gradients(linear_loss, batch, torch.float32, temperature=2.0, **weights)
    for x, y in zip(cast, want, strict=True):
        assert torch.equal(x, y)
    inputs = (batch.hidden_TD.requires_grad_(), batch.weight_VD, batch.target_T)
    with torch.no_grad():
        alone = linear_loss(*inputs, **batch.teacher(), temperature=2.0, **weights)
    assert not alone.loss.requires_grad
    torch.testing.assert_close(alone.loss, want[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_is_scaled_before_it_is_rounded(dtype):
    """A third rounded to bf16 is off by more than a gradient may be; 2^-20 is small for fp16."""
    batch = token_batch(30, 50, 24, dtype=dtype)

    def times(scale, function):
        def scaled(*arguments):
            output = function(*arguments)
            return output._replace(loss=output.loss * scale)

        return scaled

    for scale in (2.0**-20, 1000 / 3):
        got, want = (
            token_gradients(times(scale, function), batch, wide)
            for function, wide in ((linear_loss, dtype), (linear_loss_reference, torch.float64))
        )
        for x, y in zip(got[1:3], want[1:3], strict=True):
            assert x.dtype == dtype
            # a number below the smallest normal one keeps no digits
            tiny = torch.finfo(dtype).smallest_normal * y.numel() ** 0.5
            assert (x - y).norm() < torch.finfo(dtype).eps / 2 * y.norm() + tiny
            ratio = (x.double() * y).sum() / y.square().sum()
            assert abs(ratio - 1) < torch.finfo(dtype).eps / 16 + tiny, "no common factor"


def test_a_gradient_of_the_gradient_is_refused():
    batch = token_batch(4, 6, 8)
    hidden_TD = batch.hidden_TD.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)  # without it nothing would ask for a second one
    loss = linear_loss(hidden_TD, batch.weight_VD, batch.target_T).loss
    (grad,) = torch.autograd.grad(loss * scale, hidden_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_compiler_leaves_it_alone():
    """The graph breaks here, and what is around it is compiled."""
    batch = token_batch(9, 30, 8)
    leaves = [x.requires_grad_() for x in (batch.hidden_TD, batch.weight_VD)]

    def total(hidden_TD, weight_VD):
        output = linear_loss(hidden_TD * 2, weight_VD, batch.target_T, **batch.teacher())
        return output.loss * 3 + output.kl_T.sum()

    want, got = (
        (value.detach(), *torch.autograd.grad(value, leaves))
        for value in (total(*leaves), torch.compile(total, backend="aot_eager")(*leaves))
    )
    for x, y in zip(want, got, strict=True):
        assert torch.equal(x, y)


def test_the_teacher_gets_no_gradient_and_may_be_of_another_type():
    batch = token_batch(9, 30, 8)
    teacher = {name: x.bfloat16() for name, x in batch.teacher().items()}
    want = linear_loss(
        batch.hidden_TD, batch.weight_VD, batch.target_T,
        **{name: x.float() for name, x in teacher.items()},
    )  # fmt: skip
    for backend in ("torch", "reference"):
        leaves = {name: x.clone().requires_grad_() for name, x in teacher.items()}
        inputs = (batch.hidden_TD.requires_grad_(), batch.weight_VD, batch.target_T)
        got = linear_loss(*inputs, **leaves, kl_weight=1.0, backend=backend)
        got.loss.backward()
        torch.testing.assert_close(got.kl_T, want.kl_T, rtol=1e-5, atol=1e-6)
        assert all(x.grad is None for x in leaves.values())
        assert not got.kl_T.requires_grad
        assert not got.ce_T.requires_grad


def test_every_backend_returns_the_same_types():
    batch = token_batch(4, 6, 8, dtype=torch.bfloat16)
    inputs = (batch.hidden_TD, batch.weight_VD, batch.target_T)
    for backend in ("torch", "reference"):
        output = linear_loss(*inputs, **batch.teacher(), backend=backend)
        assert [x.dtype for x in output] == [torch.float32] * 3
        assert linear_loss(*inputs, backend=backend).kl_T is None


def test_no_buffer_is_read_before_it_is_written(chunked):
    """Every uninitialised allocation is filled with NaN first."""
    batch = token_batch(30, 50, 24)
    options = {"temperature": 2.0, "kl_weight": 0.5}
    want = token_gradients(linear_loss, batch, torch.float32, **options)
    torch.use_deterministic_algorithms(True)  # fill_uninitialized_memory is on by default
    try:
        assert torch.empty(3).isnan().all()
        got = token_gradients(linear_loss, batch, torch.float32, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def step(tokens, vocabulary, width, teacher, dtype=torch.float32):
    """Loss and gradients, to be counted; the batch is made before."""
    batch = token_batch(tokens, vocabulary, width, width, dtype=dtype)
    inputs = (batch.hidden_TD.requires_grad_(), batch.weight_VD.requires_grad_(), batch.target_T)
    options = {**batch.teacher(), "kl_weight": 1.0, "temperature": 2.0} if teacher else {}
    return lambda: linear_loss(*inputs, **options).loss.backward()


@pytest.mark.parametrize("teacher", [False, True])
def test_no_tensor_is_larger_than_a_chunk(monkeypatch, teacher):
    """At 500 tokens of a vocabulary of 3,001; a vocabulary larger than the chunk takes a row."""
    for work, dtype in ((2**15, torch.float32), (2**15, torch.bfloat16), (1000, torch.float32)):
        monkeypatch.setattr(linear_loss_torch, "WORK_ELEMENTS", work)
        monkeypatch.setattr(linear_loss_torch, "BLOCK_ELEMENTS", 2**13)
        tokens, vocabulary, width = (500, 3001, 16) if work > 3001 else (50, 3001, 16)
        run = step(tokens, vocabulary, width, teacher, dtype)
        with Largest() as largest:
            run()
        buffers = (1 + teacher) * max(work, vocabulary)
        assert largest.elements <= max(buffers, vocabulary * width, tokens * width)
        assert largest.elements < tokens * vocabulary / 3


@pytest.mark.parametrize("teacher", [False, True])
def test_work_memory_does_not_grow_with_the_logits(monkeypatch, teacher):
    """Four times the tokens: their gradients twice, saved and scaled, and a few numbers each."""
    vocabulary, width = 2003, 16
    monkeypatch.setattr(linear_loss_torch, "WORK_ELEMENTS", 2**16)
    monkeypatch.setattr(linear_loss_torch, "BLOCK_ELEMENTS", 2**13)
    small, large = (
        peak_bytes(step(tokens, vocabulary, width, teacher), torch.device("cpu"))
        for tokens in (500, 2000)
    )
    assert large - small <= 4 * (2000 - 500) * (2 * width + 16) + 2**16
    blocks = linear_loss_torch.SPARES * 2**13
    work = (1 + teacher) * 2**16 + (blocks + 2**13 if teacher else 0)
    assert small <= 4 * (work + 2 * (500 + vocabulary) * width + 16 * 500) + 2**16
    assert large < 4 * 2000 * vocabulary / 8, "an eighth of the logits, or the bound says nothing"


def test_a_real_vocabulary_in_constant_memory():
    """The promise: 64 MiB a buffer and the weight's gradient, here in chunks of 128 rows."""
    vocabulary, width = 128_256, 4
    peak = peak_bytes(step(300, vocabulary, width, False), torch.device("cpu"))
    assert peak <= 4 * (linear_loss_torch.WORK_ELEMENTS + 2 * vocabulary * width) + 2**20
    assert peak < 4 * 300 * vocabulary / 2


def test_auto_is_torch_without_a_gpu():
    hidden_TD = torch.empty(4, 8)
    assert choose_backend("auto", hidden_TD) == "torch"
    assert choose_backend("reference", hidden_TD) == "reference"


def test_what_does_not_fit_is_named():
    batch = token_batch(4, 6, 8)
    student = (batch.hidden_TD, batch.weight_VD, batch.target_T)
    hidden_TD, weight_VD, target_T = student
    teacher_TE, teacher_VE = batch.teacher_hidden_TE, batch.teacher_weight_VE

    def with_teacher(hidden, weight):
        return {"teacher_hidden_TE": hidden, "teacher_weight_VE": weight}

    for message, arguments, options in (
        ("must be", (hidden_TD, weight_VD[:, :4], target_T), {}),
        ("must be", (hidden_TD[0], weight_VD, target_T), {}),
        ("empty", (hidden_TD, weight_VD[:0], target_T), {}),
        ("one float type", (hidden_TD, weight_VD.double(), target_T), {}),
        ("one float type", (hidden_TD.long(), weight_VD.long(), target_T), {}),
        ("both must be on one", (hidden_TD, weight_VD.to("meta"), target_T), {}),
        ("expected int64 .4.", (hidden_TD, weight_VD, target_T[:2]), {}),
        ("target is torch.int32", (hidden_TD, weight_VD, target_T.int()), {}),
        ("target is on meta", (hidden_TD, weight_VD, target_T.to("meta")), {}),
        ("target holds 0 to 6", (hidden_TD, weight_VD, torch.tensor([0, 1, 6, 2])), {}),
        ("target holds -100", (hidden_TD, weight_VD, torch.tensor([0, 1, -100, 2])), {}),
        ("one is missing", student, {"teacher_hidden_TE": teacher_TE}),
        ("one is missing", student, {"teacher_weight_VE": teacher_VE}),
        ("teacher_hidden .4, 23.", student, with_teacher(teacher_TE[:, 1:], teacher_VE)),
        ("the teacher has 3 tokens", student, with_teacher(teacher_TE[1:], teacher_VE)),
        ("a vocabulary of 5", student, with_teacher(teacher_TE, teacher_VE[1:])),
        ("is float64", student, with_teacher(teacher_TE.double(), teacher_VE.double())),
        (
            "the teacher is on meta",
            student,
            with_teacher(teacher_TE.to("meta"), teacher_VE.to("meta")),
        ),
        ("there is no teacher", student, {"kl_weight": 1.0}),
        ("kl_weight is -1", student, with_teacher(teacher_TE, teacher_VE) | {"kl_weight": -1}),
        ("ce_weight is nan", student, {"ce_weight": float("nan")}),
        ("temperature is 0", student, {"temperature": 0}),
        ("temperature is inf", student, {"temperature": float("inf")}),
        ("backend 'cuda' is none of", student, {"backend": "cuda"}),
    ):
        with pytest.raises(ValueError, match=message):
            linear_loss(*arguments, **options)
