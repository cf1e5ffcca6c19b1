"""Commands that are killed at a chosen moment, for tests and for the soak; Linux only.

A `Job` is a command with all that it starts, found again by a mark in their environment, whatever
session they are in. A moment is a function that looks at the job's files: `kill_at` polls it every
millisecond, freezes the ranks when it has come, and looks once more: nothing moves between the
moment and the kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from drama.distributed import free_port

Moment = Callable[[], bool]
_MARK = "DRAMA_JOB_OF_A_TEST"
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# data loader workers look for their parent every 5 s; a `deepspeed` that was told to end leaves at
# once, and its other half gives the ranks 30 s
OUTLIVES_S = 60
LAST_LINE = 16_384  # bytes; no line of metrics.jsonl is longer


class Job:
    """A command that runs, what it says in the file `log`; a context manager that leaves nothing of
    it alive.

    environment: added to this process's.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.mark, self.log = f"{_MARK}={uuid.uuid4()}", log
        inherited = {name: x for name, x in os.environ.items() if name not in _OF_LAUNCHERS}
        marked = dict([self.mark.split("=")])
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env=inherited | dict(environment or {}) | marked,
                start_new_session=True,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self._send(self.alive(), signal.SIGKILL)
        self.process.wait()

    def alive(self) -> list[int]:
        """Processes of the job that have not ended, whoever their parent is now."""
        return [pid for pid in _processes() if self.mark in _environment(pid)]

    def ranks(self) -> dict[int, int]:
        """The processes that a launcher started, by rank; not what these started themselves."""
        found = {}
        for pid in self.alive():
            ours = _rank(_environment(pid))
            if ours is not None and _rank(_environment(_parent(pid))) is None:
                found[ours] = pid
        return found

    def wait_for(self, moment: Moment, timeout: float = 300, pause: float = 0.01) -> None:
        """Until the moment has come.

        Raises:
            AssertionError: the command ended before, or `timeout` seconds have passed.
        """
        deadline = time.monotonic() + timeout
        while not moment():
            assert self.process.poll() is None, f"it ended before the moment came: {self.said()}"
            assert time.monotonic() < deadline, f"the moment has not come: {self.said()}"
            time.sleep(pause)

    def kill_at(self, moment: Moment, rank: int | None = None, timeout: float = 300) -> None:
        """SIGKILL a rank, or everything, at the moment; return when the whole job has ended.

        A moment that is over before everything stands still is waited for again.

        Raises:
            AssertionError: as `wait_for`; or something of the job outlives it.
        """
        frozen: list[int] = []
        deadline = time.monotonic() + timeout
        while True:
            self.wait_for(moment, deadline - time.monotonic(), pause=0.001)
            # ranks do not change while a job runs; finding them takes longer than a moment lasts
            frozen = frozen or list(self.ranks().values()) or [self.process.pid]
            self._send(frozen, signal.SIGSTOP)
            if moment():
                break
            self._send(frozen, signal.SIGCONT)
        self._send(self.alive() if rank is None else [self.ranks()[rank]], signal.SIGKILL)
        self._send(frozen, signal.SIGCONT)
        assert self.ended(), "a killed command ended with exit code 0"

    def terminate(self) -> None:
        """SIGTERM to launcher and ranks, as schedulers send it."""
        self._send(self.alive(), signal.SIGTERM)

    def ended(self, timeout: float = 300) -> int:
        """The exit code, once every process of the job is over.

        Raises:
            AssertionError: some outlive the command by a minute.
        """
        code = self.process.wait(timeout)
        deadline = time.monotonic() + OUTLIVES_S
        while left := self.alive():
            assert time.monotonic() < deadline, f"still alive: {[_command(pid) for pid in left]}"
            time.sleep(0.02)
        return code

    def said(self, num_characters: int = 3000) -> str:
        """The end of its output."""
        return self.log.read_text(errors="replace")[-num_characters:]

    @staticmethod
    def _send(pids: Iterable[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def deepspeed_command(script: Path, *arguments: str, num_ranks: int = 2) -> list[str]:
    """`deepspeed --num_gpus N script arguments` on a free port."""
    return [
        sys.executable, "-P", "-m", "deepspeed.launcher.runner", "--no_local_rank",
        "--num_gpus", str(num_ranks), "--master_port", str(free_port()), str(script), *arguments,
    ]  # fmt: skip


def steps_done(run: Path) -> int:
    """Steps of which a run's metrics.jsonl has a whole line."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LAST_LINE))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) + 1 if lines else 0


class Changes:
    """Counts how often what lies below a folder has been seen to change: moments of a job that is
    known by its files alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self._seen = self._look()

    def __call__(self) -> int:
        """Look again; the count."""
        now = self._look()
        self.count += now != self._seen
        self._seen = now
        return self.count

    def _look(self) -> set[tuple[str, int, int]]:
        found = set()
        for where, _, names in os.walk(self.folder):  # a folder may vanish meanwhile
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    facts = os.stat(os.path.join(where, name))
                    found.add((f"{where}/{name}", facts.st_size, facts.st_mtime_ns))
        return found


def digests(folder: Path, leave_out: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of every file below a folder, hidden ones too, by relative path.

    leave_out: patterns of relative paths.
    """
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if not any(fnmatch(name, pattern) for pattern in leave_out):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(pid: int) -> list[str]:
    """NAME=VALUE as the process was started with; none where it has ended or is another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _rank(environment: Sequence[str]) -> int | None:
    return next((int(x[5:]) for x in environment if x.startswith("RANK=")), None)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    except OSError:
        return f"process {pid}"
