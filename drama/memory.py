"""How much memory a graph takes, and how much is left for more of them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

# of the spare memory, what one full local gradient may take where the fast form of reduction needs
# one
GRADIENT_SHARE = 0.25
# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# limit and present use of this process's control group: version 2, then version 1
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


class GraphBytes:
    """Counts what autograd saves for the backward pass while it watches.

    Each storage once; those of `weights` do not count: they live anyway.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.seen = {_storage(x) for x in weights}
        self.total = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count inside this block."""

        def note(x: Tensor) -> Tensor:
            if _storage(x) not in self.seen:
                self.seen.add(_storage(x))
                self.total += x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            yield


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees, for its next allocation.

    By default every large tensor is mapped from the kernel and given back when it dies: zeroed page
    by page, each time. A training step allocates the same tensors again and again; without this it
    is a fifth slower on a CPU. Elsewhere than on glibc nothing happens.

    Call it before TensorBoard is imported: the C runtime of its protobuf messages trims the whole
    heap after every 10,000 pieces that it frees; that in Python, 0.1 ms slower a value, does not.
    """
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def _freed_bytes() -> int:
    """What malloc holds in memory and nobody uses. Not its own count of free bytes: many of those
    were never touched, or were given back, and take no memory."""
    libc = _libc()
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _MallocInfo
    return max(0, _resident("RssAnon") - int(libc.mallinfo2().uordblks))


def _give_back_freed_memory() -> None:
    """So that the high-water mark begins at what is in use."""
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class _MallocInfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


@functools.cache
def _libc() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return object()


def spare_bytes(device: torch.device) -> int:
    """Bytes that this process may still take: free memory, and what its allocator holds unused.

    A tenth of a GPU is left alone, of a CPU's memory a quarter: others take some too, and malloc's
    holes count as unused. The ranks of a machine share what it, or their control group, has left.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + idle - total // 10
    memory = psutil.virtual_memory()
    left, total = memory.available, memory.total
    for limit_file, used_file, file_pages in _CGROUPS:
        limit, used = _number(Path(limit_file)), _number(Path(used_file))
        if limit is None or used is None or limit >= memory.total:
            continue
        # pages of files count as used, but are given up where memory is short
        cached = _statistics(Path(limit_file).parent / "memory.stat").get(file_pages, 0)
        left, total = min(left, limit - used + cached), min(total, limit)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return (left - total // 4) // ranks_here + _freed_bytes()


def machine_bytes() -> int:
    """Memory of this machine, or of this process's control group where that has less."""
    limits = (_number(Path(limit_file)) for limit_file, *_ in _CGROUPS)
    return min([psutil.virtual_memory().total, *(x for x in limits if x is not None)])


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such control group, or "max"
        return None


def _statistics(path: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return {name: int(value) for name, value in pairs}
    except (OSError, ValueError):
        return {}


class PeakMemory:
    """Bytes beyond the present use that a stretch of work takes at its highest.

    CUDA: the allocator's count. CPU: the resident set, after malloc gave back what it held unused;
    Linux resets its high-water mark on request; elsewhere it is the mark since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        _give_back_freed_memory()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _resident("VmRSS")

    def taken(self) -> int:
        """The peak so far, less what was in use at the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(0, _resident("VmHWM") - self.before)


def _resident(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return int(psutil.Process().memory_info().rss)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
