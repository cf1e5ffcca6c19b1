"""Many talks with a language model at once, their results in the order of what was asked about.

The model's event loop and the reading of the rows have a thread each, so neither waits for what is
done with the results. At most `ahead` rows are between reading and taking: one slow answer holds up
the others no longer than that, and the memory stays flat.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

from drama.augment.asking import Talk
from drama.augment.job import Dropped, Kept, Step
from drama.augment.llm import LLM, IncompleteError

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 8  # rows for each request that may be in flight


@dataclass(frozen=True, slots=True)
class Done(Generic[R]):
    """What came of one row, and what its talk counted."""

    value: R
    counts: Counter[str]


class InOrder(Generic[T, R]):
    """A context manager that gives an iterator over the results, in the order of the rows.

        with InOrder(llm, rows, work) as results:
            for done in results: ...

    rows: read in a thread of their own, as there is room. work: what is asked for a row, in any
    number of calls. ahead: see above; by default 8 rows for each request in flight.

    Raises (while iterating, after the results of all rows before the first one without):
        IncompleteError: the budget is spent, or some requests await a batch run; then those of all
            rows are in the batch file.
        Exception: what `rows` or `work` raised.
    """

    def __init__(
        self,
        llm: LLM,
        rows: Iterable[T],
        work: Callable[[T, Talk], Awaitable[R]],
        ahead: int | None = None,
    ) -> None:
        self._llm, self._work = llm, work
        self._rows = iter(rows)
        self._room = threading.Semaphore(ahead or AHEAD * llm.limits.concurrency)
        self._stopped = threading.Event()  # no further row is read
        self._started = threading.Event()
        self._arrived: SimpleQueue[Done[R] | BaseException | None] = SimpleQueue()
        self._talks: set[asyncio.Task[Done[R]]] = set()
        self._reader = ThreadPoolExecutor(1, "drama-rows")
        self._thread = threading.Thread(target=self._main, name="drama-llm", daemon=True)

    def __enter__(self) -> Iterator[Done[R]]:
        self._thread.start()
        self._started.wait()
        return self._results()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._room.release()
        if kind is not None and not issubclass(kind, Exception):  # Ctrl-C does not wait
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
        self._reader.shutdown()

    def _results(self) -> Iterator[Done[R]]:
        while (done := self._arrived.get()) is not None:
            if isinstance(done, BaseException):
                raise done
            self._room.release()
            yield done

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:  # it is raised where the results are taken
            self._arrived.put(error)
        else:
            self._arrived.put(None)
        finally:
            self._started.set()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._started.set()
        order: asyncio.Queue[asyncio.Future[Done[R]] | None] = asyncio.Queue()
        async with self._llm:
            feeding = asyncio.create_task(self._feed(order))
            try:
                await self._drain(order)
            finally:  # of Ctrl-C: nobody is left who would ask the client that closes
                left = [feeding, *self._talks]
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)

    async def _feed(self, order: asyncio.Queue[asyncio.Future[Done[R]] | None]) -> None:
        try:
            while row := await self._loop.run_in_executor(self._reader, self._next):
                talk = asyncio.create_task(self._one(row[0]))
                self._talks.add(talk)
                talk.add_done_callback(self._talks.discard)
                order.put_nowait(talk)
        except Exception as error:  # of the rows: the results before it come first
            fault: asyncio.Future[Done[R]] = self._loop.create_future()
            fault.set_exception(error)
            order.put_nowait(fault)
        order.put_nowait(None)

    def _next(self) -> tuple[T] | None:
        """The next row, once there is room for it; in a tuple, for a row may be anything."""
        self._room.acquire()
        if self._stopped.is_set():
            return None
        for row in self._rows:
            return (row,)
        return None

    async def _one(self, row: T) -> Done[R]:
        talk = Talk(self._llm)
        return Done(await self._work(row, talk), talk.counts)

    async def _drain(self, order: asyncio.Queue[asyncio.Future[Done[R]] | None]) -> None:
        fault: Exception | None = None
        while (task := await order.get()) is not None:
            try:
                done = await task
            except Exception as error:
                if fault is None or isinstance(fault, IncompleteError):
                    fault = error
                if not (self._llm.is_offline and isinstance(error, IncompleteError)):
                    self._stopped.set()
            else:
                if fault is None:
                    self._arrived.put(done)
                    continue
            self._room.release()
        if fault is not None:
            raise self._llm.incomplete() if isinstance(fault, IncompleteError) else fault


def steps(results: Iterator[Done[Kept | Dropped]], size: int, start: int) -> Iterator[Step]:
    """The steps of a job that goes on after `start`, of `size` rows each but for the last."""
    while batch := list(islice(results, size)):
        start += len(batch)
        yield Step(start, [done.value for done in batch], counted(batch))


def counted(batch: Sequence[Done[Any]]) -> Counter[str]:
    """What the talks of a step counted."""
    return sum((done.counts for done in batch), Counter())
