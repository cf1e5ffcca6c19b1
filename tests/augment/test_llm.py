"""The client and a real server: what is sent, what comes back, how much at once."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from drama.augment.chat import Answer, Refusal, Request, estimate
from drama.augment.llm import LLM, IncompleteError
from drama.augment.patience import Limits
from drama.augment.testing import (
    QUICK,
    Call,
    Caller,
    ChatServer,
    ask_for,
    completion,
    echoes,
    prompts,
)
from drama.errors import UserError

SCHEMA = {"type": "object", "properties": {"query": {"type": "string"}}}

# -- what is sent, and what comes back -------------------------------------------------------------


def test_a_request_arrives_as_it_was_meant(cache: Path) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    with ChatServer() as server:
        job = Caller(server.url + "/", cache, extra=extra)
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
        Caller(server.url, cache).run(prompts(20))
    job = Caller(server.url, cache).run(prompts(20))  # the server is gone
    assert job.error is None
    assert job.texts == echoes(prompts(20))
    assert all(isinstance(got, Answer) and got.cached for got in job.got.values())
    usage = job.usage
    assert (usage.sent, usage.cached, usage.paid_tokens) == (0, 20, 0)
    assert (usage.cached_prompt_tokens, usage.cached_completion_tokens) == (140, 60)


def test_tokens_are_estimated_and_marked_where_the_server_counts_none(cache: Path) -> None:
    with ChatServer(usage=False) as server:
        job = Caller(server.url, cache).run(["prompt"])
    answer = job.got["prompt"]
    assert isinstance(answer, Answer)
    assert answer.estimated
    assert answer.completion_tokens == estimate("echo: prompt") == 3
    assert job.usage.estimated == 1
    again = Caller(server.url, cache).run(["prompt"])
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


# -- bounds ----------------------------------------------------------------------------------------


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
        job = Caller(server.url, cache, concurrency=64)
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
        first = Caller(server.url, cache, concurrency=16).run(texts)
        assert list(first.got) != texts  # else nothing is shown here
        second = Caller(server.url, cache, concurrency=1).run(reversed(texts))
    assert first.texts == second.texts == echoes(texts)
    assert second.usage.sent == 0


# -- the key ---------------------------------------------------------------------------------------


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
        job = Caller(server.url, cache, api_key_env="THE_KEY", concurrency=1).run(prompts(5))
        offline = Caller(
            server.url, cache, api_key_env="THE_KEY", batch=tmp_path / "batch.jsonl"
        ).run(prompts(5))
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
        Caller(server.url, cache).run(["prompt"])
    assert server.keys == [None]


# -- refusals of ours ------------------------------------------------------------------------------


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
        job = Caller(server.url, cache).run(["prompt"])
        again = Caller(server.url, cache).run(["prompt"])
    assert job.texts == again.texts == {"prompt": ""}
    assert len(server.calls) == 1


def test_half_a_surrogate_pair_in_an_answer_is_replaced(cache: Path) -> None:
    async def behave(call: Call) -> web.Response:
        return web.json_response(completion("a \ud83d b"))

    with ChatServer(behave) as server:
        assert Caller(server.url, cache).run(["prompt"]).texts == {"prompt": "a ? b"}
        assert Caller(server.url, cache).run(["prompt"]).texts == {"prompt": "a ? b"}
