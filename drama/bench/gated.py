"""One case of a kernel's benchmark: every candidate is held against float64 before it is timed.

A candidate whose results are off is published with its errors and gets no time. One that fails, of
whatever kind, or runs out of memory, gets a row that says so; the others go on. A candidate's time
stands beside that of the floor, which is timed in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from drama.bench.rows import Rows, interleaved, peak_bytes

# relative error of a gradient; plain torch rounds what lies between to the inputs' type
GATE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


class Case(Protocol):
    """One point of a kernel's grid; as text, its shape."""

    @property
    def kernel(self) -> str:
        """What the rows are filed under."""

    @property
    def mode(self) -> str:
        """What of the kernel is run."""

    @property
    def work(self) -> tuple[str, float]:
        """The unit of a rate, and how much of it one run does in its second."""


class Candidate(NamedTuple):
    """Something that computes a case.

    errors: relative errors against float64 by name. run: what is timed, at the case's shape.
    checked_at: the shape of `errors`.
    """

    errors: Callable[[], Mapping[str, float]]
    run: Callable[[], None]
    checked_at: str


def compare(
    case: Case,
    candidates: Mapping[str, Candidate],
    floor: Callable[[], None],
    rows: Rows,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    config: Mapping[str, Any],
) -> None:
    """Gate, memory and time of every candidate of a case; appends to `rows`."""
    x, common = str(case), {"dtype": str(dtype), **config}
    runs: dict[str, Callable[[], None]] = {"floor": floor}
    for name, candidate in candidates.items():
        checked = common | {"checked at": candidate.checked_at}
        with rows.failures(name, case.mode, x, checked):
            errors = candidate.errors()
            for metric, error in errors.items():
                rows.add(name, case.mode, metric, x, [error], checked)
            if not all(error <= GATE[dtype] for error in errors.values()):
                continue
            memory = peak_bytes(candidate.run, device)
            rows.add(name, case.mode, "peak MiB beyond inputs", x, [memory / 2**20], checked)
            runs[name] = candidate.run
    broken: dict[str, Exception] = {}
    guarded = {name: _guarded(name, run, broken) for name, run in runs.items()}
    times = interleaved(guarded, device, seconds=seconds)
    for name, failure in broken.items():
        rows.add_failure(name, case.mode, x, common, failure)
        del times[name]
    unit, amount = case.work
    base = sorted(times["floor"])[len(times["floor"]) // 2] if "floor" in times else None
    for name, values in times.items():
        rows.add(name, case.mode, "ms", x, [1e3 * t for t in values], common)
        rows.add(name, case.mode, unit, x, [amount / t for t in values], common)
        if name != "floor" and base is not None:
            rows.add(name, case.mode, "fraction of floor", x, [base / t for t in values], common)


def _guarded(
    name: str, run: Callable[[], None], broken: dict[str, Exception]
) -> Callable[[], None]:
    """A run that is skipped once it has failed: it went well before, and may not any more."""

    def call() -> None:
        if name in broken:
            return
        try:
            run()
        except Exception as failure:
            broken[name] = failure.with_traceback(None)  # whose frames hold memory

    return call
