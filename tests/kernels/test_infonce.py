"""Loss and gradients against float64 autograd over the whole matrix, and the memory law."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.bench.rows import peak_bytes
from drama.kernels import infonce as facade
from drama.kernels import infonce_torch
from drama.kernels.infonce import choose_backend, infonce
from drama.kernels.infonce_reference import infonce_reference
from drama.testing import contrastive_batch, loss_gradients, relative_error

BACKENDS = ["torch", "plain"]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    width=st.integers(1, 48),
    chunk=st.integers(1, 50),
    data=st.data(),
)
def test_float64_equals_autograd(backend, rows, columns, width, chunk, data):
    """Every rule with every other; shapes, widths, weights and chunks as they come."""
    prefixes = sorted(data.draw(st.sets(st.integers(1, width), min_size=1, max_size=4)))
    weights = [data.draw(st.floats(0.1, 2.0)) for _ in prefixes]
    batch = contrastive_batch(rows, columns, width, dtype=torch.float64)
    if data.draw(st.booleans()):  # several rows with the same positive
        batch.positive_B[: rows // 2] = batch.positive_B[-1]
    owners = torch.randint(-1, rows, (columns,), generator=torch.Generator().manual_seed(1))
    options = {
        "temperature": data.draw(st.sampled_from([0.01, 0.05, 0.1])),
        "prefixes": prefixes,
        "prefix_weights": weights,
        "k_ids_N": batch.ids_N if data.draw(st.booleans()) else None,
        "margin": data.draw(st.sampled_from([None, 0.1])),
        "own_negatives": data.draw(st.sampled_from([False, True, owners])),
        "symmetric": data.draw(st.booleans()),
    }
    inputs = (batch.q_BD, batch.k_ND, batch.positive_B)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infonce_torch, "WORK_ELEMENTS", 3 * len(batch.k_ND) * chunk)
        got = loss_gradients(infonce, *inputs, **options, backend=backend)
        statistics = infonce(*inputs, **options, backend=backend)[1:]
    want = loss_gradients(infonce_reference, *inputs, **options)
    scale = 1 / options["temperature"]  # a row that is all but solved has a gradient near zero
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= 1e-12 * scale**2 + 1e-11 * y.abs().max()
    for x, y in zip(statistics, infonce_reference(*inputs, **options)[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12 * scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(63, 63, 64), (100, 1000, 96)], ids=["square", "wide"])
def test_error_is_at_most_twice_that_of_plain_torch(shape, dtype, temperature, backend, rules):
    """Criterion: twice the error of plain torch in float32, whatever the vectors' dtype, and a
    floor for rounding."""
    batch = contrastive_batch(*shape, dtype=dtype)
    inputs = (batch.q_BD, batch.k_ND, batch.positive_B)
    options = {
        "temperature": temperature, "prefixes": [32, shape[2]], "k_ids_N": batch.ids_N, **rules
    }  # fmt: skip
    exact, plain = (
        loss_gradients(
            infonce_reference, batch.q_BD.to(wide), batch.k_ND.to(wide), batch.positive_B, **options
        )
        for wide in (torch.float64, torch.float32)
    )
    ours, again = (loss_gradients(infonce, *inputs, **options, backend=backend) for _ in range(2))
    # a rounding of the largest logit, 1 / temperature, moves a softmax by as much; and bf16 or fp16
    # gradients are rounded where they are stored
    floor = torch.finfo(torch.float32).eps / temperature
    for got, same, base, want in zip(ours[1:], again[1:], plain[1:], exact[1:], strict=True):
        slack = 1 if want.ndim else 4  # the temperature's is one sum, whose terms cancel
        allowed = 2 * relative_error(base, want) + slack * floor
        # once where it is saved, once where it is scaled
        allowed += 2 * relative_error(want.to(got.dtype), want)
        assert relative_error(got, want) <= allowed
        assert torch.equal(got, same), "twice the same call, twice the same bits"
    # a solved row's loss is a difference of logits up to 1 / temperature: one rounding of those
    error, base = ((x[0] - exact[0]).abs().item() for x in (ours, plain))
    assert error <= 2 * base + 2**-24 / temperature


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_negatives_has_no_loss_and_no_gradient(backend):
    batch = contrastive_batch(4, 6, 16)
    same = torch.zeros(6, dtype=torch.int64)
    loss, *grads = loss_gradients(
        infonce, batch.q_BD, batch.k_ND, batch.positive_B,
        temperature=0.02, k_ids_N=same, backend=backend,
    )  # fmt: skip
    assert loss == 0
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_say_what_they_say(backend):
    batch = contrastive_batch(9, 20, 16, dtype=torch.float64)
    output = infonce(
        batch.q_BD, batch.k_ND, batch.positive_B,
        temperature=0.05, prefixes=[8, 16], k_ids_N=batch.ids_N, backend=backend,
    )  # fmt: skip
    cosine_BN = (
        torch.nn.functional.normalize(batch.q_BD) @ torch.nn.functional.normalize(batch.k_ND).T
    )
    twins_BN = batch.ids_N[None] == batch.ids_N[batch.positive_B][:, None]
    rows_B = torch.arange(9)
    torch.testing.assert_close(output.positive_score_PB[1], cosine_BN[rows_B, batch.positive_B])
    assert torch.equal(output.num_masked_B, twins_BN.sum(1) - 1)
    twins_BN[rows_B, batch.positive_B] = False
    torch.testing.assert_close(
        output.lse_PB[1], (cosine_BN / 0.05).masked_fill(twins_BN, -torch.inf).logsumexp(1)
    )
    assert not output.lse_PB.requires_grad


def test_own_negatives_by_hand():
    """Two rows; documents p0 n0 p1 n1 n1': each row against both positives and its own."""
    batch = contrastive_batch(2, 5, 8, dtype=torch.float64)
    positive_B = torch.tensor([0, 2])
    cosine_BN = (
        torch.nn.functional.normalize(batch.q_BD) @ torch.nn.functional.normalize(batch.k_ND).T
    )
    rows = ([0, 1, 2], [0, 2, 3, 4])
    want = torch.stack([(cosine_BN[i, c] / 0.1).logsumexp(0) for i, c in enumerate(rows)])
    for backend in ("torch", "plain", "reference"):
        output = infonce(
            batch.q_BD, batch.k_ND, positive_B, temperature=0.1, own_negatives=True, backend=backend
        )
        torch.testing.assert_close(output.lse_PB[0], want)
        assert output.num_masked_B.tolist() == [2, 1]


