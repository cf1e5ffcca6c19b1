"""Who gets a row of what: a candidate that is off, that fails at once, or that fails later."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from drama.bench.gated import Candidate, compare
from drama.bench.rows import Rows

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
OPTIONAL = ("deepspeed", "bm25s", "faiss", "ir_measures", "webdataset", "datasets")


class Case(NamedTuple):
    kernel: str = "none"
    mode: str = "forward"
    work: tuple[str, float] = ("GB/s", 3.0)


def compared(**candidates):
    rows = Rows("none", CPU)
    compare(
        Case(), candidates, lambda: None, rows,
        dtype=torch.float32, device=CPU, seconds=0.0, config={"of": "all"},
    )  # fmt: skip
    return {(row["provider"], row["metric"]): row for row in rows.rows}


def raising(failure, *, after=0):
    calls = []

    def run():
        calls.append(1)
        if len(calls) > after:
            raise failure

    return run


def good(error=1e-6, run=lambda: None):
    return Candidate(lambda: {"relative gradient error": error}, run, "here")


def metrics_of(name, found):
    return {metric for provider, metric in found if provider == name}


ALL = {"relative gradient error", "peak MiB beyond inputs", "ms", "GB/s", "fraction of floor"}


def test_whoever_is_off_fails_or_finds_no_memory_gets_no_time_and_the_others_do():
    found = compared(
        off=good(0.01),
        nan=good(float("nan")),
        broken=Candidate(raising(RuntimeError("no kernel\nimage")), lambda: None, "here"),
        large=good(run=raising(torch.OutOfMemoryError("8 GiB"))),
        right=good(),
    )
    for name in ("off", "nan"):
        assert metrics_of(name, found) == {"relative gradient error"}
    assert metrics_of("broken", found) == {"failed"}
    error = json.loads(found["broken", "failed"]["config"])["error"]
    assert error == "RuntimeError: no kernel"
    assert metrics_of("large", found) == {"relative gradient error", "out of memory"}
    assert metrics_of("right", found) == ALL
    assert metrics_of("floor", found) == {"ms", "GB/s"}


def test_a_failure_in_a_later_round_leaves_the_others_their_times():
    found = compared(late=good(run=raising(RuntimeError("late"), after=60)), right=good())
    assert metrics_of("late", found) == {
        "relative gradient error", "peak MiB beyond inputs", "failed",
    }  # fmt: skip
    assert metrics_of("right", found) == ALL


def test_rate_is_work_over_time():
    row = {metric: row for (name, metric), row in compared(right=good()).items() if name == "right"}
    seconds = float(row["ms"]["median"]) / 1e3
    assert abs(float(row["GB/s"]["median"]) * seconds / 3 - 1) < 2e-3


def test_a_case_measured_again_replaces_its_rows_alone(tmp_path):
    """Also what it had where it now runs out of memory; a run that was cut leaves the others."""
    path = tmp_path / "kernels.csv"
    first, second = Rows("infonce", CPU), Rows("infonce", CPU)
    for x in ("B=1", "B=2"):
        first.add("ours", "forward", "ms", x, [1.0], {})
    first.write(path)
    second.add("ours", "forward", "out of memory", "B=1", [1.0], {})
    second.write(path)
    with path.open(newline="") as file:
        read = [(row["x"], row["metric"]) for row in csv.DictReader(file)]
    assert read == [("B=2", "ms"), ("B=1", "out of memory")]


def test_rows_of_other_kernels_stay(tmp_path):
    path = tmp_path / "kernels.csv"
    for kernel, value in (("infonce", 1.0), ("pool_last", 2.0), ("pool_mean", 3.0), ("infonce", 4)):
        rows = Rows(kernel, CPU)
        rows.add("ours", "forward", "ms", "x", [value], {})
        rows.write(path)
    with path.open(newline="") as file:
        read = {row["kernel"]: float(row["median"]) for row in csv.DictReader(file)}
    assert read == {"pool_last": 2.0, "pool_mean": 3.0, "infonce": 4.0}


def test_nothing_of_training_or_retrieval_is_needed():
    """A GPU that is lent for minutes has torch, Triton and transformers, and no more."""
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "import drama.bench.infonce, drama.bench.pooling, drama.bench.linear_loss\n"
        "import drama.launchers.bench_kernels\n"
        "from drama.bench.pooling import PlainPool\n"
        "from transformers.models.llama.modeling_llama import LlamaRMSNorm\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
