"""For tests: a chat server, real HTTP on a free port, that counts what reaches it and fails on
demand; the answers of a pretended model; batch runs without vLLM; a caller of the client; commands
that are killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from drama.augment.cache import Cache
from drama.augment.chat import Answer, Refusal, Request
from drama.augment.llm import LLM
from drama.augment.patience import Limits
from drama.errors import UserError


@dataclass(frozen=True)
class Call:
    """A request that has arrived: the `nth` with this prompt, counted from 1."""

    prompt: str
    nth: int
    body: dict[str, Any]
    request: web.Request


QUICK: dict[str, Any] = {
    "concurrency": 4, "timeout_s": 20.0, "patience_s": 20.0, "first_pause_s": 0.001,
    "max_pause_s": 0.01,
}  # fmt: skip
Behave = Callable[[Call], Awaitable[web.StreamResponse | str | None]]


class HttpServer:
    """An aiohttp server in a thread, on a free port; a context manager. Kinds add `routes`."""

    def __init__(self) -> None:
        self._port = 0

    def routes(self) -> list[web.RouteDef]:
        raise NotImplementedError

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

    async def _listen(self) -> None:
        app = web.Application(client_max_size=2**24)
        app.add_routes(self.routes())
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]


class ChatServer(HttpServer):
    """Answers "echo: PROMPT" at 10 tokens in all, unless `behave` returns another response, or a
    str for another text.

    paid: by prompt, how often an answer was written for a client that was still there.
    """

    def __init__(self, behave: Behave | None = None, usage: bool = True) -> None:
        super().__init__()
        self.behave, self.usage = behave, usage
        self.calls: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.seen: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/chat/completions", self._chat), web.get("/v1/models", self._models)]

    def stop(self) -> None:
        super().stop()
        self.in_flight = 0

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


def pretend(prompt: str) -> str:
    """What a model would write, a function of the prompt alone."""
    if "Task, query (in the language" in prompt:
        found = re.search(r"<document>\s*(.*?)\s*</document>", prompt, re.S)
        assert found is not None
        words = re.findall(r"\w+", found[1])
        return f"Task: find it.\nQuery: what is the {words[-1]} of {words[5]}?\nLanguage: English"
    if "in order by how well" in prompt:
        last = len(re.findall(r"^\[\d+\] ", prompt, re.M))
        return " > ".join(f"[{number}]" for number in range(last, 0, -1))
    if "passages relevant to this query?" in prompt:
        passages = re.findall(r"^\[(\d+)\] (.*)$", prompt, re.M)
        return "\n".join(f"[{n}] {'yes' if 'truth' in text else 'no'}" for n, text in passages)
    if found := re.search(r"Write (\d+) retrieval tasks.\nField: (.*)", prompt):
        return "\n".join(
            f"- Given a question number {n} about {found[2]}, find its answer."
            for n in range(int(found[1]))
        )
    found = re.search(r"Retrieval task: (.*)", prompt)
    assert found is not None, prompt
    about = found[1].removeprefix("Given a question ")
    length = re.search(r'"query": (.*?)\. It', prompt)
    return json.dumps(
        {
            "query": f"what about {about} in {length[1] if length else ''}",
            "positive": f"This is what is known of {about}, in many words.",
            "negative": f"This is something else than {about}, in many words.",
        }
    )


def served(
    text_of: Callable[[str], str] = pretend, delay_s: Callable[[Call], float] | None = None
) -> ChatServer:
    """A server that answers every prompt with a text, after a while."""

    async def behave(call: Call) -> str:
        if delay_s is not None:
            await asyncio.sleep(delay_s(call))
        return text_of(call.prompt)

    return ChatServer(behave)


def answer_batch(path: Path, results: Path) -> int:
    """What `vllm run-batch` does; how many requests it answered."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    with results.open("w") as file:
        for line in lines:
            body = completion(pretend(line["body"]["messages"][-1]["content"]))
            row = {"custom_id": line["custom_id"], "error": None}
            row["response"] = {"status_code": 200, "body": body}
            file.write(json.dumps(row) + "\n")
    return len(lines)


def held_answers(path: Path) -> int:
    """How many answers a cache holds."""
    cache = Cache(path)
    try:
        return len(cache)
    finally:
        cache.close()


def killed(folder: Path, module: str, size: str, out: Path, *arguments: object) -> int:
    """Run a real command in small steps, kill it once it has noted a position, and return that.

    module: of `drama.augment`; size: such as "BATCH = 10", a name in it. folder: for the driver.
    """
    driver = folder / "driver.py"
    driver.write_text(
        "import sys\n"
        f"from drama.augment import {module} as kind, job\n"
        "from drama.cli import main\n"
        f"kind.{size}\n"
        "job.JOURNAL_EVERY_S = 0.0\n"
        "main(sys.argv[1:])\n"
    )
    journal = out.with_name(f".{out.name}.partial") / "journal.json"
    kill_once(journal.exists, "-P", driver, *arguments, "--out", out)
    return int(json.loads(journal.read_text())["start"])


def kill_once(ready: Callable[[], bool], *arguments: object) -> None:
    """Run Python with these arguments and `kill -9` it as soon as it is `ready`."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"


def ask_for(prompt: str, **values: Any) -> Request:
    """A request of one message."""
    return Request(({"role": "user", "content": prompt},), max_tokens=16, **values)


def prompts(count: int) -> list[str]:
    """So many texts."""
    return [f"prompt {number}" for number in range(count)]


class Caller:
    """Streams prompts through a client of its own, a quick one, and keeps all that comes back."""

    def __init__(self, server: str, cache: Path, **values: Any) -> None:
        limits = {name: values.pop(name) for name in list(values) if hasattr(Limits, name)}
        self.llm = LLM(server, "tiny", cache, limits=Limits(**(QUICK | limits)), **values)
        self.usage = self.llm.usage
        self.got: dict[str, Answer | Refusal] = {}
        self.error: Exception | None = None

    def run(self, texts: Iterable[str], **values: Any) -> Self:
        """Ask for all; an error of ours is kept in `error`."""

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
    """What `ChatServer` answers to them."""
    return {text: f"echo: {text}" for text in texts}


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for what another thread or process brings about, for a minute at most."""
    last = time.monotonic() + 60
    while not true():
        assert time.monotonic() < last
        time.sleep(0.005)