def test_symmetric_is_the_mean_of_both_directions():
    batch = contrastive_batch(6, 6, 8, dtype=torch.float64)
    logits_BB = (
        torch.nn.functional.normalize(batch.q_BD) @ torch.nn.functional.normalize(batch.k_ND).T
    ) / 0.1
    logits_BB = logits_BB[:, batch.positive_B]
    both = [torch.nn.functional.cross_entropy(x, torch.arange(6)) for x in (logits_BB, logits_BB.T)]
    for backend in ("torch", "plain", "reference"):
        output = infonce(
            batch.q_BD, batch.k_ND, batch.positive_B,
            temperature=0.1, symmetric=True, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(output.loss, sum(both) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_strides_and_autocast(backend):
    batch = contrastive_batch(8, 12, 20)
    wide_q, wide_k = batch.q_BD.repeat(1, 2)[:, ::2], batch.k_ND.repeat_interleave(2, 0)[::2]
    options = {"temperature": 0.05, "backend": backend}
    want = infonce(wide_q.contiguous(), wide_k.contiguous(), batch.positive_B, **options)
    with torch.no_grad():
        got = infonce(wide_q, wide_k, batch.positive_B, **options)
    assert torch.equal(got.loss, want.loss)
    assert not got.loss.requires_grad
    plain = loss_gradients(infonce, wide_q, wide_k, batch.positive_B, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss_gradients(infonce, wide_q, wide_k, batch.positive_B, **options)
    for x, y in zip(plain, cast, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_node_for_torch_compile(backend):
    batch = contrastive_batch(8, 12, 20)
    inputs = (batch.q_BD, batch.k_ND, batch.positive_B)
    options = {"temperature": 0.05, "prefixes": [8, 20], "k_ids_N": batch.ids_N, "backend": backend}
    compiled = torch.compile(infonce, fullgraph=True, backend="aot_eager")
    want, got = (loss_gradients(f, *inputs, **options) for f in (infonce, compiled))
    for x, y in zip(want, got, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_keeps_its_contract(backend, dtype, transposed):
    batch = contrastive_batch(4, 6, 8, dtype=dtype)
    temperature = torch.tensor(0.05, requires_grad=True)
    inputs = [
        (x.T.contiguous().T if transposed else x).requires_grad_() for x in (batch.q_BD, batch.k_ND)
    ]
    options = ([4, 8], [1.0, 0.5], batch.ids_N, None, None, False, backend, True, True)
    torch.library.opcheck(facade._infonce, (*inputs, batch.positive_B, temperature, *options))


@pytest.mark.parametrize("prefixes", [(8,), (4, 8)], ids=str)
def test_results_share_no_memory(prefixes: tuple[int, ...]) -> None:
    """One may be changed in place, and an operator of torch.compile must return none twice."""
    q_BD, k_ND = torch.randn(6, 8), torch.randn(9, 8)
    for backend in BACKENDS:
        out = infonce(
            q_BD, k_ND, torch.arange(6), temperature=0.1, prefixes=prefixes, backend=backend
        )
        places = {x.untyped_storage().data_ptr() for x in (out.loss, out.loss_P)}
        assert len(places) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiler_generates_code_around_it(backend):
    """Strides that the compiler was promised are those that it gets."""
    batch = contrastive_batch(8, 12, 20)
    q_DB, k_DN = batch.q_BD.T.contiguous(), batch.k_ND.T.contiguous()

    def total(q_DB, k_DN):
        output = infonce(
            q_DB.T, k_DN.T, batch.positive_B, temperature=0.05, prefixes=[8, 20], backend=backend
        )
        return output.loss + (output.lse_PB * 2).sum() + output.positive_score_PB.mean()

    values = []
    for function in (total, torch.compile(total, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (q_DB, k_DN)]
        value = function(*leaves)
        values.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for x, y in zip(*values, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_scaled_before_it_is_rounded(backend, dtype):
    """2^20 is no fp16 number; a third rounded to bf16 is off by more than a gradient may be."""
    batch = contrastive_batch(30, 50, 24, dtype=dtype)
    wide = [x.double() for x in (batch.q_BD, batch.k_ND)]
    for scale in (2.0**20, 1000 / 3):
        grads = []
        for x, y, function, options in (
            (batch.q_BD * 64, batch.k_ND * 64, infonce, {"backend": backend}),
            (wide[0] * 64, wide[1] * 64, infonce_reference, {}),
        ):
            leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
            loss = function(*leaves, batch.positive_B, temperature=0.1, **options).loss
            grads.append(torch.autograd.grad(loss * scale, leaves))
        for got, want in zip(*grads, strict=True):
            assert got.dtype == dtype
            assert relative_error(got, want) < torch.finfo(dtype).eps / 2
            ratio = (got.double() * want).sum() / want.square().sum()
            assert abs(ratio - 1) < torch.finfo(dtype).eps / 16, "no common factor"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_the_gradient_is_refused(backend):
    batch = contrastive_batch(4, 6, 8)
    q_BD = batch.q_BD.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)  # without it nothing would ask for a second one
    loss = infonce(q_BD, batch.k_ND, batch.positive_B, temperature=0.1, backend=backend).loss
    (grad,) = torch.autograd.grad(loss * scale, q_BD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("prefixes", [[16], [4, 16]], ids=["one", "two"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_too_short_to_be_one_does_not_pull(backend, prefixes):
    """Below 1e-12 a norm is a constant, as in torch.nn.functional.normalize."""
    batch = contrastive_batch(8, 12, 16, dtype=torch.float64)
    batch.q_BD[3] *= 1e-15
    batch.k_ND[5] *= 1e-14
    batch.q_BD[4, :4] *= 1e-15
    inputs = (batch.q_BD, batch.k_ND, batch.positive_B)
    got, want = (
        loss_gradients(f, *inputs, temperature=0.1, prefixes=prefixes, **options)
        for f, options in ((infonce, {"backend": backend}), (infonce_reference, {}))
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_every_backend_returns_the_same_types():
    batch = contrastive_batch(4, 6, 8, dtype=torch.bfloat16)
    kinds = {
        tuple(
            x.dtype
            for x in infonce(
                batch.q_BD, batch.k_ND, batch.positive_B, temperature=0.1, backend=backend
            )
        )
        for backend in (*BACKENDS, "reference")
    }
    assert kinds == {(*[torch.float32] * 4, torch.int64)}


def test_no_buffer_is_read_before_it_is_written(monkeypatch):
    """Every uninitialised allocation is filled with NaN first."""
    batch = contrastive_batch(30, 50, 24)
    inputs = (batch.q_BD, batch.k_ND, batch.positive_B)
    options = {
        "temperature": 0.05,
        "prefixes": [8, 24],
        "k_ids_N": batch.ids_N,
        "margin": 0.05,
        "symmetric": True,
        "own_negatives": True,
    }
    want = [loss_gradients(infonce, *inputs, **options, backend=b) for b in BACKENDS]
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = [loss_gradients(infonce, *inputs, **options, backend=b) for b in BACKENDS]
    finally:
        torch.use_deterministic_algorithms(False)
    for backend_want, backend_got in zip(want, got, strict=True):
        for x, y in zip(backend_want, backend_got, strict=True):
            torch.testing.assert_close(x, y)


def peak_of(rows: int, columns: int, width: int, **options) -> int:
    """Live bytes at their highest beyond the inputs."""
    batch = contrastive_batch(rows, columns, width)
    q_BD, k_ND = batch.q_BD.requires_grad_(), batch.k_ND.requires_grad_()

    def run() -> None:
        infonce(
            q_BD, k_ND, batch.positive_B, temperature=0.05, backend="torch",
            k_ids_N=batch.ids_N, **options,
        ).loss.backward()  # fmt: skip

    return peak_bytes(run, q_BD.device)


# float32 vectors beside the inputs: scaled q and k, their gradients, the gradients times the loss's
LINEAR = 4 * 3
SORTED = 8 * 8  # bytes a row or column: sorted ids, order, and what is looked up in them


@pytest.mark.parametrize("prefixes", [[32], [8, 16, 32]], ids=["one", "three"])
def test_work_memory_does_not_grow_with_the_batch(prefixes, monkeypatch):
    columns, width = 4096, 32
    monkeypatch.setattr(infonce_torch, "WORK_ELEMENTS", 5 * columns * 64)
    small, large = (peak_of(rows, columns, width, prefixes=prefixes) for rows in (512, 4096))
    work = 4 * (infonce_torch.WORK_ELEMENTS + infonce_torch.BLOCK_ELEMENTS)
    linear = LINEAR * width + SORTED + 4 * 8 * len(prefixes)
    assert large - small <= linear * (4096 - 512) + 2**16
    assert small <= work + linear * (512 + columns) + 2**18
    assert large < 4 * columns * 4096 / 4, "a quarter of the matrix, or the bound says nothing"


def test_work_memory_at_16384():
    """The promise: beyond inputs and gradients 66 MiB of work, and vectors of B and N rows."""
    rows, width = 16384, 32
    work = 4 * (infonce_torch.WORK_ELEMENTS + infonce_torch.BLOCK_ELEMENTS)
    linear = (LINEAR * width + SORTED + 32) * 2 * rows
    assert peak_of(rows, rows, width) <= work + linear + 2**20
    assert work + linear < 4 * rows * rows / 10, "a tenth of the matrix"


def test_auto_takes_the_matrix_only_where_it_is_small():
    small, large = torch.empty(64, 8), torch.empty(4096, 8)
    assert choose_backend("auto", small, 64) == "plain"
    assert choose_backend("auto", large, 4096) == "torch"
    assert choose_backend("torch", small, 64) == "torch"


def test_what_does_not_fit_is_named():
    batch = contrastive_batch(4, 6, 16)
    q_BD, k_ND, positive_B = batch.q_BD, batch.k_ND, batch.positive_B
    for message, arguments, options in (
        ("prefixes", (q_BD, k_ND, positive_B), {"prefixes": [32]}),
        ("must be", (q_BD, k_ND[:, :8], positive_B), {}),
        ("empty", (q_BD[:0], k_ND, positive_B[:0]), {}),
        ("one float type", (q_BD, k_ND.double(), positive_B), {}),
        ("positive is torch.int64 of shape", (q_BD, k_ND, positive_B[:2]), {}),
        ("expected int64", (q_BD, k_ND, positive_B.int()), {}),
        ("k_ids", (q_BD, k_ND, positive_B), {"k_ids_N": batch.ids_N[:3]}),
        ("own_negatives", (q_BD, k_ND, positive_B), {"own_negatives": batch.ids_N[:3]}),
        ("k_ids is torch.float32", (q_BD, k_ND, positive_B), {"k_ids_N": batch.ids_N.float()}),
        (
            "own_negatives is torch.bool",
            (q_BD, k_ND, positive_B),
            {"own_negatives": batch.ids_N > 0},
        ),
        ("own_negatives is 1", (q_BD, k_ND, positive_B), {"own_negatives": 1}),
        ("own_negatives is None", (q_BD, k_ND, positive_B), {"own_negatives": None}),
        ("positive holds 0 to 6", (q_BD, k_ND, torch.tensor([0, 1, 6, 2])), {}),
        ("positive holds -1", (q_BD, k_ND, torch.tensor([0, 1, -1, 2])), {}),
        ("positive holds 0 to 6", (q_BD, k_ND, torch.tensor([0, 1, 6, 2])), {"backend": "torch"}),
        ("positive holds -1", (q_BD, k_ND, torch.tensor([0, 1, -1, 2])), {"backend": "torch"}),
        ("positive holds -1", (q_BD, k_ND, torch.tensor([0, 1, -1, 2])), {"backend": "reference"}),
        ("both must be on one", (q_BD, k_ND.to("meta"), positive_B), {}),
        ("expected int64 .4. on cpu", (q_BD, k_ND, positive_B.to("meta")), {}),
        ("margin", (q_BD, k_ND, positive_B), {"margin": float("nan")}),
        ("prefixes", (q_BD, k_ND, positive_B), {"prefixes": []}),
        ("0 prefix weights", (q_BD, k_ND, positive_B), {"prefix_weights": []}),
        ("finite", (q_BD, k_ND, positive_B), {"prefix_weights": [float("inf")]}),
        ("weights", (q_BD, k_ND, positive_B), {"prefixes": [8, 16], "prefix_weights": [1.0]}),
        ("temperature is 0", (q_BD, k_ND, positive_B), {"temperature": 0}),
        ("temperature has shape", (q_BD, k_ND, positive_B), {"temperature": torch.ones(2)}),
        ("backend 'cuda' is none of", (q_BD, k_ND, positive_B), {"backend": "cuda"}),
    ):
        with pytest.raises(ValueError, match=message):
            infonce(*arguments, **({"temperature": 0.1} | options))
