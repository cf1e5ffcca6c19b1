"""What is asked of a language model, and how: shared by all kinds that need one."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from drama.augment.batch import read_results
from drama.augment.cache import Cache
from drama.augment.chat import Refusal, Request
from drama.augment.job import Dropped
from drama.augment.llm import LLM
from drama.augment.patience import Limits
from drama.augment.prompts import Message, Prompt
from drama.console import console
from drama.errors import UserError

R = TypeVar("R")
CUT = "answers cut off"  # at `max_tokens`


@dataclass(frozen=True)
class Asking:
    """A model, how it draws its answers, and where they are kept.

    max_tokens: of one answer. seed: sent with every request. prompt: a file in the place of the
    shipped prompt. extra: fields for every request. batch: write what the cache lacks there and
    send nothing. results: of batch runs, read into the cache first.
    """

    model: str
    base_url: str
    cache: Path
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int = 0
    prompt: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    api_key_env: str = "OPENAI_API_KEY"
    limits: Limits = field(default_factory=Limits)
    batch: Path | None = None
    results: tuple[Path, ...] = ()

    def about(self, *prompts: Prompt) -> dict[str, Any]:
        """Plain values that change whenever a request would; where the model runs is none."""
        return {
            "model": self.model,
            "prompts": [prompt.key for prompt in prompts],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "extra": dict(self.extra),
        }

    def request(
        self,
        messages: Sequence[Message],
        *,
        index: int = 0,
        max_tokens: int | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> Request:
        """One request. index: tells apart what would else be drawn alike."""
        return Request(
            messages,
            max_tokens or self.max_tokens,
            self.temperature,
            self.top_p,
            self.seed + index,
            schema,
        )

    def open(self) -> LLM:
        """The client, not entered yet; results of batch runs are in its cache then.

        Raises:
            UserError: from `LLM`, or results that cannot be read.
        """
        llm = LLM(
            self.base_url,
            self.model,
            self.cache,
            limits=self.limits,
            api_key_env=self.api_key_env,
            extra=self.extra,
            batch=self.batch,
        )
        if self.results:
            self._read_results()
        return llm

    def _read_results(self) -> None:
        cache = Cache(self.cache)
        try:
            for path in self.results:
                if not path.is_file():
                    raise UserError(f"{path} does not exist; give what the batch run has written")
                read = read_results(path, cache)
                text = f"{path}: {read.answers:,} answers, {read.refused:,} refused"
                if read.bad:
                    reasons = ", ".join(f"{why} {count:,}" for why, count in read.bad.most_common())
                    text += f"; lines without an answer: {reasons} (first: {read.first_bad})"
                console.print(text, markup=False, highlight=False, soft_wrap=True)
        finally:
            cache.close()


class Talk:
    """All that is asked for one row. counts: what that took, and what its kind counts besides."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.counts: Counter[str] = Counter()

    async def ask(self, request: Request, *, whole: bool = False) -> str | Dropped:
        """The text of an answer, or that there is none. whole: one that was cut off is none.

        Raises:
            UserError: as `LLM.ask`.
        """
        outcome = await self._llm.ask(request)
        self.counts["calls"] += 1
        if isinstance(outcome, Refusal):
            return Dropped(f"refused by the server, {outcome.reason}")
        self.counts["prompt tokens"] += outcome.prompt_tokens
        self.counts["completion tokens"] += outcome.completion_tokens
        if outcome.finish_reason == "length":
            self.counts[CUT] += 1
            if whole:
                return Dropped("answer cut off")
        return outcome.text


async def together(works: Iterable[Awaitable[R]]) -> list[R]:
    """The results of all, in order. Where one fails the others still come to their end first, so
    that a batch file lacks none of their requests.

    Raises:
        Exception: the first one's.
    """
    results: list[R] = []
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results


def parse_extra(text: str) -> dict[str, Any]:
    """Fields for every request, given as JSON.

    Raises:
        UserError: no JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"extra '{text}' is no JSON object; write it like "
            '\'{"chat_template_kwargs": {"enable_thinking": false}}\''
        )
    return value
