"""The Triton back end run by Triton's interpreter, where bf16 products are wrong and fp16's not."""

import pytest
import torch

from drama.kernels.infonce import infonce
from drama.kernels.infonce_reference import infonce_reference
from drama.testing import contrastive_batch, loss_gradients, relative_error


@pytest.fixture(autouse=True)
def kernels(interpreted, monkeypatch):
    interpreted("drama.kernels.infonce_kernels")
    return interpreted("drama.kernels.infonce_triton")


@pytest.mark.parametrize(
    ("dtype", "prefixes"),
    [
        pytest.param(torch.float32, [70], id="float32-one"),
        pytest.param(torch.float32, [24, 32, 70], id="float32-three"),
        pytest.param(torch.float16, [70], id="float16-one"),
        pytest.param(torch.float16, [24, 32, 70], id="float16-three", marks=pytest.mark.slow),
    ],
)
def test_error_is_at_most_twice_that_of_plain_torch(kernels, monkeypatch, dtype, prefixes, rules):
    """Rows, columns and widths that fill no tile; several chunks; every rule."""
    batch = contrastive_batch(100, 150, 77, dtype=dtype)
    per_row = batch.q_BD.element_size() * 160
    monkeypatch.setattr(kernels, "GRADIENT_BYTES", 70 * per_row)
    monkeypatch.setattr(kernels, "SCORE_BYTES", 32 * 4 * 160)
    monkeypatch.setattr(kernels, "FEWEST_ROWS", 1)
    for temperature in (0.01, 0.05):
        options = {"temperature": temperature, "prefixes": prefixes, "k_ids_N": batch.ids_N}
        options |= {"prefix_weights": [0.5, 1.0, 2.0][: len(prefixes)], **rules}
        inputs = (batch.q_BD, batch.k_ND, batch.positive_B)
        exact, plain = (
            loss_gradients(
                infonce_reference, batch.q_BD.to(w), batch.k_ND.to(w), inputs[2], **options
            )
            for w in (torch.float64, torch.float32)
        )
        ours = loss_gradients(infonce, *inputs, **options, backend="triton")
        floor = torch.finfo(torch.float32).eps / temperature
        floor += 0 if dtype == torch.float32 else torch.finfo(dtype).eps  # of E and H
        for got, base, want in zip(ours[1:], plain[1:], exact[1:], strict=True):
            slack = 1 if want.ndim else 8  # the temperature's is one sum, whose terms cancel
            allowed = 2 * relative_error(base, want) + slack * floor
            allowed += relative_error(want.to(got.dtype), want)
            assert relative_error(got, want) <= allowed
        error, base = ((x[0] - exact[0]).abs().item() for x in (ours, plain))
        assert error <= 2 * base + 2**-24 / temperature
        got = infonce(*inputs, **options, backend="triton")
        want = infonce_reference(batch.q_BD.double(), batch.k_ND.double(), inputs[2], **options)
        torch.testing.assert_close(got.loss_P.double(), want.loss_P, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.lse_PB.double(), want.lse_PB, rtol=1e-4, atol=1e-4)
        if "margin" not in rules:  # a score at the margin falls either way
            assert torch.equal(got.num_masked_B, want.num_masked_B)
    again = loss_gradients(infonce, *inputs, **options, backend="triton")
    assert all(map(torch.equal, ours, again)), "twice the same call, twice the same bits"
    with torch.no_grad():
        alone = infonce(*inputs, **options, backend="triton")
    torch.testing.assert_close(alone.loss, got.loss, rtol=1e-6, atol=1e-7)


def test_a_row_without_negatives_has_no_loss_and_no_gradient():
    batch = contrastive_batch(4, 6, 16)
    same = torch.zeros(6, dtype=torch.int64)
    loss, *grads = loss_gradients(
        infonce, batch.q_BD, batch.k_ND, batch.positive_B,
        temperature=0.02, k_ids_N=same, prefixes=[8, 16], backend="triton",
    )  # fmt: skip
    assert loss == 0
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))


