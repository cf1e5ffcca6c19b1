"""A chat server for tests: real HTTP on a free port; it counts what reaches it, fails on demand."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

from aiohttp import web


@dataclass(frozen=True)
class Call:
    """A request that has arrived: the `nth` with this prompt, counted from 1."""

    prompt: str
    nth: int
    body: dict[str, Any]
    request: web.Request


Behave = Callable[[Call], Awaitable[web.StreamResponse | str | None]]


class ChatServer:
    """Runs in a thread; a context manager. Answers "echo: PROMPT" at 10 tokens in all, unless
    `behave` returns another response, or a str for another text.

    paid: by prompt, how often an answer was written for a client that was still there.
    """

    def __init__(self, behave: Behave | None = None, usage: bool = True) -> None:
        self.behave, self.usage = behave, usage
        self.calls: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.seen: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; after a `stop` on the same port again."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def stop(self) -> None:
        """Die: connections are cut, nothing listens any more."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.in_flight = 0

    async def _listen(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            body = await request.json()
            prompt = body["messages"][-1]["content"]
            self.calls.append(body)
            self.keys.append(request.headers.get("Authorization"))
            self.seen[prompt] += 1
            text = f"echo: {prompt}"
            if self.behave is not None:
                response = await self.behave(Call(prompt, self.seen[prompt], body, request))
                if isinstance(response, str):
                    text = response
                elif response is not None:
                    return response
            if request.transport is not None and not request.transport.is_closing():
                self.paid[prompt] += 1
            return web.json_response(completion(text, usage=self.usage))
        finally:
            self.in_flight -= 1


def completion(text: str | None, *, usage: bool = True) -> dict[str, Any]:
    """The JSON of an answer that cost 7 and 3 tokens."""
    message = {"role": "assistant", "content": text}
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "served",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return body
