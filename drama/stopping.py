"""A run that is told to end: it finishes its step, saves, and leaves with exit code 0.

SIGTERM comes from schedulers before they take a machine away, SIGINT from Ctrl-C. Launchers send
both, more than once, and kill what is still there after 30 s (deepspeed, torchrun) or what the
cluster grants.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

from drama.console import console
from drama.distributed import Ranks, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 5.0  # launchers repeat themselves; later than this it is a person without patience


class StopSignals:
    """Notes both signals while a run trains, in its main thread; a context manager."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._noted_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted_at is None:
            self._noted_at = now
        elif number == signal.SIGINT and now - self._noted_at > SAME_S:
            raise KeyboardInterrupt

    def asked(self) -> bool:
        """Whether any rank has had a signal; a collective."""
        return self.ranks.sum(float(self._noted_at is not None)) > 0


def leave(done: int, output: Path) -> NoReturn:
    """End a run whose step `done` is saved.

    Raises:
        Stopped: always.
    """
    console.print(
        f"stopped by a signal after step {done:,}, which is saved; the same command goes on from "
        f"there: {output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    raise Stopped(0)
