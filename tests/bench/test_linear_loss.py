"""The benchmark of the language-model loss: every provider is right, the gate is at a corner."""

import pytest
import torch

from drama.bench import linear_loss as bench
from drama.bench.rows import Rows
from drama.kernels import linear_loss_torch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LINEAR = {"F.linear_cross_entropy"} & {f"F.{name}" for name in dir(torch.nn.functional)}
NAMES = {"ours auto", "ours torch", "plain torch"} | LINEAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_provider_passes_the_gate_and_gets_its_figures(dtype, monkeypatch):
    monkeypatch.setitem(bench.CORNER, "cpu", (48, 300))
    rows = Rows("linear_loss", CPU)
    bench.measure(bench.Case(64, 500, 32), dtype, CPU, rows, seconds=0.0)
    found = {(row["provider"], row["metric"]): float(row["median"]) for row in rows.rows}
    narrow = {"plain torch, float32 logits"} if dtype != torch.float32 else set()
    assert {name for name, _ in found} == NAMES | narrow | {"floor"}
    for name in NAMES | narrow:
        for metric in ("ms", "TFLOP/s", "fraction of floor", "peak MiB beyond inputs"):
            assert found[name, metric] > 0, (name, metric)
        error = found[name, "relative gradient error"]
        assert error < (1e-5 if dtype == torch.float32 else 0.03), (name, error)
    checked = [row["config"] for row in rows.rows if row["metric"] == "relative gradient error"]
    assert all("T=48 V=300 D=32" in config for config in checked)


def test_the_oracle_is_float64_autograd_over_all_logits():
    hidden_TD, weight_VD, target_T = bench.batch_of(bench.Case(20, 31, 8), torch.float32, CPU)
    loss, dhidden_TD, dweight_VD = bench._exact(hidden_TD, weight_VD, target_T)
    h_TD, w_VD = hidden_TD.detach().double(), weight_VD.detach().double()
    p_TV = torch.softmax(h_TD @ w_VD.T, 1)
    torch.testing.assert_close(loss, -p_TV[torch.arange(20), target_T].log().sum())
    p_TV[torch.arange(20), target_T] -= 1
    torch.testing.assert_close(dhidden_TD, p_TV @ w_VD)
    torch.testing.assert_close(dweight_VD, p_TV.T @ h_TD)


def test_the_batch_is_neither_solved_nor_hopeless():
    batch = bench.batch_of(bench.Case(256, 8192, 64), torch.float32, CPU)
    assert 2 < bench.plain_torch(*batch).item() / 256 < 12


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_what_is_checked_takes_several_chunks_where_what_is_timed_does(device):
    work = {
        "cpu": linear_loss_torch.WORK_ELEMENTS,
        "cuda": linear_loss_torch.GPU_WORK_ELEMENTS,
    }[device.type]
    for case in bench.cases(device, quick=False):
        gated = bench.gate_case(case, device)
        assert gated.width == case.width
        assert gated.tokens * gated.vocabulary <= 2**28
        if case.tokens * case.vocabulary > work:
            assert gated.tokens * gated.vocabulary > work
