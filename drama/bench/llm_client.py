"""What the client of language models adds to the server's own time.

The server answers at a fixed rate, in a process of its own. Beside `LLM.stream` and `InOrder`, on
which the commands stand, runs a bare loop over aiohttp without cache, patience or accounts: what it
loses too is not the client's. A rate counts only if every request got its own answer, the cache
holds it, and the server wrote each once.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import aiohttp

from drama.augment.asking import Talk
from drama.augment.chat import PATH, Answer, Request
from drama.augment.in_order import InOrder
from drama.augment.llm import LLM
from drama.augment.messages import query_messages, rerank_messages
from drama.augment.patience import Limits
from drama.augment.prompts import Prompt
from drama.bench.fixed_rate import SLOTS, FixedRate, text_of
from drama.bench.rows import Rows
from drama.console import progress

MODEL = "fixed-rate"
PASSAGES = 20  # of a prompt that asks for their order
# seconds of an answer, and how many times over the server's places are filled
LOADS = ((1.0, 4), (0.25, 8), (0.1, 16), (0.0, 16))
QUICK_LOADS = ((0.05, 2), (0.0, 2))


@dataclass
class Taken:
    """What came of a run: when each answer was handed over, and what it said."""

    answers: list[tuple[Request, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of the whole run
    cpu_s: float = 0.0  # of this process

    def take(self, request: Request, text: str) -> None:
        self.times.append(time.perf_counter())
        self.answers.append((request, text))

    def rate(self) -> float:
        """Calls/s from beginning to end."""
        return len(self.times) / self.seconds

    def steady_rate(self, slots: int) -> float:
        """Calls/s once the server's places have been full once."""
        return (len(self.times) - slots) / (self.times[-1] - self.times[slots - 1])


Way = Callable[[str, Path, Sequence[Request], Taken], None]


def bare(url: str, cache: Path, requests: Sequence[Request], taken: Taken) -> None:
    """As few lines as will do: each place takes the next request, posts it, and reads the text."""
    left = iter(requests)

    async def place(session: aiohttp.ClientSession) -> None:
        for request in left:
            async with session.post(url + PATH, json=request.body(MODEL)) as response:
                body = await response.json()
            taken.take(request, body["choices"][0]["message"]["content"])

    async def run() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(place(session) for _ in range(SLOTS)))

    asyncio.run(run())


def stream(url: str, cache: Path, requests: Sequence[Request], taken: Taken) -> None:
    """`LLM.stream`: the answers as they come."""

    async def run() -> None:
        async with (
            LLM(url, MODEL, cache, limits=Limits(SLOTS)) as llm,
            aclosing(llm.stream((request, request) for request in requests)) as outcomes,
        ):
            async for request, outcome in outcomes:
                assert isinstance(outcome, Answer), outcome
                taken.take(request, outcome.text)

    asyncio.run(run())


def in_order(url: str, cache: Path, requests: Sequence[Request], taken: Taken) -> None:
    """`InOrder`: the answers in the order of the requests, as the commands take them."""

    async def work(request: Request, talk: Talk) -> tuple[Request, str]:
        text = await talk.ask(request)
        assert isinstance(text, str), text
        return request, text

    with InOrder(LLM(url, MODEL, cache, limits=Limits(SLOTS)), requests, work) as results:
        for done in results:
            taken.take(*done.value)


WAYS: dict[str, Way] = {"aiohttp alone": bare, "LLM.stream": stream, "InOrder": in_order}
CACHED = "LLM.stream, from the cache"


def query_requests(texts: Sequence[str], count: int) -> list[Request]:
    """Requests of `drama augment queries`, no two of them equal."""
    prompt = Prompt.load("queries")
    return [
        Request(query_messages(prompt, texts[n % len(texts)]), 256, 0.8, 0.9, seed=n)
        for n in range(count)
    ]


def rerank_requests(texts: Sequence[str], count: int) -> list[Request]:
    """Requests of `drama augment rerank`: 20 passages each, no two of them equal."""
    prompt, requests = Prompt.load("rerank"), []
    for n in range(count):
        passages = [texts[(n + place) % len(texts)] for place in range(PASSAGES)]
        messages = rerank_messages(prompt, passages[0][:100], passages)
        requests.append(Request(messages, 256, 0.0, 1.0, seed=n))
    return requests


