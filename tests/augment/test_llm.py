"""The client against a real server that fails in every way: nothing lost, nothing paid twice."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from drama.augment.cache import Cache
from drama.augment.chat import Answer, Refusal, Request, estimate
from drama.augment.llm import LLM, IncompleteError
from drama.augment.patience import Limits
from drama.augment.testing import Call, ChatServer, completion
from drama.errors import UserError

QUICK: dict[str, Any] = {
    "concurrency": 4, "timeout_s": 20.0, "patience_s": 20.0, "first_pause_s": 0.001,
    "max_pause_s": 0.01,
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"query": {"type": "string"}}}


def ask_for(prompt: str, **values: Any) -> Request:
    return Request(({"role": "user", "content": prompt},), max_tokens=16, **values)


def prompts(count: int) -> list[str]:
    return [f"prompt {number}" for number in range(count)]


class Job:
    """Streams prompts through a client of its own and keeps all that the caller gets to see."""

    def __init__(self, server: str, cache: Path, **values: Any) -> None:
        limits = {name: values.pop(name) for name in list(values) if hasattr(Limits, name)}
        self.llm = LLM(server, "tiny", cache, limits=Limits(**(QUICK | limits)), **values)
        self.usage = self.llm.usage
        self.got: dict[str, Answer | Refusal] = {}
        self.error: Exception | None = None

    def run(self, texts: Iterable[str], **values: Any) -> Job:
        async def stream() -> None:
            async with self.llm:
                pairs = ((text, ask_for(text, **values)) for text in texts)
                async for text, outcome in self.llm.stream(pairs):
                    self.got[text] = outcome

        try:
            asyncio.run(stream())
        except UserError as error:
            self.error = error
        return self

    @property
    def texts(self) -> dict[str, str]:
        return {k: got.text for k, got in self.got.items() if isinstance(got, Answer)}


def echoes(texts: Iterable[str]) -> dict[str, str]:
    return {text: f"echo: {text}" for text in texts}


def wait_until(true: Callable[[], bool]) -> None:
    last = time.monotonic() + 60
    while not true():
        assert time.monotonic() < last
        time.sleep(0.005)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "answers.sqlite"


# -- what is sent, and what comes back ------------------------------------------------------------


def test_a_request_arrives_as_it_was_meant(cache: Path) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    with ChatServer() as server:
        job = Job(server.url + "/", cache, extra=extra)
        job.run(["Größe 大きさ 🐝"], temperature=0.7, top_p=0.9, seed=5, schema=SCHEMA)
    assert job.texts == {"Größe 大きさ 🐝": "echo: Größe 大きさ 🐝"}
    [sent] = server.calls
    assert sent == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Größe 大きさ 🐝"}],
        "max_tokens": 16,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
        },
        **extra,
    }
    usage = job.usage
    assert (usage.sent, usage.answered, usage.paid_tokens, usage.estimated) == (1, 1, 10, 0)


def test_the_second_time_nothing_is_sent(cache: Path) -> None:
    with ChatServer() as server:
        Job(server.url, cache).run(prompts(20))
    job = Job(server.url, cache).run(prompts(20))  # the server is gone
    assert job.error is None
    assert job.texts == echoes(prompts(20))
    assert all(isinstance(got, Answer) and got.cached for got in job.got.values())
    usage = job.usage
    assert (usage.sent, usage.cached, usage.paid_tokens) == (0, 20, 0)
    assert (usage.cached_prompt_tokens, usage.cached_completion_tokens) == (140, 60)


def test_tokens_are_estimated_and_marked_where_the_server_counts_none(cache: Path) -> None:
    with ChatServer(usage=False) as server:
        job = Job(server.url, cache).run(["prompt"])
    answer = job.got["prompt"]
    assert isinstance(answer, Answer)
    assert answer.estimated
    assert answer.completion_tokens == estimate("echo: prompt") == 3
    assert job.usage.estimated == 1
    again = Job(server.url, cache).run(["prompt"])
    assert again.usage.estimated == 1


def test_equal_requests_in_flight_are_paid_once(cache: Path) -> None:
    async def behave(call: Call) -> None:
        await asyncio.sleep(0.05)

    async def ask() -> list[Answer | Refusal]:
        async with LLM(server.url, "tiny", cache, limits=Limits(**QUICK)) as llm:
            return await asyncio.gather(*(llm.ask(ask_for("same")) for _ in range(8)))

    with ChatServer(behave) as server:
        answers = asyncio.run(ask())
    assert server.paid == {"same": 1}
    assert [a.text for a in answers if isinstance(a, Answer)] == ["echo: same"] * 8
    assert sum(isinstance(a, Answer) and not a.cached for a in answers) == 1


# -- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["stream", "ask"])
def test_64_are_in_flight_and_never_65(cache: Path, by: str) -> None:
    full: list[asyncio.Event] = []

    async def behave(call: Call) -> None:
        full.append(full[0] if full else asyncio.Event())
        if server.in_flight == 64:
            full[0].set()
        await full[0].wait()  # for ever, if 64 never come
        await asyncio.sleep(0.05)  # time for one too many

    async def ask_all(llm: LLM) -> None:
        async with llm:
            await asyncio.gather(*(llm.ask(ask_for(text)) for text in prompts(300)))

    with ChatServer(behave) as server:
        job = Job(server.url, cache, concurrency=64)
        if by == "stream":
            job.run(prompts(300))
        else:
            asyncio.run(ask_all(job.llm))
    assert job.usage.answered == 300
    assert server.most_in_flight == 64


def test_the_requests_are_read_as_places_get_free(cache: Path) -> None:
    drawn = 0

    def endless() -> Iterator[tuple[int, Request]]:
        nonlocal drawn
        for drawn in itertools.count(1):
            yield drawn, ask_for(f"prompt {drawn % 50}")

    async def some() -> int:
        taken = 0
        async with (
            LLM(server.url, "tiny", cache, limits=Limits(**QUICK)) as llm,
            aclosing(llm.stream(endless())) as answers,
        ):
            async for _ in answers:
                taken += 1
                assert drawn - taken <= 7  # four in flight and as many behind them
                if taken == 200:
                    break
        return taken

    with ChatServer() as server:
        assert asyncio.run(some()) == 200
    assert set(server.paid.values()) == {1}


def test_order_and_concurrency_change_nothing(cache: Path) -> None:
    async def behave(call: Call) -> None:
        await asyncio.sleep(random.random() / 200)

    texts = prompts(60)
    with ChatServer(behave) as server:
        first = Job(server.url, cache, concurrency=16).run(texts)
        assert list(first.got) != texts  # else nothing is shown here
        second = Job(server.url, cache, concurrency=1).run(reversed(texts))
    assert first.texts == second.texts == echoes(texts)
    assert second.usage.sent == 0


# -- faults that pass -----------------------------------------------------------------------------


async def cut(call: Call) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "10000"})
    await response.prepare(call.request)
    await response.write(b'{"choices": [{"mess')
    assert call.request.transport is not None
    call.request.transport.abort()
    return response


async def slow(call: Call) -> None:
    await asyncio.sleep(3)


def reply(status: int, text: str = "", **headers: str) -> Any:
    async def behave(call: Call) -> web.Response:
        return web.Response(status=status, text=text, headers=headers)

    return behave


FAULTS = {
    "rate limit": reply(429, "slow down", **{"Retry-After": "0.01"}),
    "rate limit without a time": reply(429),
    "fault": reply(500, "Internal Server Error"),
    "restarting": reply(503, **{"Retry-After": "0"}),
    "bad gateway": reply(502, "<html>502</html>"),
    "cut": cut,
    "HTML": reply(200, "<html><body>Login</body></html>"),
    "half JSON": reply(200, '{"choices": [{"message"'),
    "no choices": reply(200, '{"choices": []}'),
    "error with 200": reply(200, '{"error": {"message": "overloaded"}}'),
    "nothing": reply(200),
    "slow": slow,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_tried_again(cache: Path, fault: str) -> None:
    async def behave(call: Call) -> web.StreamResponse | None:
        return await FAULTS[fault](call) if call.nth <= 2 else None

    texts = prompts(4)
    timeout_s = 0.3 if fault == "slow" else 20.0
    with ChatServer(behave) as server:
        job = Job(server.url, cache, timeout_s=timeout_s, tries=50).run(texts)
    assert job.error is None
    assert job.texts == echoes(texts)
    assert job.usage.refused == 0
    assert job.usage.retried >= 8
    if fault != "slow":
        assert (job.usage.retried, job.usage.sent) == (8, 12)
        assert set(server.paid.values()) == {1}


def test_a_server_that_dies_and_comes_back_is_waited_for(cache: Path) -> None:
    back = threading.Timer(0.2, lambda: server.start())

    def texts() -> Iterator[str]:
        for number, text in enumerate(prompts(40)):
            if number == 10:
                server.stop()
                back.start()
            yield text

    with ChatServer() as server:
        job = Job(server.url, cache).run(texts())
        back.join()
    assert job.error is None
    assert job.texts == echoes(prompts(40))


# -- faults that stay -----------------------------------------------------------------------------


def test_a_server_that_stays_away_ends_the_job_and_nothing_is_lost(cache: Path) -> None:
    server = ChatServer()
    server.start()

    def texts() -> Iterator[str]:
        for number, text in enumerate(prompts(30)):
            if number == 16:
                server.stop()
            yield text

    job = Job(server.url, cache, patience_s=0.2).run(texts())
    assert type(job.error) is UserError
    message = str(job.error)
    assert server.url in message
    assert "has given no answer for" in message
    assert f"what was answered is in {cache}" in message
    assert len(job.texts) == job.usage.answered >= 12

    before = server.paid.copy()
    with server:
        rest = Job(server.url, cache).run(prompts(30))
    assert rest.texts == echoes(prompts(30))
    assert rest.usage.cached == len(job.texts)
    assert all(server.paid[text] == before[text] for text in job.texts)


def test_a_server_that_is_not_there_yet_is_waited_for(cache: Path) -> None:
    server = ChatServer()
    server.start()
    server.stop()
    starter = threading.Timer(0.2, server.start)
    starter.start()
    job = Job(server.url, cache).run(prompts(3))
    starter.join()
    server.stop()
    assert job.texts == echoes(prompts(3))


def test_a_wait_beyond_the_patience_is_not_begun(cache: Path) -> None:
    with ChatServer(reply(429, "quota", **{"Retry-After": "3600"})) as server:
        job = Job(server.url, cache, concurrency=1).run(prompts(3))
    assert "HTTP 429: quota" in str(job.error)
    assert "wants 3,600 s more" in str(job.error)
    assert len(server.calls) == 1


def test_a_refused_request_is_a_value_and_asked_again_another_time(cache: Path) -> None:
    async def behave(call: Call) -> web.Response | None:
        if call.prompt != "prompt 3":
            return None
        error = {"error": {"message": "maximum context length\nis 16", "code": 400}}
        return web.json_response(error, status=400)

    with ChatServer(behave) as server:
        job = Job(server.url, cache).run(prompts(10))
        assert job.error is None
        assert job.got["prompt 3"] == Refusal("HTTP 400", "maximum context length is 16")
        assert len(job.texts) == 9
        assert (job.usage.refused, job.usage.retried, server.seen["prompt 3"]) == (1, 0, 1)
        server.behave = None
        assert Job(server.url, cache).run(prompts(10)).texts == echoes(prompts(10))


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_request_that_always_fails_while_the_server_is_well_is_given_up(
    cache: Path, concurrency: int
) -> None:
    async def behave(call: Call) -> web.Response | None:
        return web.Response(status=500, text="boom") if call.prompt == "prompt 3" else None

    with ChatServer(behave) as server:
        job = Job(server.url, cache, concurrency=concurrency, tries=3).run(prompts(10))
    assert job.error is None
    assert job.got["prompt 3"] == Refusal("HTTP 500", "boom")
    assert len(job.texts) == 9
    assert server.seen["prompt 3"] == 3


def test_a_request_that_fails_for_long_is_not_the_server_s_silence(cache: Path) -> None:
    async def behave(call: Call) -> web.Response:
        await asyncio.sleep(0.1)
        return web.Response(status=500)

    with ChatServer(behave) as server:
        job = Job(server.url, cache, patience_s=0.15, tries=5).run(["prompt"])
    assert job.error is None
    assert job.got == {"prompt": Refusal("HTTP 500")}


def test_a_request_that_never_ends_is_given_up(cache: Path) -> None:
    with ChatServer(slow) as server:
        job = Job(server.url, cache, timeout_s=0.05, tries=2).run(["prompt"])
    assert job.got == {"prompt": Refusal("no answer within 0.05 s")}


def test_the_end_of_a_job_wakes_those_that_wait(cache: Path) -> None:
    async def behave(call: Call) -> web.Response:
        while server.seen.total() < 4:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.2 if call.prompt == "prompt 0" else 0.0)
        return web.Response(status=401 if call.prompt == "prompt 0" else 503)

    hours = {"patience_s": 1e5, "first_pause_s": 1e4, "max_pause_s": 1e4}
    with ChatServer(behave) as server:
        job = Job(server.url, cache, **hours).run(prompts(4))
    assert "HTTP 401" in str(job.error)


def test_a_server_that_fails_every_request_ends_the_job(cache: Path) -> None:
    with ChatServer(reply(500, "no engine")) as server:
        job = Job(server.url, cache, tries=2).run(prompts(100))
    assert "16 requests in a row failed 2 times each (HTTP 500: no engine)" in str(job.error)
    assert len(server.seen) < 30


@pytest.mark.parametrize("status", [401, 402, 403, 404, 307])
def test_what_no_request_gets_past_ends_the_job_at_once(
    cache: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ChatServer() as other:
        elsewhere = {"Location": f"{other.url}/chat/completions"}
        with ChatServer(reply(status, '{"detail": "go away"}', **elsewhere)) as server:
            job = Job(server.url, cache).run(prompts(50))
    assert not other.calls
    assert f"{server.url}: HTTP {status}: go away" in str(job.error)
    assert {401: "OPENAI_API_KEY", 402: "OPENAI_API_KEY", 307: "address"}.get(
        status, "the model's name there, 'tiny'"
    ) in str(job.error)
    assert len(server.calls) <= 4


# -- a schema -------------------------------------------------------------------------------------


def test_a_server_without_schemas_is_asked_without(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def behave(call: Call) -> web.Response | None:
        known = "response_format" not in call.body
        return None if known else web.json_response({"detail": "Unexpected fields"}, status=422)

    with ChatServer(behave) as server:
        job = Job(server.url, cache).run(prompts(40), schema=SCHEMA)
    assert job.texts == echoes(prompts(40))
    assert job.usage.refused == 0
    assert sum("response_format" in call for call in server.calls) <= 4
    said = capsys.readouterr().err
    assert said.count("does not take the JSON schema (HTTP 422: Unexpected fields)") == 1


def test_a_bad_request_does_not_cost_the_schema(cache: Path) -> None:
    async def behave(call: Call) -> web.Response | None:
        return web.Response(status=400, text="too long") if call.prompt == "prompt 0" else None

    with ChatServer(behave) as server:
        job = Job(server.url, cache).run(prompts(20), schema=SCHEMA)
    assert job.got["prompt 0"] == Refusal("HTTP 400", "too long")
    without = [call for call in server.calls if "response_format" not in call]
    assert [call["messages"][0]["content"] for call in without] == ["prompt 0"]


# -- the budget -----------------------------------------------------------------------------------


def test_a_spent_budget_ends_the_job_cleanly_and_it_goes_on(cache: Path) -> None:
    texts, drawn = prompts(60), []

    def counted() -> Iterator[str]:
        for text in texts:
            drawn.append(text)
            yield text

    with ChatServer() as server:
        job = Job(server.url, cache, max_tokens_total=100).run(counted())
        assert len(drawn) <= 13 + 8  # answered and in hand; the rest is not even read
        assert isinstance(job.error, IncompleteError)
        assert "the budget of 100 tokens is spent" in str(job.error)
        assert str(cache) in str(job.error)
        assert 10 <= len(job.texts) <= 13
        assert job.usage.paid_tokens == 10 * len(job.texts)
        assert server.paid.keys() == job.texts.keys()  # what was on its way is kept
        assert job.usage.unanswered > 0

        only_cached = Job(server.url, cache, max_tokens_total=0).run(texts)
        assert isinstance(only_cached.error, IncompleteError)
        assert only_cached.usage.sent == 0

        rest = Job(server.url, cache).run(texts)
    assert rest.error is None
    assert rest.texts == echoes(texts)
    assert rest.usage.cached == len(job.texts)
    assert server.paid == dict.fromkeys(texts, 1)


# -- ends of all kinds ----------------------------------------------------------------------------

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
        job = Job(server.url, cache).run(prompts(40))
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
        job = Job(server.url, cache).run(texts())
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
        job = Job(server.url, cache).run(prompts(40))
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
        job = Job(server.url, cache).run(prompts(4))
    assert job.usage.cached == 4
    assert server.paid == dict.fromkeys(prompts(4), 1)


# -- the key --------------------------------------------------------------------------------------


def test_the_key_goes_to_the_server_and_nowhere_else(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("THE_KEY", f" {secret}\n")

    async def behave(call: Call) -> web.Response | None:
        if call.prompt == "prompt 1":  # the cut of a long text must not leave half of a key
            return web.Response(status=400, text="x" * 280 + f" Bearer {secret} is bad")
        if call.prompt == "prompt 2":
            return web.Response(status=401, text=f"Incorrect API key: {secret}")
        return None

    with ChatServer(behave) as server:
        job = Job(server.url, cache, api_key_env="THE_KEY", concurrency=1).run(prompts(5))
        offline = Job(server.url, cache, api_key_env="THE_KEY", batch=tmp_path / "batch.jsonl").run(
            prompts(5)
        )
    assert set(server.keys) == {f"Bearer {secret}"}
    assert "THE_KEY" in str(job.error)
    assert "Incorrect API key: ***" in str(job.error)
    assert isinstance(offline.error, IncompleteError)
    said = "".join(capfd.readouterr()) + repr(job.got) + str(job.error) + str(offline.error)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) >= 2
    for place in (said.encode(), written):
        assert b"secret" not in place
        assert b"sk-very" not in place


def test_without_a_key_no_header_is_sent(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ChatServer() as server:
        Job(server.url, cache).run(["prompt"])
    assert server.keys == [None]


# -- refusals of ours -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base_url": "localhost:8000"}, "'localhost:8000' is no address of an LLM"),
        ({"base_url": "http://me:pw@host/v1"}, "name or a password"),
        ({"extra": {"stream": True}}, "stream cannot be set as an extra field"),
        ({"api_key_env": "BROKEN_KEY"}, "BROKEN_KEY holds characters that no key has"),
        ({"limits": {"concurrency": 0}}, "concurrency must be above 0 (got 0)"),
        ({"limits": {"max_tokens_total": -1}}, "max_tokens_total must not be negative (got -1)"),
    ],
)
def test_bad_settings_are_named(
    cache: Path, values: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN_KEY", "top\nsecret")
    settings = {"base_url": "http://localhost:1/v1", "model": "tiny", "cache": cache} | values
    with pytest.raises(UserError) as caught:
        LLM(**settings | ({"limits": Limits(**values["limits"])} if "limits" in values else {}))
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "pw@" not in str(caught.value)
    assert not cache.exists()


def test_an_answer_without_content_is_empty_and_kept(cache: Path) -> None:
    async def behave(call: Call) -> web.Response:
        return web.json_response(completion(None))

    with ChatServer(behave) as server:
        job = Job(server.url, cache).run(["prompt"])
        again = Job(server.url, cache).run(["prompt"])
    assert job.texts == again.texts == {"prompt": ""}
    assert len(server.calls) == 1


def test_half_a_surrogate_pair_in_an_answer_is_replaced(cache: Path) -> None:
    async def behave(call: Call) -> web.Response:
        return web.json_response(completion("a \ud83d b"))

    with ChatServer(behave) as server:
        assert Job(server.url, cache).run(["prompt"]).texts == {"prompt": "a ? b"}
        assert Job(server.url, cache).run(["prompt"]).texts == {"prompt": "a ? b"}
