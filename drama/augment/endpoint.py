"""One try at a chat endpoint, and what its outcome means: an answer, a refusal, or trouble that
another try may mend. What no request gets past, such as a wrong key, is a `UserError`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from drama.augment.chat import PATH, REFUSALS, Answer, Refusal, detail
from drama.errors import UserError

CONNECT_S = 30.0
ALIVE_S = 10.0
# the server is busy, restarting, or a proxy finds none behind it
NOT_THE_REQUEST = (404, 405, 408, 425, 429, 502, 503)


@dataclass(frozen=True)
class Trouble:
    """A try that failed, in a few words and the server's own.

    suspect: the request itself may be the cause, so that more tries would fail for ever.
    wait_s: how long the server asks to be left alone.
    """

    reason: str
    detail: str = ""
    suspect: bool = True
    wait_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Endpoint:
    """An OpenAI-compatible server, by the address under which its `/chat/completions` lies.

    api_key_env: the environment variable that holds the key; without a value none is sent. The key
    goes into the header of requests and nowhere else.

    Raises:
        UserError: no address of HTTP, one with a password in it, or no key in the variable.
    """

    def __init__(self, base_url: str, model: str, api_key_env: str, timeout_s: float) -> None:
        self.base_url, self.model = base_url.rstrip("/"), model
        self._api_key_env, self._timeout_s = api_key_env, timeout_s
        self._answered = False
        try:
            parts = urlsplit(base_url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname)
            with_secret = parts.username is not None or parts.password is not None
        except ValueError:
            known = with_secret = False
        if with_secret:
            raise UserError(
                "the address of the LLM holds a name or a password; give it without, and the key "
                f"in the environment variable {api_key_env}"
            )
        if not known:
            raise UserError(
                f"'{base_url}' is no address of an LLM; write it like http://localhost:8000/v1"
            )

        self._key = os.environ.get(api_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{api_key_env} holds characters that no key has; set it anew")

    def open(self) -> None:
        """Get ready; nothing is sent yet."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),  # the client bounds its requests itself
            timeout=aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=CONNECT_S),
        )

    async def close(self) -> None:
        await self._session.close()

    async def post(self, body: Mapping[str, Any], prompt: str) -> Answer | Refusal | Trouble:
        """One try; `prompt` serves to estimate its tokens.

        Raises:
            UserError: the server will not answer any request: wrong key, address or model.
        """
        data = json.dumps(body).encode()
        try:
            # a redirect would turn the POST into a GET, or carry the key elsewhere
            async with self._session.post(
                self.base_url + PATH, data=data, allow_redirects=False
            ) as response:
                content = await response.read()
        except aiohttp.ClientConnectorCertificateError as error:
            raise UserError(f"{self.base_url}: its certificate is not trusted: {error}") from None
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
            return Trouble("no connection", str(error), suspect=False)
        except TimeoutError:
            return Trouble(f"no answer within {self._timeout_s:g} s")
        except (aiohttp.ClientError, OSError):
            return Trouble("the connection was cut")
        if response.status // 100 == 2:
            return self._answer(content, prompt)
        wait_s = _seconds(response.headers.get("Retry-After", ""))
        return self._fault(response.status, self._words(content), wait_s)

    async def is_alive(self) -> bool:
        """Whether the server answers at all, without a model at work."""
        timeout = aiohttp.ClientTimeout(total=ALIVE_S)
        try:
            async with self._session.get(f"{self.base_url}/models", timeout=timeout) as response:
                return response.status < HTTPStatus.INTERNAL_SERVER_ERROR
        except (aiohttp.ClientError, OSError):  # TimeoutError among them
            return False

    async def models(self) -> list[str]:
        """The names that the server lists, which costs nothing; some list none.

        Raises:
            UserError: nobody answers, or the key is not taken.
        """
        timeout = aiohttp.ClientTimeout(total=ALIVE_S)
        try:
            async with self._session.get(f"{self.base_url}/models", timeout=timeout) as response:
                status, content = response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:
            reason = str(error) or f"no answer within {ALIVE_S:g} s"
            raise UserError(f"{self.base_url} cannot be reached ({reason})") from None
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in (401, 402, 403):
            self._fault(status, self._words(content), 0.0)
            raise UserError(f"{self.base_url}: HTTP {status}: {self._words(content)}")
        try:
            return [str(model["id"]) for model in json.loads(content)["data"]]
        except (ValueError, RecursionError, KeyError, TypeError):
            return []

    def _answer(self, content: bytes, prompt: str) -> Answer | Trouble:
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            return Trouble("an answer that is not JSON", self._words(content))
        try:
            answer = Answer.parse(body, prompt)
        except ValueError:
            return Trouble("an answer without a text", self._words(content))
        self._answered = True
        return answer

    def _fault(self, status: int, words: str, wait_s: float) -> Refusal | Trouble:
        reason = f"HTTP {status}"
        said = f"{reason}: {words}" if words else reason
        if status in (401, 402):
            held = "the key in" if self._key else "no key stands in"
            raise UserError(f"{self.base_url}: {said}; {held} {self._api_key_env}, see to it")
        if status < HTTPStatus.BAD_REQUEST:
            raise UserError(f"{self.base_url}: {said}; the server lies elsewhere, mend the address")
        if status in (403, 404, 405) and not self._answered:
            raise UserError(
                f"{self.base_url}: {said}; see to the address, which ends in /v1 as a rule, and to "
                f"the model's name there, '{self.model}'"
            )
        if status in REFUSALS:
            return Refusal(reason, words)
        return Trouble(reason, words, status not in NOT_THE_REQUEST, wait_s)

    def _words(self, content: bytes) -> str:
        """What the server said, without the key, which some repeat when they do not know it."""
        text = content.decode(errors="replace")
        text = text.replace(self._key, "***") if self._key else text
        try:
            return detail(json.loads(text))
        except (ValueError, RecursionError):
            return detail(text)


def _seconds(header: str) -> float:
    """A Retry-After: seconds or a date; 0 if it is neither."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