def test_a_zero_vector_spoils_no_other_gradient():
    """Its inverse norm is past fp16's range, and documents' gradients sum over all queries."""
    batch = contrastive_batch(8, 12, 16, dtype=torch.float16)
    batch.q_BD[3] = 0
    inputs = (batch.q_BD, batch.k_ND, batch.positive_B)
    _, dq_BD, dk_ND, _ = loss_gradients(infonce, *inputs, temperature=0.1, backend="triton")
    double = (batch.q_BD.double(), batch.k_ND.double(), batch.positive_B)
    _, want_q_BD, want_k_ND, _ = loss_gradients(infonce_reference, *double, temperature=0.1)
    others = torch.arange(8) != 3
    assert relative_error(dq_BD[others], want_q_BD[others]) < 5e-3
    assert relative_error(dk_ND, want_k_ND) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_vectors_and_prefixes_of_very_different_lengths(dtype):
    """Each row's gradient goes with its inverse norm: rows and prefixes that are a thousandth."""
    batch = contrastive_batch(30, 50, 32)
    q_BD, k_ND = batch.q_BD, batch.k_ND
    q_BD[::3] *= 1e-3
    k_ND[::4] *= 1e-3
    q_BD[1::3, :16] *= 2e-3
    q_BD, k_ND = q_BD.to(dtype), k_ND.to(dtype)
    options = {"temperature": 0.1, "prefixes": [16, 32], "prefix_weights": [3.0, 0.5]}
    got = loss_gradients(infonce, q_BD, k_ND, batch.positive_B, **options, backend="triton")
    double = (q_BD.double(), k_ND.double(), batch.positive_B)
    want = loss_gradients(infonce_reference, *double, **options)
    most = 2e-5 if dtype == torch.float32 else 4e-3
    for name, x, y in zip(("dq", "dk"), got[1:3], want[1:3], strict=True):
        rows = (x.double() - y).norm(dim=1) / y.norm(dim=1)
        assert rows.max() < most, (name, rows)


def test_no_buffer_is_read_before_it_is_written(rules):
    """Every uninitialised allocation is filled with NaN first; shapes that fill no tile."""
    batch = contrastive_batch(70, 45, 40)  # more rows than columns: positives are shared
    inputs = (batch.q_BD, batch.k_ND, batch.positive_B)
    options = {"temperature": 0.05, "prefixes": [24, 40], "k_ids_N": batch.ids_N, **rules}
    want = loss_gradients(
        infonce_reference, *(x.double() for x in inputs[:2]), inputs[2], **options
    )
    torch.use_deterministic_algorithms(True)  # fill_uninitialized_memory is on by default
    try:
        assert torch.empty(3).isnan().all()
        got = loss_gradients(infonce, *inputs, **options, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 1e-4


def test_owners_by_name():
    batch = contrastive_batch(20, 60, 32)
    owner_N = torch.randint(-1, 20, (60,), generator=torch.Generator().manual_seed(2))
    inputs = (batch.q_BD, batch.k_ND, batch.positive_B)
    options = {"temperature": 0.1, "own_negatives": owner_N}
    got = loss_gradients(infonce, *inputs, **options, backend="triton")
    want = loss_gradients(
        infonce_reference, *(x.double() for x in inputs[:2]), inputs[2], **options
    )
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.slow
def test_a_thousand_rows_and_columns():
    batch = contrastive_batch(1000, 1000, 64)
    inputs = (batch.q_BD, batch.k_ND, batch.positive_B)
    options = {"temperature": 0.05, "prefixes": [32, 64], "k_ids_N": batch.ids_N}
    got = loss_gradients(infonce, *inputs, **options, backend="triton")
    want = loss_gradients(
        infonce_reference, *(x.double() for x in inputs[:2]), inputs[2], **options
    )
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 1e-4


def test_strided_inputs():
    batch = contrastive_batch(8, 12, 20)
    wide_q, wide_k = batch.q_BD.repeat(1, 2)[:, ::2], batch.k_ND.repeat_interleave(2, 0)[::2]
    options = {"temperature": 0.05, "backend": "triton"}
    got = loss_gradients(infonce, wide_q, wide_k, batch.positive_B, **options)
    want = loss_gradients(
        infonce, wide_q.contiguous(), wide_k.contiguous(), batch.positive_B, **options
    )
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_float64_is_refused():
    batch = contrastive_batch(4, 6, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="takes no float64"):
        infonce(batch.q_BD, batch.k_ND, batch.positive_B, temperature=0.1, backend="triton")
