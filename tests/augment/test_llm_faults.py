"""The client and a real server that fails: what passes is waited for, what stays is said."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from drama.augment.chat import Refusal
from drama.augment.testing import Call, Caller, ChatServer, echoes, prompts
from drama.errors import UserError

SCHEMA = {"type": "object", "properties": {"query": {"type": "string"}}}

# -- faults that pass ------------------------------------------------------------------------------


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
        job = Caller(server.url, cache, timeout_s=timeout_s, tries=50).run(texts)
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
        job = Caller(server.url, cache).run(texts())
        back.join()
    assert job.error is None
    assert job.texts == echoes(prompts(40))


# -- faults that stay ------------------------------------------------------------------------------


def test_a_server_that_stays_away_ends_the_job_and_nothing_is_lost(cache: Path) -> None:
    server = ChatServer()
    server.start()

    def texts() -> Iterator[str]:
        for number, text in enumerate(prompts(30)):
            if number == 16:
                server.stop()
            yield text

    job = Caller(server.url, cache, patience_s=0.2).run(texts())
    assert type(job.error) is UserError
    message = str(job.error)
    assert server.url in message
    assert "has given no answer for" in message
    assert f"what was answered is in {cache}" in message
    assert len(job.texts) == job.usage.answered >= 12

    before = server.paid.copy()
    with server:
        rest = Caller(server.url, cache).run(prompts(30))
    assert rest.texts == echoes(prompts(30))
    assert rest.usage.cached == len(job.texts)
    assert all(server.paid[text] == before[text] for text in job.texts)


def test_a_server_that_is_not_there_yet_is_waited_for(cache: Path) -> None:
    server = ChatServer()
    server.start()
    server.stop()
    starter = threading.Timer(0.2, server.start)
    starter.start()
    job = Caller(server.url, cache).run(prompts(3))
    starter.join()
    server.stop()
    assert job.texts == echoes(prompts(3))


def test_a_wait_beyond_the_patience_is_not_begun(cache: Path) -> None:
    with ChatServer(reply(429, "quota", **{"Retry-After": "3600"})) as server:
        job = Caller(server.url, cache, concurrency=1).run(prompts(3))
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
        job = Caller(server.url, cache).run(prompts(10))
        assert job.error is None
        assert job.got["prompt 3"] == Refusal("HTTP 400", "maximum context length is 16")
        assert len(job.texts) == 9
        assert (job.usage.refused, job.usage.retried, server.seen["prompt 3"]) == (1, 0, 1)
        server.behave = None
        assert Caller(server.url, cache).run(prompts(10)).texts == echoes(prompts(10))


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_request_that_always_fails_while_the_server_is_well_is_given_up(
    cache: Path, concurrency: int
) -> None:
    async def behave(call: Call) -> web.Response | None:
        return web.Response(status=500, text="boom") if call.prompt == "prompt 3" else None

    with ChatServer(behave) as server:
        job = Caller(server.url, cache, concurrency=concurrency, tries=3).run(prompts(10))
    assert job.error is None
    assert job.got["prompt 3"] == Refusal("HTTP 500", "boom")
    assert len(job.texts) == 9
    assert server.seen["prompt 3"] == 3


def test_a_request_that_fails_for_long_is_not_the_server_s_silence(cache: Path) -> None:
    async def behave(call: Call) -> web.Response:
        await asyncio.sleep(0.1)
        return web.Response(status=500)

    with ChatServer(behave) as server:
        job = Caller(server.url, cache, patience_s=0.15, tries=5).run(["prompt"])
    assert job.error is None
    assert job.got == {"prompt": Refusal("HTTP 500")}


def test_a_request_that_never_ends_is_given_up(cache: Path) -> None:
    with ChatServer(slow) as server:
        job = Caller(server.url, cache, timeout_s=0.05, tries=2).run(["prompt"])
    assert job.got == {"prompt": Refusal("no answer within 0.05 s")}


def test_the_end_of_a_job_wakes_those_that_wait(cache: Path) -> None:
    async def behave(call: Call) -> web.Response:
        while server.seen.total() < 4:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.2 if call.prompt == "prompt 0" else 0.0)
        return web.Response(status=401 if call.prompt == "prompt 0" else 503)

    hours = {"patience_s": 1e5, "first_pause_s": 1e4, "max_pause_s": 1e4}
    with ChatServer(behave) as server:
        job = Caller(server.url, cache, **hours).run(prompts(4))
    assert "HTTP 401" in str(job.error)


def test_a_server_that_fails_every_request_ends_the_job(cache: Path) -> None:
    with ChatServer(reply(500, "no engine")) as server:
        job = Caller(server.url, cache, tries=2).run(prompts(100))
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
            job = Caller(server.url, cache).run(prompts(50))
    assert not other.calls
    assert f"{server.url}: HTTP {status}: go away" in str(job.error)
    assert {401: "OPENAI_API_KEY", 402: "OPENAI_API_KEY", 307: "address"}.get(
        status, "the model's name there, 'tiny'"
    ) in str(job.error)
    assert len(server.calls) <= 4


# -- a schema --------------------------------------------------------------------------------------


def test_a_server_without_schemas_is_asked_without(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def behave(call: Call) -> web.Response | None:
        known = "response_format" not in call.body
        return None if known else web.json_response({"detail": "Unexpected fields"}, status=422)

    with ChatServer(behave) as server:
        job = Caller(server.url, cache).run(prompts(40), schema=SCHEMA)
    assert job.texts == echoes(prompts(40))
    assert job.usage.refused == 0
    assert sum("response_format" in call for call in server.calls) <= 4
    said = capsys.readouterr().err
    assert said.count("does not take the JSON schema (HTTP 422: Unexpected fields)") == 1


def test_a_bad_request_does_not_cost_the_schema(cache: Path) -> None:
    async def behave(call: Call) -> web.Response | None:
        return web.Response(status=400, text="too long") if call.prompt == "prompt 0" else None

    with ChatServer(behave) as server:
        job = Caller(server.url, cache).run(prompts(20), schema=SCHEMA)
    assert job.got["prompt 0"] == Refusal("HTTP 400", "too long")
    without = [call for call in server.calls if "response_format" not in call]
    assert [call["messages"][0]["content"] for call in without] == ["prompt 0"]
