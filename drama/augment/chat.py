"""What goes to a language model and what comes back: requests, answers, refusals, their sums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PATH = "/chat/completions"
# what another try cannot mend, for the request is at fault: too long, ill-formed, not allowed
REFUSALS = (400, 403, 406, 411, 413, 414, 415, 416, 417, 422, 431, 451)
MAX_DETAIL = 300  # characters of a server's own words
BYTES_PER_TOKEN = 4  # of UTF-8; a rule of thumb for servers that do not count


@dataclass(frozen=True)
class Request:
    """One chat completion. Two that are equal are sent and paid once.

    schema: a JSON schema that the answer shall follow, where the server can see to it.
    """

    messages: Sequence[Mapping[str, str]]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    schema: Mapping[str, Any] | None = None

    def body(
        self, model: str, extra: Mapping[str, Any] | None = None, *, structured: bool = True
    ) -> dict[str, Any]:
        """The JSON of the request.

        extra: further fields, such as `{"chat_template_kwargs": {"enable_thinking": False}}`.
        structured: whether the schema goes along.
        """
        body: dict[str, Any] = {
            "model": model,
            "messages": [dict(message) for message in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": float(self.temperature),
            "top_p": float(self.top_p),
        }
        if self.seed is not None:
            body["seed"] = self.seed
        if structured and self.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": self.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body | dict(extra or {})

    def key(self, model: str, extra: Mapping[str, Any] | None = None) -> str:
        """What the answer depends on, as the 64 digits of a SHA-256. Where the model runs is no
        part of it. The order of a schema's keys is: models write properties in that order."""
        body = self.body(model, extra, structured=False)
        parts = [json.dumps(body, sort_keys=True), json.dumps(self.schema)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def prompt(self) -> str:
        return "\n".join(text for message in self.messages for text in message.values())


@dataclass(frozen=True)
class Answer:
    """What the model wrote. `estimated`: the server gave no token counts."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str  # "stop", "length", ...; "" where the server gives none
    cached: bool = False
    estimated: bool = False

    @classmethod
    def parse(cls, body: Any, prompt: str = "") -> Answer:
        """Read a server's JSON; `prompt` serves to estimate its tokens.

        Raises:
            ValueError: there is no answer in it; the message has the server's own words, if any.
        """
        try:
            choice = body["choices"][0]
            text = choice["message"]["content"]
            reason = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(detail(body) or "no choices") from None
        if not isinstance(text, str | None):
            raise ValueError("the content is no text")
        # None: all of it was reasoning, or a filter took it; it is paid all the same.
        # Half of a surrogate pair can be written neither to SQLite nor to UTF-8.
        text = (text or "").encode(errors="replace").decode()
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        sent, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if type(sent) is int and type(written) is int and min(sent, written) >= 0:
            return cls(text, sent, written, str(reason or ""))
        return cls(text, estimate(prompt), estimate(text), str(reason or ""), estimated=True)


@dataclass(frozen=True)
class Refusal:
    """The server does not answer this request, and no further try would change that.

    reason: a few words, for those who count; detail: what the server said.
    """

    reason: str
    detail: str = ""


@dataclass
class Usage:
    """What a run has done. Tokens of a server that does not count them are estimated."""

    sent: int = 0  # calls, further tries included
    retried: int = 0  # further tries among them
    answered: int = 0  # by the server
    cached: int = 0
    refused: int = 0
    unanswered: int = 0  # left for a batch run or for a larger budget
    estimated: int = 0  # answers whose tokens are
    prompt_tokens: int = 0  # paid in this run
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    cached_completion_tokens: int = 0

    @property
    def paid_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def line(self) -> str:
        """For a progress bar: calls and tokens."""
        return (
            f"calls {self.sent:,} sent, {self.cached:,} cached  tokens paid "
            f"{self.prompt_tokens:,} + {self.completion_tokens:,}"
        )

    def take(self, outcome: Answer | Refusal) -> None:
        if isinstance(outcome, Refusal):
            self.refused += 1
            return
        self.estimated += outcome.estimated
        if outcome.cached:
            self.cached += 1
            self.cached_prompt_tokens += outcome.prompt_tokens
            self.cached_completion_tokens += outcome.completion_tokens
        else:
            self.answered += 1
            self.prompt_tokens += outcome.prompt_tokens
            self.completion_tokens += outcome.completion_tokens


def detail(body: Any) -> str:
    """The message in a server's error, on one line and not too long: in OpenAI's form, vLLM's
    older one, FastAPI's, or as any text."""
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(name):
            return detail(body[name])
    text = body if isinstance(body, str) else json.dumps(body) if body else ""
    text = " ".join(text.split())
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 3] + "..."


def estimate(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text.encode(errors="replace")) // BYTES_PER_TOKEN)