def timed(way: Way, url: str, cache: Path, requests: Sequence[Request]) -> Taken:
    """Run a way once and check what came of it."""
    taken, began, cpu = Taken(), time.perf_counter(), time.process_time()
    way(url, cache, requests, taken)
    taken.seconds = time.perf_counter() - began
    taken.cpu_s = time.process_time() - cpu
    check_answers(requests, taken)
    return taken


def check_answers(requests: Sequence[Request], taken: Taken) -> None:
    """Refuse a rate of answers that are not those of their requests."""
    assert len(taken.answers) == len(requests), (len(taken.answers), len(requests))
    keys = {request.key(MODEL) for request in requests}
    for request, text in taken.answers:
        key = request.key(MODEL)
        assert text == text_of(key), f"the answer to {key} is {text!r}"
        keys.discard(key)
    assert not keys, f"{len(keys)} requests without an answer"


def check_paid(written: dict[str, list[str]], cache: Path | None) -> None:
    """Refuse a run in which an answer was written twice, or the cache holds another."""
    twice = [key for key, texts in written.items() if len(texts) != 1]
    assert not twice, f"{len(twice)} requests were paid more than once"
    if cache is not None:
        with closing(sqlite3.connect(cache)) as file:
            held = dict(file.execute("SELECT key, text FROM answers"))
        assert held == {key: texts[0] for key, texts in written.items()}, "the cache holds others"


def measure(
    texts: Sequence[str],
    rows: Rows,
    *,
    rounds: int,
    loads: Sequence[tuple[float, int]] = LOADS,
) -> Iterator[str]:
    """Time all ways in turn under each load; add rows, and yield a line for people each time.

    texts: documents for the prompts.
    """
    most = max(waves for _, waves in loads) * SLOTS
    prompts = {"queries": query_requests(texts, most), "rerank": rerank_requests(texts, most)}
    chance = random.Random(0)
    with progress() as bar:
        task = bar.add_task("client", total=len(loads) * len(prompts) * rounds, note="")
        for seconds, waves in loads:
            for kind, several in prompts.items():
                bar.update(task, note=f"{_spelled(seconds)}, {kind}")
                requests = several[: waves * SLOTS]
                found: dict[str, list[Taken]] = {way: [] for way in WAYS}
                with FixedRate(seconds) as server:
                    for _ in range(rounds):
                        for way in chance.sample(list(WAYS), len(WAYS)):
                            for name, taken in _run(way, server, requests).items():
                                found.setdefault(name, []).append(taken)
                        bar.advance(task)
                yield from _report(rows, kind, seconds, requests, found)


def _run(way: str, server: FixedRate, requests: Sequence[Request]) -> dict[str, Taken]:
    """One run with a cache of its own; against a server that answers at once, from it as well."""
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "answers.sqlite"
        runs = {way: timed(WAYS[way], server.url, cache, requests)}
        if way == "LLM.stream" and not server.seconds:
            runs[CACHED] = timed(stream, server.url, cache, requests)
        check_paid(server.written(), None if way == "aiohttp alone" else cache)
    return runs


def _report(
    rows: Rows,
    kind: str,
    seconds: float,
    requests: Sequence[Request],
    found: dict[str, list[Taken]],
) -> Iterator[str]:
    config = {
        "in flight": SLOTS,
        "calls": len(requests),
        "prompt characters": round(statistics.mean(len(r.prompt) for r in requests)),
        "aiohttp": metadata.version("aiohttp"),
    }
    for way, runs in found.items():
        figures = {"calls/s": [taken.rate() for taken in runs]}
        if seconds:
            limit = SLOTS / seconds
            figures["share of the limit"] = [taken.steady_rate(SLOTS) / limit for taken in runs]
            figures["share of the limit, start included"] = [t.rate() / limit for t in runs]
        figures["CPU ms a call"] = [1e3 * taken.cpu_s / len(requests) for taken in runs]
        for metric, values in figures.items():
            rows.add(way, f"{kind} prompts", metric, _spelled(seconds), values, config)
        line = [f"{statistics.median(v):.4g} {metric}" for metric, v in figures.items()]
        yield f"{kind}, {_spelled(seconds)}, {way}: {', '.join(line)}"


def _spelled(seconds: float) -> str:
    return f"{seconds:g} s an answer" if seconds else "answers at once"
