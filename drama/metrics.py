"""What a step cost: tokens, FLOPs, share of the machine's peak, memory; one JSON line a step."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import Progress, TaskID

from drama.console import console
from drama.distributed import Ranks
from drama.files import replacing
from drama.full_disk import FullDisk
from drama.settings import Settings

AnySettings = TypeVar("AnySettings", bound=Settings)
# dense bf16 peak in FLOP/s, from the vendors' data sheets, by a part of the device's name
GPU_PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "A10": 125e12,
}


def forward_flops(config: Any, lengths: Sequence[int], *, last_token_only: bool = False) -> float:
    """FLOPs of one forward pass over packed texts of these lengths, the embedding look-up free.

    2 per weight and token, and 4 * heads * head_dim * length per token for the two attention
    products (bidirectional; a causal mask is counted in full, as kernels' users expect). With
    `last_token_only` the last block counts keys and values of all tokens, the rest once a text.
    """
    width = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    q_width = config.num_attention_heads * head_dim
    kv_weights = 2 * width * config.num_key_value_heads * head_dim
    other_weights = 2 * width * q_width + 3 * width * config.intermediate_size
    tokens, squares, texts = sum(lengths), sum(n * n for n in lengths), len(lengths)
    block = 2 * (kv_weights + other_weights) * tokens + 4 * q_width * squares
    last = block
    if last_token_only:
        last = 2 * (kv_weights * tokens + other_weights * texts) + 4 * q_width * tokens
    return float((config.num_hidden_layers - 1) * block + last)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of a square matrix product on this process's share of the device, measured."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(a, b)
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return 2 * size**3 * count / (time.perf_counter() - start)


def with_precision(
    recipe: AnySettings, ranks: Ranks, named: AnySettings | None = None
) -> tuple[AnySettings, AnySettings | None]:
    """A recipe with its precision settled, as in the run that goes on or by what multiplies faster;
    and the recipe stored in that run, if there is one. A collective.

    named: instead of that one, the recipe of another run that goes on here.
    """
    path = recipe.output / "recipe.yaml"
    stored = named or (type(recipe).load(path) if path.is_file() else None)
    asked: Any = recipe
    precision = asked.train.precision
    if precision == "auto":
        earlier: Any = stored
        precision = earlier.train.precision if earlier else faster_precision(ranks)
    return recipe.with_values(train__precision=precision), stored


def faster_precision(ranks: Ranks) -> str:
    """ "bf16" or "fp32", whichever the ranks multiply faster; a collective."""
    if ranks.device.type == "cuda":
        return "bf16"
    rates = {
        name: ranks.sum(matmul_rate(ranks.device, dtype))
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    best = max(rates, key=lambda name: rates[name])
    shown = ", ".join(f"{n} {r / 1e9:,.0f} GFLOP/s" for n, r in rates.items())
    console.print(f"precision: {best} (matrix product: {shown})")
    return best


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The rank's peak: the data sheet's for a known GPU in bf16, else a measured matrix rate."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in GPU_PEAK_FLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return peak
    return matmul_rate(device, dtype)


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory so far: the allocator's on CUDA, the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Stopwatch:
    """Seconds of a step by phase; a phase that comes again adds up.

    On a GPU by the GPU's own clock: nothing waits before `seconds` is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, phase: str) -> None:
        """All since the last lap was this phase."""
        self.marks.append((phase, self._now()))

    @property
    def seconds(self) -> dict[str, float]:
        """By phase; waits for the end of the last one."""
        if self.cuda:
            self.marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (_, start), (phase, end) in itertools.pairwise(self.marks):
            passed = start.elapsed_time(end) / 1e3 if self.cuda else end - start
            found[phase] = found.get(phase, 0.0) + passed
        return found

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class MetricsFile:
    """`metrics.jsonl`: one object a line, flushed line by line; resuming drops later lines."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        if path.exists():
            kept = [
                line for line in path.read_text().splitlines() if step_of_line(line) < first_step
            ]
            with replacing(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()  # what does not fit stays in the buffer, for the next time

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class StepLog:
    """A run's metrics.jsonl, on the main rank alone, and its progress bar."""

    def __init__(self, output: Path, ranks: Ranks, title: str) -> None:
        self.output, self.ranks, self.title = output, ranks, title
        self.file: MetricsFile | None = None
        self.full = FullDisk()

    def _write(self, line: dict[str, Any]) -> None:
        assert self.file is not None
        self._where_it_fits(partial(self.file.write, line))

    def _publish(self, monitor: Any, events: list[tuple[str, Any, int]]) -> None:
        """To TensorBoard and the like."""
        self._where_it_fits(lambda: monitor.write_events(events))

    def _where_it_fits(self, write: Callable[[], None]) -> None:
        """A full disk under the log is a warning, once: training itself goes on."""
        known = self.full.found
        with self.full.noted():
            write()
        if self.full.found and not known:
            console.print(
                f"warning: {self.output}: the disk is full, metrics.jsonl and TensorBoard may lack "
                "steps from here on",
                style="yellow", markup=False, soft_wrap=True, highlight=False,
            )  # fmt: skip

    def open(self, first_step: int, bar: Progress, num_steps: int) -> None:
        """Go on at a step: later lines of a run that was stopped are dropped."""
        if self.ranks.is_main:
            self.file = MetricsFile(self.output / "metrics.jsonl", first_step=first_step)
        self.bar = bar
        self.task: TaskID = bar.add_task(self.title, total=num_steps, completed=first_step, note="")

    def skip(
        self, step: int, total: int, *, lr: float, seconds: float, evaluation: Any = None
    ) -> None:
        """A step that was left out. total: of them since the run began."""
        if self.file is None:
            return
        line = {"step": step, "skipped": True, "skipped_steps": total, "lr": lr, "seconds": seconds}
        self._write(line | ({} if evaluation is None else {"evaluation": evaluation}))
        self.bar.update(self.task, advance=1, note="left out")

    def close(self) -> None:
        """Have all lines on the disk."""
        if self.file is not None:
            self._where_it_fits(self.file.close)


def step_of_line(line: str) -> float:
    """The step that a line of JSON is of; infinite for one that a kill or a full disk cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
