"""A rank that dies or hangs ends all ranks, with a line that names it.

Every rank says where it stands (step, phase, line of code) in a small store of its own on the main
rank, once a second, from a thread; every rank reads what the others say.

    silent   a rank says nothing for `SILENT_S` seconds: killed, stopped, its machine gone
    ended    a rank has left with an error, and the others wait for it
    stuck    no rank comes on for `stuck_after` seconds (times `LONG` where its phase may be long:
             first step, evaluation, checkpoint); named is the rank that is furthest behind and does
             not wait for others

Then each rank that is left kills the named one if it is on its machine, prints the line, and ends
with exit code 1. Only what is left of the main rank's last word is known when it is the silent one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist

from drama.distributed import Ranks
from drama.errors import UserError

SILENT_S = 20.0  # launchers wait 30 s after a rank's death before they kill the others
LONG = 20
ENDED_S = 3.0  # between an error of a rank and the end of those that it left waiting
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
        self.seen: dict[int, _Seen] = {}
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
        self.thread.join(self.silent_after)
        if error is not None and not isinstance(error, SystemExit):
            what = str(error) if isinstance(error, UserError) else type(error).__name__
            self._say({"ended": what})
        else:
            self._say({"left": True})

    # -- the store ----------------------------------------------------------------------------

    def _join(self) -> None:
        """Open the store: the default group's is the main thread's."""
        options: dict[str, Any] = {
            "wait_for_workers": False, "timeout": timedelta(seconds=max(2.0, self.silent_after)),
        }  # fmt: skip
        address, port = os.environ["MASTER_ADDR"], [0]
        if self.ranks.is_main:
            self.store = dist.TCPStore(address, 0, is_master=True, **options)
            port = [self.store.port]
        dist.broadcast_object_list(port, src=0)
        if not self.ranks.is_main:
            self.store = dist.TCPStore(address, port[0], is_master=False, **options)
        self._say({})
        dist.barrier()
        now = time.monotonic()
        self.seen = {
            rank: _Seen(json.loads(self.store.get(str(rank))), now, now)
            for rank in range(self.ranks.world_size)
        }

    def _say(self, more: dict[str, Any]) -> None:
        step, phase, count = self.place
        line, waits = _where(sys._current_frames().get(self.main_thread or 0))
        word = {
            "host": self.host, "pid": os.getpid(), "step": step, "phase": phase, "count": count,
            "line": line, "waits": waits, "beat": time.monotonic(),
        }  # fmt: skip
        try:
            self.store.set(str(self.ranks.rank), json.dumps(word | more))
        except RuntimeError:
            return  # the main rank is silent: that is found out by reading

    def _talk(self) -> None:
        while not self.over.wait(self.period):
            self._say({})
            self._read()

    def _judge(self) -> None:
        """Apart from the talking, which a stopped main rank holds up for ever."""
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
        try:
            said = self.store.multi_get([str(rank) for rank in self.seen])
        except RuntimeError:
            return  # nothing was heard
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
        for rank, seen in self.seen.items():
            # all ranks may be about to end with the same error
            if "ended" in seen.said and now - seen.heard_at > ENDED_S:
                return rank, f"ended with an error: {seen.said['ended']}"
        here = {rank: seen for rank, seen in self.seen.items() if not _gone(seen)}
        # where all are silent it is the lowest one, the main rank, whose store carries their words
        late = [
            rank for rank, seen in here.items()
            if rank != self.ranks.rank and now - seen.heard_at > self._patience(seen)
        ]  # fmt: skip
        if late:
            quiet = now - here[late[0]].heard_at
            return late[0], f"has died or is stopped: silent for {quiet:.0f} s"
        if not here or any(now - s.moved_at <= self._allowed(s) for s in here.values()):
            return None
        rank = min(here, key=lambda rank: (_progress(here[rank].said), here[rank].said["waits"]))
        idle = now - here[rank].moved_at
        return rank, f"hangs: no progress for {idle:.0f} s"

    def _patience(self, seen: _Seen) -> float:
        """Seconds without a word: writing a large file may hold Python's lock."""
        return self.stuck_after if seen.said["phase"] == "save" else self.silent_after

    def _allowed(self, seen: _Seen) -> float:
        return self.stuck_after * (LONG if seen.said["phase"] in LONG_PHASES else 1)

    def _end(self, rank: int, how: str) -> None:
        said = self.seen[rank].said
        line = (
            f"rank {self.ranks.rank}: rank {rank} on {said['host']} (pid {said['pid']}) {how}; it "
            f"was in step {said['step']}, {said['phase']}, at {said['line']}; all ranks end, the "
            "same command goes on from the last checkpoint"
        )
        sys.stdout.flush()
        print(f"\nwatchdog: {line}", file=sys.stderr, flush=True)
        if said["host"] == self.host and rank != self.ranks.rank and "ended" not in said:
            with contextlib.suppress(ProcessLookupError):
                os.kill(said["pid"], signal.SIGKILL)
        elif rank == self.ranks.rank:
            time.sleep(2 * self.period)  # the others are to read what it said
        if self.ranks.is_main:
            time.sleep(2 * self.period)  # and its store goes with the main rank
        os._exit(1)


def _gone(seen: _Seen) -> bool:
    return "left" in seen.said or "ended" in seen.said


def _progress(said: dict[str, Any]) -> tuple[int, int]:
    phase = said["phase"]
    return said["step"], PHASES.index(phase) if phase in PHASES else PHASES.index("step")


def _where(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of ours in a thread, and whether it waits for other ranks there."""
    waits, innermost = False, ""
    while frame is not None:
        path = frame.f_code.co_filename
        place = f"{os.sep.join(path.split(os.sep)[-2:])}:{frame.f_lineno}"
        waits |= path.endswith("distributed_c10d.py")
        innermost = innermost or place
        if f"{os.sep}drama{os.sep}" in path:
            return place, waits
        frame = frame.f_back
    return innermost, waits
