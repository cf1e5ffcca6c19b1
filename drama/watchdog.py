"""A rank that dies or hangs ends all ranks, with a line that names it.

Every rank says where it stands (step, phase, line of code) in the store of the rendezvous, once a
second, from a thread; every rank reads what the others say.

    dead     a rank of this machine whose process is gone
    ended    a rank has left with an error, and the others wait for it
    silent   a rank says nothing for `SILENT_S` seconds: stopped, its machine or its network gone;
             in a phase that may hold Python's lock for long, `stuck_after` seconds
    stuck    no rank comes on for `stuck_after` seconds (times `LONG` where its phase may be long:
             first step, evaluation, checkpoint); named is the rank that is furthest behind and does
             not wait for others

Then each rank that is left kills the named one if it is on its machine, prints the line, and ends
with exit code 1. The first verdict is everybody's. A rank's last word is up to a second old when it
dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import psutil
import torch.distributed as dist

from drama.distributed import Ranks
from drama.errors import UserError

SILENT_S = 60.0
LONG = 20
# between a rank's end and that of those it left waiting: what it said last is to be read first.
# Launchers wait 30 s after a rank's death before they kill the others
ENDED_S = 3.0
PHASES = ("data", "step", "evaluate", "save")  # of a step, in order
LONG_PHASES = ("first step", "evaluate", "save")
# what the peers of a dead rank see of it
_BROKEN = re.compile(r"connection|gloo|nccl|socket|peer|timed out", re.IGNORECASE)


@dataclass
class _Seen:
    """What a rank said last, and when (monotonic seconds) it last said something, and came on."""

    said: dict[str, Any]
    heard_at: float
    moved_at: float


class Watchdog:
    """Watches the ranks while a run trains; a context manager. Nothing on one rank.

    stuck_after: seconds. `at` says where this rank stands.
    """

    def __init__(self, ranks: Ranks, stuck_after: float) -> None:
        self.ranks, self.stuck_after = ranks, stuck_after
        self.silent_after = min(SILENT_S, stuck_after)
        self.period = min(1.0, stuck_after / 5)
        self.place = (0, "first step", 0)  # step, phase, how often it has moved
        self.host, self.main_thread = socket.gethostname(), threading.main_thread().ident
        self.born = psutil.Process().create_time()
        self.seen: dict[int, _Seen] = {}
        self.nearby: dict[int, psutil.Process] = {}  # the other ranks of this machine
        self.dead_since: dict[int, float] = {}
        self.verdict: dict[str, Any] = {}
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def at(self, step: int, phase: str) -> None:
        """This rank begins a phase of a step (from 0)."""
        self.place = (step, phase, self.place[2] + 1)

    def __enter__(self) -> Self:
        if self.ranks.world_size > 1:
            self._join()
            self.thread = threading.Thread(target=self._talk, name="watchdog talk", daemon=True)
            self.thread.start()
            threading.Thread(target=self._judge, name="watchdog judge", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.thread is None:
            return
        if isinstance(error, RuntimeError) and _BROKEN.search(str(error)):
            # a peer has gone: let the verdict name it, before the launcher ends this rank
            self.over.wait(self.silent_after + 5 * self.period)
        self.over.set()
        self.thread.join(2 * self.period)  # it may wait for a store that is gone
        word: dict[str, Any] = {"left": True}
        if error is not None and not isinstance(error, SystemExit):
            word = {"ended": str(error) if isinstance(error, UserError) else type(error).__name__}
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._say(word)

    # -- the store ----------------------------------------------------------------------------

    def _join(self) -> None:
        self._connect()
        self._say({})
        dist.barrier()
        now = time.monotonic()
        self._words = [str(rank) for rank in range(self.ranks.world_size)]
        for rank, text in enumerate(self.store.multi_get(self._words)):
            self.seen[rank] = _Seen(json.loads(text), now, now)
        for rank, seen in self.seen.items():
            if rank != self.ranks.rank and (process := self._process(seen.said)):
                self.nearby[rank] = process

    def _connect(self) -> None:
        """A connection of our own: the default group's may be held by a main thread that waits."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=max(2.0, self.silent_after))
        store = dist.TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=patience
        )
        self.store = dist.PrefixStore("drama/watchdog", store)

    def _process(self, said: dict[str, Any]) -> psutil.Process | None:
        """The process of a rank where it can be seen; another container's has another pid here."""
        if said["host"] != self.host:
            return None
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(said["pid"])
            if abs(process.create_time() - said["born"]) < 2.0:
                return process
        return None

    def _say(self, more: dict[str, Any]) -> None:
        step, phase, count = self.place
        line, waits = _where(sys._current_frames().get(self.main_thread or 0))
        word = {
            "host": self.host, "pid": os.getpid(), "step": step, "phase": phase, "count": count,
            "line": line, "waits": waits, "beat": time.monotonic(), "born": self.born,
        }  # fmt: skip
        self.store.set(str(self.ranks.rank), json.dumps(word | more))

    def _talk(self) -> None:
        while not self.over.wait(self.period):
            try:
                self._say(self.verdict)
                self._read()
            except RuntimeError:  # nothing was heard; the connection may be what is broken
                with contextlib.suppress(RuntimeError):
                    self._connect()

    def _judge(self) -> None:
        """Apart from the talking, which a stopped main rank holds up."""
        last = time.monotonic()
        while not self.over.wait(self.period):
            now = time.monotonic()
            if now - last > 3 * self.period:  # this rank was stopped itself: hear the others first
                for seen in self.seen.values():
                    seen.heard_at = seen.moved_at = now
            last = now
            if (verdict := self._verdict()) and not self.over.is_set():
                self._end(*verdict)

    def _read(self) -> None:
        said = self.store.multi_get(self._words)
        now = time.monotonic()
        for seen, text in zip(self.seen.values(), said, strict=True):
            word = json.loads(text)
            if word["beat"] != seen.said["beat"]:
                seen.heard_at = now
            if word["count"] != seen.said["count"]:
                seen.moved_at = now
            seen.said = word

    # -- the verdict --------------------------------------------------------------------------

    def _verdict(self) -> tuple[int, str] | None:
        """The rank that is to blame, and how it is to blame."""
        now = time.monotonic()
        for seen in self.seen.values():
            if "verdict" in seen.said:
                rank, how = seen.said["verdict"]
                return rank, how
        for rank, seen in self.seen.items():
            # all ranks may be about to end with the same error
            if "ended" in seen.said and now - seen.heard_at > ENDED_S:
                return rank, f"ended with an error: {seen.said['ended']}"
        here = {rank: seen for rank, seen in self.seen.items() if not _gone(seen)}
        for rank, process in self.nearby.items():
            if rank not in here or not _is_dead(process):
                continue
            if now - self.dead_since.setdefault(rank, now) > ENDED_S:
                return rank, "has died"
        # where all are silent it is the lowest one: the main rank may carry the store of all words
        late = [
            rank for rank, seen in here.items()
            if rank != self.ranks.rank and now - seen.heard_at > self._patience(seen)
        ]  # fmt: skip
        if late:
            quiet = now - here[late[0]].heard_at
            return late[0], f"is silent for {quiet:.0f} s: stopped, or its machine is gone"
        if not here or any(now - s.moved_at <= self._allowed(s) for s in here.values()):
            return None
        if dead := self.dead_since.keys() & here.keys():
            return min(dead), "has died"
        rank = min(here, key=lambda rank: (_progress(here[rank].said), here[rank].said["waits"]))
        idle = now - here[rank].moved_at
        return rank, f"hangs: no progress for {idle:.0f} s"

    def _patience(self, seen: _Seen) -> float:
        """Seconds without a word: writing or compiling something large may hold Python's lock."""
        return self.stuck_after if seen.said["phase"] in LONG_PHASES else self.silent_after

    def _allowed(self, seen: _Seen) -> float:
        return self.stuck_after * (LONG if seen.said["phase"] in LONG_PHASES else 1)

    def _end(self, rank: int, how: str) -> None:
        said = self.seen[rank].said
        line = (
            f"rank {self.ranks.rank}: rank {rank} on {said['host']} (pid {said['pid']}) {how}; it "
            f"was last in step {said['step']}, {said['phase']}, at {said['line']}; all ranks end, "
            "the same command goes on from the last checkpoint"
        )
        sys.stdout.flush()
        print(f"\nwatchdog: {line}", file=sys.stderr, flush=True)
        self.verdict = {"verdict": [rank, how]}
        if rank in self.nearby and "ended" not in said:
            with contextlib.suppress(psutil.Error):
                self.nearby[rank].kill()
        time.sleep(2 * self.period)  # the others are to read it
        os._exit(1)


def _gone(seen: _Seen) -> bool:
    return "left" in seen.said or "ended" in seen.said


def _is_dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False  # nothing is known


def _progress(said: dict[str, Any]) -> tuple[int, int]:
    phase = said["phase"]
    return said["step"], PHASES.index(phase) if phase in PHASES else PHASES.index("step")


def _where(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of ours in a thread, and whether it waits for other ranks there."""
    waits, innermost = False, ""
    while frame is not None:
        path = frame.f_code.co_filename
        place = f"{os.sep.join(path.split(os.sep)[-2:])}:{frame.f_lineno}"
        waits |= path.endswith("distributed_c10d.py") or path == __file__  # for others, a verdict
        innermost = innermost or place
        if f"{os.sep}drama{os.sep}" in path:
            return place, waits
        frame = frame.f_back
    return innermost, waits
