"""For tests: a proxy before a chat server that does what networks and servers do on bad days, by a
schedule, and keeps the books of what was paid."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import aiohttp
from aiohttp import web

from drama.augment.testing import HttpServer

RETRY_AFTER_S = 0.05


class Fault(StrEnum):
    """What happens to a call. The first three are over before the server hears of it; of the
    others it writes an answer, which is paid and lost."""

    RATE_LIMIT = "429"
    ERROR = "500"
    CUT_BEFORE = "cut before the server is asked"
    CUT_AFTER = "cut before the answer"
    CUT_WITHIN = "cut in the middle of the answer"
    HALF_JSON = "half of the JSON"
    NOT_JSON = "no JSON at all"
    SLOW = "later than the client waits"


UNPAID = (Fault.RATE_LIMIT, Fault.ERROR, Fault.CUT_BEFORE)
QUICK = tuple(fault for fault in Fault if fault is not Fault.SLOW)
Schedule = Callable[[str, int], Fault | None]  # of a request's key and which try it is, from 1


@dataclass(frozen=True)
class Delivered:
    """An answer that reached a client whole."""

    prompt: str
    text: str


def at_random(
    seed: int, share: float, faults: Sequence[Fault] = tuple(Fault), most: int = 3
) -> Schedule:
    """A share of all tries fails, the first `most` of a request at the worst: a function of seed,
    request and try alone."""

    def fault(key: str, nth: int) -> Fault | None:
        draw = random.Random(f"{seed} {nth} {key}")
        return draw.choice(faults) if nth <= most and draw.random() < share else None

    return fault


class Proxy(HttpServer):
    """Stands before the server at `target`, the address with /v1.

    Counted by request (`key`): met, the faults; asked, the calls that reached the server. Of these
    whole came to a client that was still there, destroyed were the faults' prey, gone is what the
    client left behind, unanswered what the server did not answer: it died, or we did. In quiet
    times asked is the sum of the four.

    delivered: the answers in `whole`. schedule: may be changed at any time.
    """

    def __init__(self, target: str, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.target, self.schedule = target, schedule
        self.tries: Counter[str] = Counter()
        self.met: Counter[Fault] = Counter()
        self.asked: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()
        self.destroyed: Counter[str] = Counter()
        self.gone: Counter[str] = Counter()
        self.unanswered: Counter[str] = Counter()
        self.delivered: list[Delivered] = []

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/chat/completions", self._chat), web.get("/v1/models", self._models)]

    def balanced(self) -> bool:
        """Whether every call that reached the server is accounted for."""
        return self.asked == self.whole + self.destroyed + self.gone + self.unanswered

    async def _models(self, request: web.Request) -> web.StreamResponse:
        try:
            async with aiohttp.request("GET", f"{self.target}/models") as response:
                return web.Response(body=await response.read(), status=response.status)
        except aiohttp.ClientError:
            return web.Response(status=502)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        key = json.dumps(body, sort_keys=True)
        self.tries[key] += 1
        fault = self.schedule(key, self.tries[key]) if self.schedule else None
        if fault:
            self.met[fault] += 1
        if fault in UNPAID:
            return await _unpaid(fault, request)
        self.asked[key] += 1
        fate = self.unanswered
        try:
            status, content = await self._answer(body)
            if status != 200:
                return web.Response(status=status, body=content)
            fate = self.gone
            if fault:
                fate = self.destroyed
                return await _spoiled(fault, request, content)
            if not _is_there(request):
                return web.Response()
            response = await _write(request, content)
            fate = self.whole
            text = json.loads(content)["choices"][0]["message"]["content"]
            self.delivered.append(Delivered(body["messages"][-1]["content"], text))
            return response
        except OSError:  # the client has gone while we wrote
            return web.Response()
        finally:
            fate[key] += 1

    async def _answer(self, body: object) -> tuple[int, bytes]:
        """Status and content of the server's answer; 502 where it does not give one."""
        forever = aiohttp.ClientTimeout(total=None)
        try:
            async with (
                aiohttp.ClientSession(timeout=forever) as session,
                session.post(f"{self.target}/chat/completions", json=body) as response,
            ):
                return response.status, await response.read()
        except aiohttp.ClientError:
            return 502, b"no server behind this proxy"


async def _unpaid(fault: Fault, request: web.Request) -> web.StreamResponse:
    if fault is Fault.RATE_LIMIT:
        return web.Response(status=429, headers={"Retry-After": str(RETRY_AFTER_S)})
    if fault is Fault.ERROR:
        return web.Response(status=500, text="Internal Server Error")
    return _cut(request)


async def _spoiled(fault: Fault, request: web.Request, content: bytes) -> web.StreamResponse:
    half = content[: len(content) // 2]
    if fault is Fault.HALF_JSON:
        return web.Response(body=half, content_type="application/json")
    if fault is Fault.NOT_JSON:
        return web.Response(text="<html><body>Please log in.</body></html>")
    if fault is Fault.CUT_WITHIN:
        response = web.StreamResponse(headers={"Content-Length": str(len(content))})
        await response.prepare(request)
        await response.write(half)
    if fault is Fault.SLOW:
        while _is_there(request):
            await asyncio.sleep(0.02)
    return _cut(request)


async def _write(request: web.Request, content: bytes) -> web.StreamResponse:
    """Send an answer, down to its last byte."""
    response = web.StreamResponse(headers={"Content-Length": str(len(content))})
    response.content_type = "application/json"
    await response.prepare(request)
    await response.write(content)
    await response.write_eof()
    return response


def _cut(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()  # goes nowhere


def _is_there(request: web.Request) -> bool:
    return request.transport is not None and not request.transport.is_closing()
