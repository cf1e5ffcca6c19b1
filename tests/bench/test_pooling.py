"""The pooling benchmark: every provider is right at every kind of case, and the real command."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drama.bench import pooling as bench
from drama.bench.rows import Rows

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = {"last": {"ours auto", "plain torch", "plain torch, padded"}}
NAMES["mean"] = NAMES["last"] | {"plain torch, segment_reduce"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pooling", NAMES)
@pytest.mark.parametrize("backward", [True, False], ids=["backward", "forward"])
def test_every_provider_passes_the_gate_and_gets_its_figures(pooling, dtype, backward):
    rows = Rows(f"pool_{pooling}", CPU)
    bench.measure(bench.Case(pooling, 300, 20, 24, backward), dtype, CPU, rows, seconds=0.0)
    found = {(row["provider"], row["metric"]): float(row["median"]) for row in rows.rows}
    assert {name for name, _ in found} == NAMES[pooling] | {"floor"}
    for name in NAMES[pooling]:
        for metric in ("ms", "GB/s", "fraction of floor", "peak MiB beyond inputs"):
            assert found[name, metric] > 0, (name, metric)
        for what in ("output", "gradient"):
            error = found[name, f"relative {what} error"]
            assert error < (1e-5 if dtype == torch.float32 else 0.02), (name, what, error)


def test_a_wrong_provider_gets_no_time(monkeypatch):
    def wrong(hidden_TD, cu_seqlens, weight_D, **options):
        return 1.1 * bench.pool_mean(hidden_TD, cu_seqlens, weight_D, **options)

    monkeypatch.setattr(bench, "pool_last", wrong)
    rows = Rows("pool_last", CPU)
    bench.measure(bench.Case("last", 300, 20, 24), torch.float32, CPU, rows, seconds=0.0)
    metrics = {row["metric"] for row in rows.rows if row["provider"] == "ours auto"}
    assert metrics == {"relative output error", "relative gradient error"}
    assert "ms" in {row["metric"] for row in rows.rows if row["provider"] == "plain torch"}


def test_compiled_plain_torch_is_that_of_a_gpu_alone():
    weight = torch.nn.Parameter(torch.ones(8))
    case = bench.Case("last", 30, 5, 8)
    cu_seqlens = bench.states(case, torch.float32, CPU).cu_seqlens
    assert "plain torch, compiled" not in bench._providers(case, weight, cu_seqlens)


def test_bytes_that_must_move():
    """Counted by hand: 100 tokens of width 8 in bf16 are 1,600 bytes."""
    case = bench.Case("last", 100, 30, 8, backward=False, element=2)
    rows = len(case.lengths) * 8 * 2
    assert case.bytes == 2 * rows
    assert replace(case, backward=True).bytes == 4 * rows + 1600
    assert replace(case, pooling="mean").bytes == 1600 + rows
    assert replace(case, pooling="mean", backward=True).bytes == 3 * 1600 + 2 * rows


def test_the_grids():
    """Lengths fill the tokens and have the mean that the case names."""
    grid = bench.cases(CUDA, quick=False)
    assert {(c.length, c.width) for c in grid} == {
        (n, d) for n in (256, 512, 40) for d in (768, 2048)
    }
    for case in grid:
        assert sum(case.lengths) == case.tokens == 65536
        assert abs(case.tokens / len(case.lengths) / case.length - 1) < 0.1
        assert min(case.lengths) >= 1
    assert len(grid) == 2 * 2 * 6
    assert all(c.tokens < 65536 for c in bench.cases(CPU, quick=False))


def test_the_command_keeps_what_other_kernels_wrote(tmp_path):
    out = tmp_path / "kernels.csv"
    for kernel in ("pool", "linear_loss"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "launchers" / "bench_kernels.py"),
             "--quick", "--kernel", kernel, "--out", str(out)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        read = list(csv.DictReader(file))
    cases = {(row["kernel"], row["x"], row["mode"]) for row in read}
    assert {kernel for kernel, _, _ in cases} == {"pool_last", "pool_mean", "linear_loss"}
    assert len(cases) == len(bench.cases(CPU, quick=True)) + 2
    assert not [row for row in read if row["metric"] in ("failed", "out of memory")]
    assert all(float(row["median"]) > 0 for row in read)
