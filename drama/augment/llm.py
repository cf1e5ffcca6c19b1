"""The one client of language models: bounded, patient, and never paying twice.

    async with LLM("http://localhost:8000/v1", "Qwen/Qwen3-8B", "answers.sqlite") as llm:
        async with aclosing(llm.stream((row, request_of(row)) for row in rows)) as answers:
            async for row, answer in answers:
                ...

Any server with OpenAI's `/chat/completions` will do. Answers are kept as they arrive, so the same
job, started again after whatever ended it, asks only for what is missing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from drama.augment.batch import BatchFile
from drama.augment.cache import Cache
from drama.augment.chat import Answer, Refusal, Request, Usage
from drama.augment.endpoint import Endpoint, Trouble
from drama.augment.patience import Limits, Patience
from drama.console import console
from drama.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
READ = 2  # rows that `stream` has in hand for each request that may be in flight
FAILED_IN_A_ROW = 16  # requests given up without an answer in between: it is the server after all
RESERVED = (
    "model", "messages", "max_tokens", "temperature", "top_p", "seed", "response_format", "n",
    "stream",
)  # fmt: skip


class IncompleteError(UserError):
    """Some requests have no answer: the budget is spent, or they await a batch run. All that has
    been answered is in the cache; started again, the job goes on."""


class LLM:
    """A model at an address, behind a cache. An async context manager.

    cache: the file with the answers, made if it is not there.
    batch: work offline: what the cache does not hold goes into this batch file, nothing is sent.
    extra: fields for every request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`.
    api_key_env: the environment variable that holds the key, if there is one.

    Raises:
        UserError: a bad address, limit or extra field; a cache that cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        cache: str | Path,
        *,
        limits: Limits | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        extra: Mapping[str, Any] | None = None,
        batch: str | Path | None = None,
    ) -> None:
        self.model, self.limits, self.extra = model, limits or Limits(), dict(extra or {})
        if taken := sorted(set(self.extra) & set(RESERVED)):
            raise UserError(f"LLM: {', '.join(taken)} cannot be set as an extra field; remove it")
        self.usage = Usage()
        self._cache_path = Path(cache)
        self._batch = BatchFile(batch) if batch else None
        self._endpoint = Endpoint(base_url, model, api_key_env, self.limits.timeout_s)
        self._refused_schemas: set[str] = set()
        self._flying: dict[str, asyncio.Task[Answer | Refusal]] = {}
        self._asked: set[asyncio.Task[Answer | Refusal]] = set()
        self._fault: UserError | None = None  # why nothing more is sent
        self._failed_in_a_row = 0
        self._mend = (
            "see to it, then start the same command again: what was answered is in "
            f"{self._cache_path}"
        )
        self._patience = Patience(self.limits, self._endpoint.base_url, self._mend)

    async def __aenter__(self) -> Self:
        self._slots = asyncio.Semaphore(self.limits.concurrency)
        self._stopped = asyncio.Event()
        # one thread for the cache: its commits do not hold up the requests
        self._thread = ThreadPoolExecutor(1, "drama-cache")
        self._cache = Cache(self._cache_path)
        self._endpoint.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop(UserError("the LLM was closed"))
        if kind is not None and not issubclass(kind, Exception):  # Ctrl-C does not wait
            for task in self._flying.values():
                task.cancel()
        await asyncio.gather(*self._asked, *self._flying.values(), return_exceptions=True)
        await self._endpoint.close()
        try:
            if self._batch and (kind is None or issubclass(kind, IncompleteError)):
                self._batch.__exit__(None, None, None)
            elif self._batch:
                self._batch.__exit__(kind, error, traceback)
        finally:
            await self._in_thread(self._cache.close)
            self._thread.shutdown()

    async def ask(self, request: Request) -> Answer | Refusal:
        """Answer one request, from the cache or the server.

        Raises:
            IncompleteError: the budget is spent, or the request went into the batch file.
            UserError: the server is gone for good, or lets nobody in; the cache fails.
        """
        key = request.key(self.model, self.extra)
        if answer := await self._in_thread(self._cache.get, key):
            self.usage.take(answer)
            return answer
        if self._batch:
            return await self._left_for_batch(self._batch, key, request)
        if flying := self._flying.get(key):  # the same request is on its way
            outcome = await asyncio.shield(flying)
            if isinstance(outcome, Answer):
                outcome = dataclasses.replace(outcome, cached=True)
            self.usage.take(outcome)
            return outcome
        # a task of its own: whoever stops waiting for an answer that is paid does not lose it
        task = asyncio.create_task(self._send(request, key))
        self._flying[key] = task
        task.add_done_callback(lambda done: self._landed(key, done))
        return await asyncio.shield(task)

    @property
    def is_offline(self) -> bool:
        """Whether requests go into a batch file and nothing is sent."""
        return self._batch is not None

    def incomplete(self) -> IncompleteError:
        """What is said, once all is done that can be, of requests that have no answer."""
        if self._batch:
            return IncompleteError(
                f"{self._batch.num_requests:,} requests without an answer go into "
                f"{self._batch.path}: answer them with `vllm run-batch -i {self._batch.path} -o "
                f"RESULTS --model {self.model}`, and start the same command again with "
                "`--batch-results RESULTS`"
            )
        return IncompleteError(
            f"the budget of {self.limits.max_tokens_total:,} tokens is spent "
            f"({self.usage.paid_tokens:,} were paid); the same command with another one goes on: "
            f"what was answered is in {self._cache_path}"
        )

    async def stream(
        self, requests: Iterable[tuple[T, Request]]
    ) -> AsyncGenerator[tuple[T, Answer | Refusal], None]:
        """Yield (tag, outcome) as they come, in no order. `requests` is read as places get free, so
        it may be endless; a few wait in hand, for a place that is free to be taken at once. Use
        `contextlib.aclosing` if you may leave before the end.

        Raises (after all that was on its way has been yielded, and is in the cache):
            IncompleteError: some have no answer; see `usage.unanswered`.
            UserError: as `ask`; an error of `requests` itself is raised here too.
        """
        rows = iter(requests)
        tags: dict[asyncio.Task[Answer | Refusal], T] = {}
        finished: asyncio.Queue[asyncio.Task[Answer | Refusal]] = asyncio.Queue()
        fault: Exception | None = None
        more = True
        try:
            while True:
                while more and len(tags) < READ * self.limits.concurrency:
                    try:
                        tag, request = next(rows)
                    except StopIteration:
                        more = False
                    except Exception as error:  # of the caller; what is paid comes first
                        more, fault = False, error
                    else:
                        task = asyncio.create_task(self.ask(request))
                        task.add_done_callback(finished.put_nowait)
                        tags[task] = tag
                        self._asked.add(task)
                        task.add_done_callback(self._asked.discard)
                if not tags:
                    break
                task = await finished.get()
                tag = tags.pop(task)
                try:
                    outcome = task.result()
                except Exception as error:
                    more = more and self._batch is not None and isinstance(error, IncompleteError)
                    if fault is None or isinstance(fault, IncompleteError):
                        fault = error
                else:
                    yield tag, outcome
        finally:
            for task in tags:
                task.cancel()
        if fault is not None:
            raise self.incomplete() if isinstance(fault, IncompleteError) else fault

    async def _send(self, request: Request, key: str) -> Answer | Refusal:
        """Try until there is an answer or a refusal."""
        failures = own = 0
        async with self._slots:
            while True:
                await self._wait_for_leave()
                answered = self.usage.answered
                self.usage.retried += failures > 0
                try:
                    outcome = await self._try(request)
                    if not isinstance(outcome, Trouble):
                        return await self._arrived(key, outcome)
                    failures += 1
                    if await self._is_own_fault(outcome, answered):
                        own += 1
                        self._patience.is_well()
                    if own >= self.limits.tries:
                        return self._given_up(outcome)
                    now = asyncio.get_running_loop().time()
                    pause = self._patience.pause(outcome, failures, now)
                except UserError as error:
                    self._stop(error)
                    raise
                await self._sleep(pause)

    async def _arrived(self, key: str, outcome: Answer | Refusal) -> Answer | Refusal:
        self._patience.is_well()
        self.usage.take(outcome)
        if isinstance(outcome, Answer):
            self._failed_in_a_row = 0
            await self._in_thread(self._cache.put, key, outcome, self.model)
        return outcome

    async def _try(self, request: Request) -> Answer | Refusal | Trouble:
        """One call, or two where the server does not take the schema: without it, the answer may
        still follow what the prompt says."""
        schema = json.dumps(request.schema) if request.schema is not None else ""
        structured = bool(schema) and schema not in self._refused_schemas
        outcome = await self._post(request, structured)
        if not structured or not isinstance(outcome, Refusal):
            return outcome
        plain = await self._post(request, structured=False)
        if isinstance(plain, Answer) and schema not in self._refused_schemas:
            self._refused_schemas.add(schema)
            console.print(
                f"{self._endpoint.base_url} does not take the JSON schema ({outcome.reason}: "
                f"{outcome.detail}); going on without",
                markup=False,
                soft_wrap=True,
            )
        return plain

    async def _post(self, request: Request, structured: bool) -> Answer | Refusal | Trouble:
        self.usage.sent += 1
        body = request.body(self.model, self.extra, structured=structured)
        return await self._endpoint.post(body, request.prompt)

    async def _is_own_fault(self, trouble: Trouble, answered: int) -> bool:
        """Whether the request is to blame: it fails while the server does well."""
        if not trouble.suspect:
            return False
        return self.usage.answered > answered or await self._endpoint.is_alive()

    def _given_up(self, trouble: Trouble) -> Refusal:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= FAILED_IN_A_ROW:
            raise UserError(
                f"{self._endpoint.base_url}: {self._failed_in_a_row} requests in a row failed "
                f"{self.limits.tries} times each ({trouble}); {self._mend}"
            )
        refusal = Refusal(trouble.reason, trouble.detail)
        self.usage.take(refusal)
        return refusal

    async def _wait_for_leave(self) -> None:
        time = asyncio.get_running_loop().time
        while not self._fault and (wait := self._patience.pause_until - time()) > 0:
            await self._sleep(wait)
        if self._fault:
            raise self._fault
        if self._is_spent():
            self.usage.unanswered += 1
            raise self.incomplete()

    def _is_spent(self) -> bool:
        budget = self.limits.max_tokens_total
        return budget is not None and self.usage.paid_tokens >= budget

    async def _left_for_batch(self, batch: BatchFile, key: str, request: Request) -> Refusal:
        if refusal := await self._in_thread(self._cache.refusal, key):
            self.usage.take(refusal)
            return refusal
        self.usage.unanswered += 1
        body = request.body(self.model, self.extra)
        await self._in_thread(batch.add, key, body)
        raise self.incomplete()

    def _stop(self, fault: UserError) -> None:
        """Send nothing more; what is on its way may arrive."""
        self._fault = self._fault or fault
        self._stopped.set()

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    def _landed(self, key: str, task: asyncio.Task[Answer | Refusal]) -> None:
        del self._flying[key]
        if not task.cancelled():
            task.exception()  # it was raised where it was waited for, if anybody did

    async def _in_thread(self, work: Callable[..., R], *values: Any) -> R:
        loop = asyncio.get_running_loop()
        # shielded: an answer that has arrived is kept even if its request is cancelled
        return await asyncio.shield(loop.run_in_executor(self._thread, work, *values))
