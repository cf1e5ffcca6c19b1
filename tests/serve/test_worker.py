"""One thread, a bounded queue, and patience with an end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from drama.serve.worker import BusyError, Stopping, Worker


def test_work_is_done_one_after_another_and_the_rest_is_turned_away() -> None:
    async def main() -> None:
        worker, gate, seen = Worker(max_waiting=2), threading.Event(), []

        def work(number: int) -> int:
            gate.wait(30)
            seen.append((number, threading.current_thread().name))
            return number

        tasks = [
            asyncio.create_task(worker.run(lambda _, n=n: work(n), 30))  # type: ignore[misc]
            for n in range(5)
        ]
        await asyncio.sleep(0)
        gate.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert done[:3] == [0, 1, 2]
        assert [type(error) for error in done[3:]] == [BusyError, BusyError]
        assert seen == [(n, "model_0") for n in range(3)]
        await asyncio.sleep(0)
        assert worker.pending == 0
        worker.close()

    asyncio.run(main())


def test_after_the_time_work_is_told_and_its_place_is_kept_until_it_ends() -> None:
    async def main() -> None:
        worker, told, gate = Worker(max_waiting=0), threading.Event(), threading.Event()

        def work(stopping: Stopping) -> None:
            while not stopping():
                pass
            told.set()
            gate.wait(30)

        with pytest.raises(TimeoutError):
            await worker.run(work, 0.01)
        assert await asyncio.to_thread(told.wait, 30)
        with pytest.raises(BusyError):
            await worker.run(lambda _: None, 30)
        gate.set()
        while worker.pending:
            await asyncio.sleep(0.001)
        assert await worker.run(lambda _: 7, 30) == 7
        worker.close()

    asyncio.run(main())


def test_what_waits_when_the_caller_leaves_is_never_begun() -> None:
    async def main() -> None:
        worker, gate, begun = Worker(max_waiting=3), threading.Event(), []
        first = asyncio.create_task(worker.run(lambda _: gate.wait(30), 30))
        second = asyncio.create_task(worker.run(lambda _: begun.append(2), 30))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        gate.set()
        await first
        worker.close()
        assert begun == []

    asyncio.run(main())
