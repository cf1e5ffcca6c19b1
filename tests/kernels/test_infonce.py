"""Loss and gradients against float64 autograd over the whole matrix, and the memory law."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.kernels import infonce as module
from drama.kernels.infonce import infonce
from drama.kernels.infonce_reference import infonce_reference


def trained_like(rows: int, columns: int, width: int, dtype: torch.dtype, seed: int = 0):
    """Queries whose positive has a cosine near 0.67, as after training; ids with duplicates."""
    generator = torch.Generator().manual_seed(seed)
    k_ND = torch.randn(columns, width, generator=generator)
    positive_B = torch.randperm(columns, generator=generator)[:rows]
    noise_BD = torch.randn(rows, width, generator=generator)
    q_BD = (k_ND[positive_B] + 1.1 * noise_BD) * 3.0
    ids_N = torch.randint(0, max(2, columns // 2), (columns,), generator=generator)
    return q_BD.to(dtype), k_ND.to(dtype), positive_B, ids_N


def gradients(function, q_BD, k_ND, positive_B, **options):
    q_BD, k_ND = (x.detach().clone().requires_grad_() for x in (q_BD, k_ND))
    output = function(q_BD, k_ND, positive_B, **options)
    return output[0].detach(), *torch.autograd.grad(output[0], (q_BD, k_ND))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    extra=st.integers(0, 60),
    width=st.integers(1, 48),
    chunk=st.integers(1, 50),
    data=st.data(),
)
def test_float64_equals_autograd(rows, extra, width, chunk, data):
    prefixes = sorted(data.draw(st.sets(st.integers(1, width), min_size=1, max_size=4)))
    weights = [data.draw(st.floats(0.1, 2.0)) for _ in prefixes]
    q_BD, k_ND, positive_B, ids_N = trained_like(rows, rows + extra, width, torch.float64)
    options = {
        "temperature": data.draw(st.sampled_from([0.01, 0.05, 0.1])),
        "prefixes": prefixes,
        "prefix_weights": weights,
        "k_ids_N": ids_N if data.draw(st.booleans()) else None,
        "margin": data.draw(st.sampled_from([None, 0.1])),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORK_ELEMENTS", (len(prefixes) + 2) * len(k_ND) * chunk)
        got = gradients(infonce, q_BD, k_ND, positive_B, **options)
    want = gradients(infonce_reference, q_BD, k_ND, positive_B, **options)
    scale = 1 / options["temperature"]  # a row that is all but solved has a gradient near zero
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= 1e-12 * scale + 1e-11 * y.abs().max()


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(63, 63, 64), (100, 1000, 96)], ids=["square", "wide"])
def test_error_is_at_most_twice_that_of_plain_torch(shape, dtype, temperature):
    """Criterion: twice the error of plain torch in the same dtype, and a floor for rounding."""
    q_BD, k_ND, positive_B, ids_N = trained_like(*shape, dtype)
    options = {"temperature": temperature, "prefixes": [32, shape[2]], "k_ids_N": ids_N}
    exact = gradients(infonce_reference, q_BD.double(), k_ND.double(), positive_B, **options)
    plain = gradients(infonce_reference, q_BD, k_ND, positive_B, **options)
    ours = gradients(infonce, q_BD, k_ND, positive_B, **options)
    again = gradients(infonce, q_BD, k_ND, positive_B, **options)
    floor = 4e-3 if dtype == torch.bfloat16 else 1e-6  # the gradient itself is stored in bf16
    for got, same, base, want in zip(ours[1:], again[1:], plain[1:], exact[1:], strict=True):
        assert relative(got, want) <= 2 * relative(base, want) + floor
        assert torch.equal(got, same)
    # a solved row's loss is a difference of logits up to 1 / temperature: one rounding of those
    error, base = ((x[0] - exact[0]).abs().item() for x in (ours, plain))
    assert error <= 2 * base + 2**-24 / temperature


def test_a_row_without_negatives_has_no_loss_and_no_gradient():
    q_BD, k_ND, positive_B, _ = trained_like(4, 6, 16, torch.float32)
    same = torch.zeros(6, dtype=torch.int64)
    loss, dq_BD, dk_ND = gradients(infonce, q_BD, k_ND, positive_B, temperature=0.02, k_ids_N=same)
    assert loss == 0
    assert torch.equal(dq_BD, torch.zeros_like(dq_BD))
    assert torch.equal(dk_ND, torch.zeros_like(dk_ND))


def test_outputs_say_what_they_say():
    q_BD, k_ND, positive_B, ids_N = trained_like(9, 20, 16, torch.float64)
    output = infonce(q_BD, k_ND, positive_B, temperature=0.05, prefixes=[8, 16], k_ids_N=ids_N)
    cosine_BN = torch.nn.functional.normalize(q_BD) @ torch.nn.functional.normalize(k_ND).T
    twins_BN = ids_N[None] == ids_N[positive_B][:, None]
    torch.testing.assert_close(output.positive_score_PB[1], cosine_BN[torch.arange(9), positive_B])
    assert torch.equal(output.num_masked_B, twins_BN.sum(1) - 1)
    twins_BN[torch.arange(9), positive_B] = False
    torch.testing.assert_close(
        output.lse_PB[1], (cosine_BN / 0.05).masked_fill(twins_BN, -torch.inf).logsumexp(1)
    )
    assert not output.lse_PB.requires_grad


def test_no_grad_and_strided_inputs():
    q_BD, k_ND, positive_B, _ = trained_like(8, 12, 20, torch.float32)
    wide_q, wide_k = q_BD.repeat(1, 2)[:, ::2], k_ND.repeat_interleave(2, 0)[::2]
    with torch.no_grad():
        got = infonce(wide_q, wide_k, positive_B, temperature=0.05)
    want = infonce(wide_q.contiguous(), wide_k.contiguous(), positive_B, temperature=0.05)
    assert torch.equal(got.loss, want.loss)
    assert not got.loss.requires_grad


def test_work_memory_does_not_grow_with_the_batch():
    """Live bytes at their highest, counted by the profiler, stay under the stated bound."""
    columns, chunk = 4096, 64

    def peak_bytes(rows: int) -> int:
        q_BD, k_ND, positive_B, ids_N = trained_like(rows, columns, 32, torch.float32)
        q_BD, k_ND = q_BD.requires_grad_(), k_ND.requires_grad_()
        with torch.profiler.profile(profile_memory=True) as profile:
            infonce(
                q_BD, k_ND, positive_B, temperature=0.05, prefixes=[16, 32], k_ids_N=ids_N
            ).loss.backward()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()  # negative where memory is freed
            peak = max(peak, live)
        return peak

    work = 4 * columns * chunk  # two prefixes and two more buffers, in elements
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORK_ELEMENTS", work)
        small, large = peak_bytes(512), peak_bytes(4096)
    linear = 4 * 32 * (4096 - 512) * 4  # q's gradient, its copy and its scaled copy grow with B
    assert large - small <= linear + 2**16
    masks = columns * chunk  # the comparison of ids, a byte each
    fixed = 4 * 32 * (columns + 512) * 6
    assert small <= 4 * work + masks + fixed
    assert large < 4 * columns * 4096 / 4, "a quarter of the matrix, or the bound says nothing"


def test_shapes_that_do_not_fit_are_named():
    q_BD, k_ND, positive_B, _ = trained_like(4, 6, 16, torch.float32)
    with pytest.raises(ValueError, match="prefixes"):
        infonce(q_BD, k_ND, positive_B, temperature=0.1, prefixes=[32])
    with pytest.raises(ValueError, match="must be"):
        infonce(q_BD, k_ND[:, :8], positive_B, temperature=0.1)
    with pytest.raises(ValueError, match="positive"):
        infonce(q_BD, k_ND, positive_B[:2], temperature=0.1)
    with pytest.raises(ValueError, match="weights"):
        infonce(q_BD, k_ND, positive_B, temperature=0.1, prefixes=[8, 16], prefix_weights=[1.0])
