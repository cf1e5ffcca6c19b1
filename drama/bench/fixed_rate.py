"""A chat server that answers at a fixed rate, in a process of its own, so that its time is nobody
else's: `slots` requests at once, and each takes the same while.

    with FixedRate(0.25) as server:      # 64 slots: 256 answers/s and no more
        ...                              # POST to server.url + "/chat/completions"
        server.written()                 # what it wrote since, by request

It names each request by the digits that the client's cache should use, computed from what arrived.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from drama.augment.testing import completion, pretend

SLOTS = 64
ECHOES = 3  # an answer of some 200 characters


def text_of(key: str) -> str:
    """The answer to the request of this key, where nothing is pretended."""
    return " ".join([key] * ECHOES)


def key_of(body: dict[str, Any]) -> str:
    """`Request.key` of a request, from the JSON that has arrived."""
    schema = body.pop("response_format", {}).get("json_schema", {}).get("schema")
    parts = [json.dumps(body, sort_keys=True), json.dumps(schema)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class FixedRate:
    """The server, as a context manager.

    seconds: of one answer; 0 answers at once. pretends: its answers are
    `drama.augment.testing.pretend`'s, else `text_of`'s.
    """

    def __init__(self, seconds: float, slots: int = SLOTS, *, pretends: bool = False) -> None:
        self.seconds, self.slots = seconds, slots
        self._arguments = {"seconds": seconds, "slots": slots, "pretends": pretends}

    @property
    def limit(self) -> float:
        """Answers/s that it cannot exceed."""
        return self.slots / self.seconds

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "drama.bench.fixed_rate", json.dumps(self._arguments)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        assert port, "the server did not start"
        self.url = f"http://127.0.0.1:{port}/v1"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()  # its input ends, and so does it

    def written(self) -> dict[str, list[str]]:
        """By key, the texts of all answers that were written since this was last called: one each
        where nothing is paid twice."""
        with urllib.request.urlopen(f"{self.url}/written") as response:
            found: dict[str, list[str]] = json.load(response)
        return found


def serve(seconds: float, slots: int, pretends: bool) -> None:
    """Print the port, then answer until the standard input ends, as it does with the parent."""
    asyncio.run(_serve(seconds, slots, _pretended if pretends else _echoed))


def _pretended(key: str, body: dict[str, Any]) -> str:
    return pretend(body["messages"][-1]["content"])


def _echoed(key: str, body: dict[str, Any]) -> str:
    return text_of(key)


async def _serve(seconds: float, slots: int, answer: Callable[[str, dict[str, Any]], str]) -> None:
    written: defaultdict[str, list[str]] = defaultdict(list)
    free, loop = asyncio.Semaphore(slots), asyncio.get_running_loop()

    async def chat(request: web.Request) -> web.Response:
        async with free:
            end = loop.time() + seconds  # from here on: reading and writing are part of the while
            body = await request.json()
            key = key_of(body)
            text = answer(key, body)
            data = json.dumps(completion(text)).encode()
            if (left := end - loop.time()) > 0:
                await asyncio.sleep(left)
            written[key].append(text)
            return web.Response(body=data, content_type="application/json")

    async def tell(_: web.Request) -> web.Response:
        response = web.json_response(written)
        written.clear()
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/written", tell)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
