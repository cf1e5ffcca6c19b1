"""The benchmark's gate, its rows, and that every provider that is here computes the same loss."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drama.bench import infonce as bench
from drama.bench import infonce_peers as peers
from drama.bench.rows import COLUMNS, Rows, interleaved, peak_bytes
from drama.testing import contrastive_batch

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OURS = {"ours auto", "ours torch", "ours plain"}
CHUNKS = {f"sentence-transformers cached, chunk {n}" for n in (32, 48)}
CHUNKS = CHUNKS if importlib.util.find_spec("sentence_transformers") else set()
LINEAR = (
    {"F.linear_cross_entropy"} if hasattr(torch.nn.functional, "linear_cross_entropy") else set()
)
CASES = {
    peers.Case(48, 48, 16): {"plain torch", *LINEAR, *CHUNKS},
    peers.Case(32, 48, 16): {"plain torch", *LINEAR},
    peers.Case(48, 48, 16, (8, 16)): {"ours one prefix", "separate plain torch losses"},
    peers.Case(48, 48, 16, (), True): {"plain torch", *CHUNKS},
    peers.Case(48, 48, 16, backward=False): {"plain torch", *LINEAR},
    peers.Case(48, 48, 16, (), True, backward=False): {"plain torch"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case} {case.mode}")
def test_every_provider_passes_the_gate_and_gets_its_figures(case, dtype):
    """In bf16 too: a batch that is solved, or a gate that no peer passes, would measure nobody."""
    rows = Rows("infonce", CPU)
    bench.measure(case, dtype, CPU, rows, seconds=0.0)
    found = {(row["provider"], row["metric"]) for row in rows.rows}
    names = set(bench.providers(case, CPU))
    assert names == OURS | CASES[case]
    for name in names:
        for metric in ("relative gradient error", "peak MiB beyond inputs", "ms", "TFLOP/s"):
            assert (name, metric) in found, (name, metric)
    errors = {
        r["provider"]: float(r["median"])
        for r in rows.rows
        if r["metric"] == "relative gradient error"
    }
    assert all(errors[name] < (1e-5 if dtype == torch.float32 else 4e-3) for name in OURS), errors


def test_the_batch_is_not_solved():
    for width in (64, 256, 768):
        case = peers.Case(512, 512, width)
        batch = bench.vectors(case, torch.float32, CPU)
        loss = peers.plain_torch(batch.q_BD, batch.k_ND, batch.positive_B)
        assert 0.3 < loss < 3, (width, loss)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_every_case_of_a_device_is_checked_on_several_chunks(device):
    """What is gated takes the back end that is timed, and the gate's float64 fits a memory."""
    for case in bench.cases(device, quick=False):
        gated = bench.gate_case(case, device)
        if case.rows * case.columns > 2**18:
            assert gated.rows * gated.columns > 2**18, case
        assert gated.rows * gated.columns <= 2**32
        assert gated.mode == case.mode


@pytest.mark.slow
def test_the_grid_of_a_gpu_runs_small_on_a_cpu():
    for case in bench.cases(CUDA, quick=True):
        rows = Rows("infonce", CPU)
        bench.measure(case, torch.bfloat16, CPU, rows, seconds=0.0)
        metrics = [row["metric"] for row in rows.rows]
        assert "ms" in metrics
        assert "failed" not in metrics, rows.rows


def test_gradients_in_chunks_are_those_of_the_whole(monkeypatch):
    case = peers.Case(50, 70, 16, (8, 16))
    batch = bench.vectors(case, torch.float32, CPU)
    whole = bench.exact_gradients(case, batch)
    monkeypatch.setitem(bench.EXACT_AT_ONCE, "cpu", 7 * 70)
    for x, y in zip(bench.exact_gradients(case, batch), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)


def _metrics_of(name, loss, monkeypatch):
    case = peers.Case(16, 16, 8)
    right = (peers.plain_torch, case)
    found = {name: (loss, case), "right": right}
    monkeypatch.setattr(bench, "providers", lambda case, device: found)
    rows = Rows("infonce", CPU)
    bench.measure(case, torch.float32, CPU, rows, seconds=0.0)
    assert "ms" in [row["metric"] for row in rows.rows if row["provider"] == "right"]
    return [row["metric"] for row in rows.rows if row["provider"] == name]


def test_a_wrong_gradient_gets_no_time(monkeypatch):
    def wrong(q_BD, k_ND, positive_B):
        return 1.1 * peers.plain_torch(q_BD, k_ND, positive_B)

    assert _metrics_of("wrong", wrong, monkeypatch) == ["relative gradient error"]


def test_a_provider_that_fails_leaves_a_row_and_the_others_go_on(monkeypatch):
    def broken(q_BD, k_ND, positive_B):
        raise RuntimeError("no kernel image")

    assert _metrics_of("broken", broken, monkeypatch) == ["failed"]


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


def test_candidates_take_turns_in_changing_order():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(runs, CPU, seconds=0)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 3)
    each = len(order) // 3 - 2  # beside the two calls that find out how many make 2 ms
    assert each % 3 == 0
    turns = [order[6 + i * each // 3] for i in range(9)]
    rounds = [tuple(turns[i : i + 3]) for i in (0, 3, 6)]
    assert all(sorted(turn) == list("abc") for turn in rounds)
    assert len(set(rounds)) > 1


def test_peak_memory_counts_allocations():
    batch = contrastive_batch(256, 256, 16)

    def run() -> None:
        peers.plain_torch(batch.q_BD, batch.k_ND, batch.positive_B)

    matrix = 4 * 256 * 256
    assert 2 * matrix <= peak_bytes(run, CPU) <= 4 * matrix


def test_help_teaches_and_a_bad_option_is_one_line():
    script = [sys.executable, str(ROOT / "launchers" / "bench_kernels.py")]
    shown = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "python launchers/bench_kernels.py --quick" in shown
    assert "inf-cl" in shown
    bad = subprocess.run([*script, "--rows"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2


def test_a_limit_of_minutes_names_what_is_left(tmp_path):
    """A GPU's grid begins with what is asked for."""
    wanted = [str(case) for case in bench.cases(torch.device("cuda"), quick=False)[:5]]
    side = 65536
    assert wanted == [
        str(bench.Case(side, side, 768, bench.WIDTHS)), "B=1048576 N=1048576 D=768",
        str(bench.Case(side, side, 768, (), True)),
        "B=65536 N=65536 D=768", "B=65536 N=65536 D=2048",
    ]  # fmt: skip
    command = [sys.executable, str(ROOT / "launchers" / "bench_kernels.py"), "--quick"]
    command += ["--kernel", "infonce", "--minutes", "1e-9", "--out", str(tmp_path / "kernels.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = " ".join(done.stderr.split())
    assert "1e-09 minutes are over; not measured: infonce B=16 N=16 D=256 forward+backward" in said
    assert not (tmp_path / "kernels.csv").exists()


@pytest.mark.slow
def test_the_command_measures_its_small_grid(tmp_path):
    out = tmp_path / "kernels.csv"
    command = [sys.executable, str(ROOT / "launchers" / "bench_kernels.py"), "--quick"]
    command += ["--kernel", "infonce"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert {row["kernel"] for row in read} == {"infonce"}
    assert {row["provider"] for row in read} >= OURS | {"plain torch", "floor"}
    assert len({(row["x"], row["mode"]) for row in read}) == len(bench.cases(CPU, quick=True))
