"""One thread in which the model runs, and a bounded number of requests that wait for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Stopping = Callable[[], bool]  # whether nobody waits for the result any more


class BusyError(Exception):
    """As many requests wait as may; the one at hand does not begin to."""


class GivenUpError(Exception):
    """A piece of work has ended early, since nobody waits for it."""


class Worker:
    """Runs functions one after another in a thread of its own.

    pending: how many are running or waiting.
    """

    def __init__(self, max_waiting: int) -> None:
        self.pending, self._most = 0, max_waiting + 1
        self._thread = ThreadPoolExecutor(1, "model")
        self._over = threading.Event()

    async def run(self, work: Callable[[Stopping], T], timeout_s: float) -> T:
        """The result of `work(stopping)`, which asks `stopping()` between its steps.

        Where the time is over or the caller is cancelled, work that waits is never begun, and work
        that runs hears of it at its next step.

        Raises:
            BusyError: too many wait already.
            TimeoutError: no result in time.
        """
        if self.pending >= self._most:
            raise BusyError
        gone = threading.Event()
        loop = asyncio.get_running_loop()
        future = self._thread.submit(work, lambda: gone.is_set() or self._over.is_set())
        self.pending += 1
        # the place is free when the thread is, not when the caller has lost patience
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
        finally:
            gone.set()
            future.cancel()  # what has not begun never does

    def close(self) -> None:
        """Begin nothing more, and tell what runs to end."""
        self._over.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _free(self) -> None:
        self.pending -= 1
