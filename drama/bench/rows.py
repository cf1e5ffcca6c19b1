"""Interleaved timing, and the CSV rows under `benchmarks/`."""

from __future__ import annotations

import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from drama.errors import UserError
from drama.files import replacing

COLUMNS = (
    "kernel", "provider", "mode", "metric", "x", "median", "p20", "p80",
    "config", "device", "versions", "commit", "date",
)  # fmt: skip
TURN_S = 0.25  # seconds of single calls of one candidate, before the next one's


def whole_numbers(text: str, option: str) -> list[int]:
    """The numbers of an option such as "1,8,32".

    Raises:
        UserError: one of them is no whole number above 0.
    """
    for word in text.split(","):
        if not word.strip().isdecimal() or int(word) < 1:
            raise UserError(f"{option} {text}: '{word}' is no whole number above 0; such as 1,8,32")
    return [int(word) for word in text.split(",")]


def interleaved(
    runs: Mapping[str, Callable[[], None]],
    device: torch.device,
    *,
    seconds: float,
    rounds: int = 60,
    single: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every run, the candidates in turn, after one round that does not count.

    Each round has an order of its own: whoever runs behind the same one every time inherits its
    caches. Runs below 2 ms are timed several calls at a time; with `single`, where the tails
    count, a turn is TURN_S of calls, each timed by itself. At least three rounds, at
    most `rounds`, and none is begun after `seconds`.
    """
    calls = {name: _calls(run, device) for name, run in runs.items()}
    if single:
        calls = dict.fromkeys(calls, 1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, chance = list(runs), random.Random(0)
    began = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - began > seconds:
            break
        chance.shuffle(order)
        for name in order:
            turn = time.perf_counter()
            times[name].append(_seconds(runs[name], device, calls[name]))
            while single and time.perf_counter() - turn < TURN_S:
                times[name].append(_seconds(runs[name], device, 1))
    return times


def _calls(run: Callable[[], None], device: torch.device) -> int:
    """How many calls take about 2 ms; the first call of all, which may compile, does not count."""
    if _seconds(run, device, 1) > 0.1:
        return 1
    return min(50, max(1, round(2e-3 / _seconds(run, device, 1))))


def _seconds(run: Callable[[], None], device: torch.device, calls: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Highest memory of a run beyond what lives before it: allocations are counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _without_stderr(), torch.profiler.profile(profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()  # negative where memory is freed
        peak = max(peak, live)
    return peak


@contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler's C++ side writes two lines there each time."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Rows:
    """Collects rows and writes them beside those of other cases and devices."""

    def __init__(self, kernel: str, device: torch.device) -> None:
        self.kernel, self.rows = kernel, []  # type: ignore[var-annotated]
        self.common = {
            "device": device_name(device),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
        }

    def add(
        self, provider: str, mode: str, metric: str, x: str, values: list[float], config: Any
    ) -> None:
        """One figure: median, 20th and 80th percentile of `values`."""
        low, high = (
            (statistics.quantiles(values, n=5, method="inclusive")[i] for i in (0, 3))
            if len(values) > 1
            else values * 2
        )
        self.rows.append(
            {
                "kernel": self.kernel,
                "provider": provider,
                "mode": mode,
                "metric": metric,
                "x": x,
                "median": f"{statistics.median(values):.4g}",
                "p20": f"{low:.4g}",
                "p80": f"{high:.4g}",
                "config": json.dumps(config),
                **self.common,
            }
        )

    def add_failure(
        self, provider: str, mode: str, x: str, config: Mapping[str, Any], failure: Exception
    ) -> None:
        """A row for a provider that could not do it; its config has the first line of why."""
        kind = "out of memory" if isinstance(failure, torch.OutOfMemoryError) else "failed"
        said = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        self.add(provider, mode, kind, x, [1.0], {**config, "error": said})

    @contextmanager
    def failures(
        self, provider: str, mode: str, x: str, config: Mapping[str, Any]
    ) -> Iterator[None]:
        """Any failure inside becomes a row, and what comes after goes on."""
        try:
            yield
        except Exception as failure:  # a peer's, of whatever kind
            self.add_failure(provider, mode, x, config, failure)
            failure.__traceback__ = None  # whose frames hold the memory that was short
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def write(self, path: Path) -> None:
        """Replace what the file has of the same cases on this device, keep all other rows: a run
        that was cut loses no older figure of what it did not reach."""
        kept, mine = [], {_measured(row) for row in self.rows}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if _measured(row) not in mine]
        with (
            replacing(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept + self.rows)


def _measured(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in ("kernel", "provider", "mode", "x", "device"))


def device_name(device: torch.device) -> str:
    """GPU or processor, and how many threads torch takes of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> str:
    """Versions of what is compared."""
    names = (
        "torch",
        "triton",
        "transformers",
        "sentence-transformers",
        "onnxruntime",
        "faiss-cpu",
        "liger-kernel",
        "inf-cl",
        "cut-cross-entropy",
    )
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([*found, f"Python {platform.python_version()}"])


def commit() -> str:
    """The checkout's commit, marked where it has changes."""
    found = _git("describe", "--always")
    # what was measured a minute ago is no change of the code
    changed = _git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks")
    return f"{found}-dirty" if found and changed else found or "unknown"


def _git(*arguments: str) -> str:
    command, here = ["git", *arguments], Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
