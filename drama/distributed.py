"""The ranks of a run: started by `deepspeed`, `torchrun`, or alone."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import logging
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from drama.console import console
from drama.errors import UserError
from drama.memory import keep_freed_memory

if not torch.cuda.is_available():  # else DeepSpeed warns in every process that it found none
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

_deals = itertools.count()  # how often this process has called `Ranks.deal`


class Stopped(SystemExit):
    """Every rank leaves now, in order, with exit code 0: a run that was told to end has saved."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among its peers, and the device it owns."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum over all ranks; a collective."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def on_main(self, work: Callable[[], None]) -> None:
        """Do something long on the main rank while the others wait, a day if need be.

        Raises:
            UserError: on every rank, with what the main rank found; any other fault of its as
                RuntimeError on the others.
        """
        if self.world_size == 1:
            work()
            return
        group, own = _patient_group(), None
        fault: list[tuple[bool, str] | None] = [None]
        if self.is_main:
            try:
                work()
            except Exception as error:
                own, fault = error, [(isinstance(error, UserError), str(error))]
        dist.broadcast_object_list(fault, src=0, group=group)
        if own is not None:
            raise own
        if fault[0] is not None:
            is_the_users, message = fault[0]
            raise (UserError if is_the_users else RuntimeError)(message)

    def wait(self) -> None:
        """Until every rank is here, a day if need be."""
        if self.world_size > 1:
            dist.barrier(group=_patient_group())

    def deal(self) -> Iterator[int]:
        """0, 1, 2, ... dealt out among the ranks: each number goes to the one that asks next.

        Every rank calls it, in the same order with other calls of it.
        """
        if self.world_size == 1:
            return itertools.count()
        store, key = dist.distributed_c10d._get_default_store(), f"drama/deal/{next(_deals)}"
        return (store.add(key, 1) - 1 for _ in itertools.count())

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Ranks]:
        """Join the process group that the launcher describes, or one of a single rank.

        On the CPU the cores are shared out among the ranks of this machine.

        Raises:
            UserError: the port of the rendezvous is in use, or several processes without a
                launcher of ranks.
        """
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls torch's collectives by the names that torch 2.13 replaced
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        if "RANK" not in os.environ:
            _check_alone(os.environ)
            alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            os.environ.update({key: str(value) for key, value in alone.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        # torchrun's name; DeepSpeed's launcher has another, mpirun none
        here = os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])
        ranks_here = int(os.environ.setdefault("LOCAL_WORLD_SIZE", here))
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
            _prepare_extensions(local_rank)
            keep_freed_memory()
        try:
            deepspeed.init_distributed(
                "nccl" if device.type == "cuda" else "gloo", verbose=False, timeout=_patience()
            )
        except (RuntimeError, ValueError) as error:
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                raise UserError(
                    f"port {os.environ['MASTER_PORT']} is in use; give another one with "
                    "deepspeed --master_port PORT"
                ) from error
            raise
        atexit.register(_let_gloo_finish)
        stopped: Stopped | None = None
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), device)
        except Stopped as error:
            stopped = error
        # nobody leaves before everybody is done: gloo aborts when a peer closes during teardown
        dist.barrier()
        if local_rank == 0:
            _drop_shared_buffers(f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}")
        dist.destroy_process_group()
        if stopped is not None:
            raise stopped


def _let_gloo_finish() -> None:
    """Wait, two seconds at most, until gloo's threads sleep.

    DeepSpeed's engines are never freed and keep their groups' threads alive. A thread that lets go
    of a finished collective's tensors while the interpreter ends aborts the process
    (github.com/pytorch/pytorch/issues/190489), and on a loaded machine it may lag that far behind.
    """
    deadline, quiet = time.monotonic() + 2, 0  # below the watchdog's patience with a rank that ends
    while quiet < 3 and time.monotonic() < deadline:
        time.sleep(0.005)  # without the interpreter's lock, which such a thread may wait for
        quiet = 0 if _gloo_runs() else quiet + 1


def _gloo_runs() -> bool:
    """Whether a thread of gloo that holds tensors runs, as Linux tells it; False elsewhere."""
    for thread in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            if re.search(rb"\(pt_gloo_runloop\) [RD]", thread.read_bytes()):
                return True
    return False


def _patience() -> timedelta:
    """How long a collective waits: longer than `train.stuck_after`, which says whom it waits for;
    DeepSpeed's own ten minutes name nobody."""
    return timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "30")))


def _check_alone(environment: Mapping[str, str]) -> None:
    """Refuse to be one of several tasks that nobody made ranks of: each would train alone, all into
    one folder. A SLURM batch script itself is task 0 of a job of many, but of no step."""
    tasks = {
        "srun": environment.get("SLURM_STEP_NUM_TASKS", "1"),
        "mpirun": environment.get("OMPI_COMM_WORLD_SIZE", environment.get("PMI_SIZE", "1")),
    }
    if environment.get("SLURM_PROCID", "0") != "0":
        tasks["srun"] = environment.get("SLURM_NTASKS", "several")
    for program, count in tasks.items():
        if count != "1":
            raise UserError(
                f"{program} started {count} tasks, which makes no ranks of them: each would train "
                "alone; let every node's one task call torchrun, or call deepspeed, as in "
                "docs/clusters.md"
            )


def _prepare_extensions(local_rank: int) -> None:
    """Give DeepSpeed's CPU op a folder of this environment's own and drop a lock that nobody holds.

    DeepSpeed compiles the op on first use. A process killed meanwhile leaves torch's lock file, and
    every later run would wait for it without a word.
    """
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    if local_rank != 0 or "TORCH_EXTENSIONS_DIR" not in os.environ:
        return
    _drop_shared_buffers()
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    for lock in folder.glob("*/lock"):
        if not _is_open(lock):
            lock.unlink(missing_ok=True)
    if not list(folder.glob("deepspeed_shm_comm/*.so")):
        console.print("DeepSpeed compiles its shared-memory op: about 30 s, once")


def _drop_shared_buffers(run: str = "*") -> None:
    """Remove buffers of DeepSpeed's CPU op: 64 MiB a rank that it leaves in the machine's memory.

    run: address and port of a run that has ended; default, all runs that no process belongs to.
    """
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{run}_*"):
        if run != "*" or not _is_mapped(buffer):
            buffer.unlink(missing_ok=True)


def _is_mapped(path: Path) -> bool:
    """Whether a process of this machine uses the file as memory, or it is too young to tell."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime < 60:
            return True
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return False


def _is_open(path: Path) -> bool:
    """Whether any process of this machine holds the file open; torch keeps its lock file open."""
    target = str(path.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) == target:
                return True
    return False


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    """All ranks in a group that waits a day; making it is a collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


@functools.cache
def host_group() -> dist.ProcessGroup | None:
    """All ranks in a group that moves host memory; None is the default group, or no group at all.

    Every rank calls it at the same place the first time: making a group is a collective.
    """
    if not dist.is_initialized() or dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo")


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on right now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
