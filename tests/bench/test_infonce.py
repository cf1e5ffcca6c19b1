"""The benchmark's gate, its rows, and that every provider that is here computes the same loss."""

import csv

import pytest
import torch

from drama.bench import infonce as bench
from drama.bench.rows import COLUMNS, Rows, interleaved, peak_bytes
from drama.testing import contrastive_batch

CPU = torch.device("cpu")
CASES = [
    bench.Case(48, 48, 16),
    bench.Case(32, 48, 16),
    bench.Case(48, 48, 16, (8, 16)),
    bench.Case(48, 48, 16, (), True),
    bench.Case(48, 48, 16, backward=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_provider_passes_the_gate_and_gets_its_figures(case):
    rows = Rows("infonce", CPU)
    bench.measure(case, torch.float32, CPU, rows, seconds=0.0)
    found = {(row["provider"], row["metric"]) for row in rows.rows}
    names = set(bench.providers(case, CPU))
    assert {"ours auto", "ours torch", "ours plain"} <= names
    for name in names:
        for metric in ("relative gradient error", "peak MiB beyond inputs", "ms", "TFLOP/s"):
            assert (name, metric) in found, (name, metric)
    errors = [float(r["median"]) for r in rows.rows if r["metric"] == "relative gradient error"]
    assert max(errors) < 1e-3


def test_a_wrong_gradient_gets_no_time(monkeypatch):
    case = bench.Case(16, 16, 8)
    wrong = {"wrong": lambda q, k, p: 1.1 * bench.plain_torch(q, k, p)}
    monkeypatch.setattr(bench, "providers", lambda case, device: wrong)
    rows = Rows("infonce", CPU)
    bench.measure(case, torch.float32, CPU, rows, seconds=0.0)
    metrics = [row["metric"] for row in rows.rows if row["provider"] == "wrong"]
    assert metrics == ["relative gradient error"]


def test_rows_of_other_devices_stay(tmp_path):
    path = tmp_path / "kernels.csv"
    for device, value in (("GPU", 1.0), ("CPU", 2.0), ("CPU", 3.0)):
        rows = Rows("infonce", CPU)
        rows.common["device"] = device
        rows.add("ours", "forward", "ms", "B=1", [value], {"dtype": "x"})
        rows.write(path)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == COLUMNS
    assert [(row["device"], float(row["median"])) for row in read] == [("GPU", 1.0), ("CPU", 3.0)]


def test_candidates_take_turns():
    order = []
    times = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, seconds=0, rounds=9
    )
    assert order == ["a", "b"] * 4, "one round that does not count, and three that do"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_peak_memory_counts_allocations():
    batch = contrastive_batch(256, 256, 16)

    def run() -> None:
        bench.plain_torch(batch.q_BD, batch.k_ND, batch.positive_B)

    matrix = 4 * 256 * 256
    assert 2 * matrix <= peak_bytes(run, CPU) <= 4 * matrix
