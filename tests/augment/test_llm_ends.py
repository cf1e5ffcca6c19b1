"""A job of the client that ends early, in every way: nothing lost, nothing paid twice."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drama.augment.cache import Cache
from drama.augment.llm import LLM, IncompleteError
from drama.augment.patience import Limits
from drama.augment.testing import (
    QUICK,
    Call,
    Caller,
    ChatServer,
    ask_for,
    echoes,
    prompts,
    wait_until,
)
from drama.errors import UserError

# -- the budget ------------------------------------------------------------------------------------


def test_a_spent_budget_ends_the_job_cleanly_and_it_goes_on(cache: Path) -> None:
    texts, drawn = prompts(60), []

    def counted() -> Iterator[str]:
        for text in texts:
            drawn.append(text)
            yield text

    with ChatServer() as server:
        job = Caller(server.url, cache, max_tokens_total=100).run(counted())
        assert len(drawn) <= 13 + 8  # answered and in hand; the rest is not even read
        assert isinstance(job.error, IncompleteError)
        assert "the budget of 100 tokens is spent" in str(job.error)
        assert str(cache) in str(job.error)
        assert 10 <= len(job.texts) <= 13
        assert job.usage.paid_tokens == 10 * len(job.texts)
        assert server.paid.keys() == job.texts.keys()  # what was on its way is kept
        assert job.usage.unanswered > 0

        only_cached = Caller(server.url, cache, max_tokens_total=0).run(texts)
        assert isinstance(only_cached.error, IncompleteError)
        assert only_cached.usage.sent == 0

        rest = Caller(server.url, cache).run(texts)
    assert rest.error is None
    assert rest.texts == echoes(texts)
    assert rest.usage.cached == len(job.texts)
    assert server.paid == dict.fromkeys(texts, 1)


# -- ends of all kinds -----------------------------------------------------------------------------


KILLED = """
import asyncio, sys
from drama.augment.llm import LLM, Request
from drama.augment.patience import Limits

async def main(url, cache):
    async with LLM(url, "tiny", cache, limits=Limits(concurrency=4)) as llm:
        texts = [f"prompt {number}" for number in range(40)]
        pairs = ((t, Request(({"role": "user", "content": t},), 16)) for t in texts)
        async for text, answer in llm.stream(pairs):
            print(text, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_killed_job_loses_nothing_and_pays_nothing_twice(cache: Path) -> None:
    held: list[asyncio.Event] = []

    async def behave(call: Call) -> None:
        if len(server.calls) > 17 and not held:
            held.append(asyncio.Event())
        if held:  # from here on nobody gets an answer, until the job is dead
            await held[0].wait()

    with ChatServer(behave) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, server.url, str(cache)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        done = [child.stdout.readline().strip() for _ in range(17)]
        wait_until(lambda: len(server.calls) == 21)  # four more are on their way
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(set(done)) == 17
        assert server.paid == dict.fromkeys(done, 1)

        server.behave = None
        before = len(server.calls)
        job = Caller(server.url, cache).run(prompts(40))
        assert job.texts == echoes(prompts(40))
        assert job.usage.cached == 17
        assert len(server.calls) - before == 23
    assert server.paid == dict.fromkeys(prompts(40), 1)


def test_an_error_of_the_caller_s_requests_comes_after_what_is_paid(cache: Path) -> None:
    def texts() -> Iterator[str]:
        yield from prompts(3)
        raise UserError("rows.jsonl:4: no text")

    async def behave(call: Call) -> None:
        await asyncio.sleep(0.05)

    with ChatServer(behave) as server:
        job = Caller(server.url, cache).run(texts())
    assert str(job.error) == "rows.jsonl:4: no text"
    assert job.texts == echoes(prompts(3))


def test_an_error_of_the_caller_does_not_lose_what_is_on_its_way(cache: Path) -> None:
    async def fail() -> None:
        async with LLM(server.url, "tiny", cache, limits=Limits(**QUICK)) as llm:
            async for _ in llm.stream((text, ask_for(text)) for text in prompts(40)):
                raise ZeroDivisionError

    async def behave(call: Call) -> None:
        while call.prompt == "prompt 0" and server.in_flight < 4:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.0 if call.prompt == "prompt 0" else 0.1)

    with ChatServer(behave) as server:
        with pytest.raises(ZeroDivisionError):
            asyncio.run(fail())
        paid = set(server.paid)
        assert paid == set(prompts(5))  # the place of the answered one was free, and taken
        server.behave = None
        job = Caller(server.url, cache).run(prompts(40))
    assert job.usage.cached == len(paid)
    assert server.paid == dict.fromkeys(prompts(40), 1)


def test_an_interrupted_job_ends_without_waiting_for_the_server(cache: Path) -> None:
    arrived = threading.Event()

    async def behave(call: Call) -> None:
        arrived.set()
        await asyncio.sleep(3600)

    async def interrupted() -> None:
        async def job() -> None:
            limits = Limits(**QUICK | {"timeout_s": 3600.0})
            async with LLM(server.url, "tiny", cache, limits=limits) as llm:
                await llm.ask(ask_for("prompt"))

        task = asyncio.create_task(job())
        await asyncio.to_thread(arrived.wait)
        task.cancel()
        await task

    with ChatServer(behave) as server, pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())


def test_an_interrupted_job_keeps_the_answers_that_had_arrived(cache: Path) -> None:
    Cache(cache).close()
    holder = sqlite3.connect(cache, isolation_level=None, check_same_thread=False)

    async def interrupted() -> None:
        llm = LLM(server.url, "tiny", cache, limits=Limits(**QUICK))

        async def job() -> None:
            async with llm:
                await asyncio.gather(*(llm.ask(ask_for(text)) for text in prompts(4)))

        task = asyncio.create_task(job())
        while server.seen.total() < 4:
            await asyncio.sleep(0.005)
        holder.execute("BEGIN IMMEDIATE")  # nothing can be written now
        ready.set()
        while llm.usage.answered < 4:
            await asyncio.sleep(0.005)
        task.cancel()
        release = threading.Timer(0.1, holder.rollback)
        release.start()
        await task

    ready = threading.Event()

    async def behave(call: Call) -> None:
        while not ready.is_set():
            await asyncio.sleep(0.005)

    with ChatServer(behave) as server:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(interrupted())
        job = Caller(server.url, cache).run(prompts(4))
    assert job.usage.cached == 4
    assert server.paid == dict.fromkeys(prompts(4), 1)
