"""The HTTP side of `drama serve`: routes, errors in OpenAI's form, and who may ask."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import traceback
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
from aiohttp import hdrs, web

from drama.console import console
from drama.errors import UserError
from drama.serve.asked import RequestError, embed_request, parse, search_request
from drama.serve.limits import Limits
from drama.serve.service import Service
from drama.serve.worker import BusyError, GivenUpError, Stopping, Worker

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
RETRY_S = "1"


class Server:
    """The web application around a service.

    local: refuse requests whose Host is no name of this machine's loopback, so that a page of
    another site cannot reach the server under a name of its own (DNS rebinding).
    """

    def __init__(self, service: Service, limits: Limits, *, local: bool) -> None:
        self.service, self.limits, self.local = service, limits, local
        self.worker = Worker(limits.max_waiting)
        self._page = files("drama.serve").joinpath("page.html").read_text(encoding="utf-8")
        self._headers = {
            "Content-Security-Policy": _policy(self._page),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }

    def app(self) -> web.Application:
        """The application; it closes the worker when it is cleaned up."""
        app = web.Application(middlewares=[self._guard], client_max_size=self.limits.max_bytes)
        app.add_routes([
            web.get("/", self._get_page),
            web.get("/health", self._get_health),
            web.get("/v1/models", self._get_models),
            web.post("/v1/embeddings", self._post_embeddings),
            web.post("/embed", self._post_embeddings),
            web.get("/search", self._get_search),
            web.post("/search", self._post_search),
            web.get(r"/documents/{row:\d{1,18}}", self._get_document),
        ])  # fmt: skip
        app.on_response_prepare.append(self._add_headers)
        app.on_cleanup.append(self._close)
        return app

    # -- routes -------------------------------------------------------------------------------

    async def _get_page(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=self._page, content_type="text/html")

    async def _get_health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok", "pending": self.worker.pending})

    async def _get_models(self, request: web.Request) -> web.StreamResponse:
        model = {"id": self.service.name, "object": "model", "created": 0, "owned_by": "drama"}
        model |= {"facts": self.service.facts()}
        return web.json_response({"object": "list", "data": [model]})

    async def _post_embeddings(self, request: web.Request) -> web.StreamResponse:
        value = await self._read(request)
        asked = embed_request(value, self.service.name, self.limits)

        def work(stopping: Stopping) -> tuple[list[Any], int]:
            vectors_BD, tokens = self.service.embed(asked, stopping)
            if asked.format == "float":
                return vectors_BD.tolist(), tokens
            return [_base64(vector_D) for vector_D in vectors_BD], tokens

        vectors, tokens = await self._run(work)
        data = [
            {"object": "embedding", "index": i, "embedding": vector}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return web.json_response(
            {"object": "list", "data": data, "model": self.service.name, "usage": usage}
        )

    async def _get_search(self, request: web.Request) -> web.StreamResponse:
        return await self._search(request.query)

    async def _post_search(self, request: web.Request) -> web.StreamResponse:
        return await self._search(await self._read(request))

    async def _search(self, value: Mapping[str, Any]) -> web.StreamResponse:
        asked = search_request(value, self.limits)
        return web.json_response(await self._run(lambda stop: self.service.search(asked, stop)))

    async def _get_document(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.service.document(int(request.match_info["row"])))

    # -- around them --------------------------------------------------------------------------

    async def _read(self, request: web.Request) -> dict[str, Any]:
        if request.content_type != "application/json":  # what a form of another site cannot send
            raise RequestError(415, "the body must be sent as Content-Type: application/json")
        try:
            return parse(await asyncio.wait_for(request.read(), self.limits.read_s))
        except TimeoutError:
            raise RequestError(408, f"no whole body within {self.limits.read_s:g} s") from None

    async def _run(self, work: Callable[[Stopping], T]) -> T:
        try:
            return await self.worker.run(work, self.limits.timeout_s)
        except BusyError:
            waiting = self.limits.max_waiting
            raise RequestError(503, f"{waiting} requests wait already; try again") from None
        except GivenUpError:
            raise RequestError(503, "the server is ending") from None
        except TimeoutError:
            raise RequestError(504, f"no result within {self.limits.timeout_s:g} s") from None

    def _check_origin(self, request: web.Request) -> None:
        name = re.sub(r":\d*$", "", request.headers.get(hdrs.HOST, "")).lower()
        if self.local and name not in LOOPBACK:
            raise RequestError(
                403, f"Host {ascii(name)[:80]} is not this machine; use {LOOPBACK[1]}"
            )
        origin = request.headers.get(hdrs.ORIGIN)
        own = origin is None or origin.partition("://")[2] == request.headers.get(hdrs.HOST)
        elsewhere = request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
        if not own or (elsewhere and request.path != "/"):  # a link to the page is fine
            raise RequestError(403, "pages of other sites may not ask this server")

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check_origin(request)
            return await handler(request)
        except RequestError as error:
            return _refusal(error)
        except UserError as error:
            return _refusal(RequestError(422, str(error)))
        except web.HTTPRequestEntityTooLarge:
            most = f"{self.limits.max_bytes:,} bytes are the most (--max-bytes)"
            return _refusal(RequestError(413, f"the body is too large; {most}"))
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            answer = _refusal(
                RequestError(405, f"{request.path} takes {allowed}, not {request.method}")
            )
            answer.headers[hdrs.ALLOW] = allowed
            return answer
        except web.HTTPException as error:
            reason = f"{request.path[:80]!a}: {error.reason}"
            return _refusal(RequestError(error.status, reason))
        except Exception:
            console.print(traceback.format_exc(), markup=False, highlight=False)
            return _refusal(RequestError(500, "a fault of the server; its console says more"))

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(self._headers)

    async def _close(self, app: web.Application) -> None:
        await asyncio.to_thread(self.worker.close)


def _refusal(error: RequestError) -> web.Response:
    headers = {hdrs.RETRY_AFTER: RETRY_S} if error.status == 503 else {}
    return web.json_response(error.to_json(), status=error.status, headers=headers)


def _base64(vector_D: np.ndarray) -> str:
    """As OpenAI's client reads it: float32, little-endian."""
    return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()


def _policy(page: str) -> str:
    """A policy under which the page's own style and script run, and nothing else does."""
    hashes = {}
    for tag in ("style", "script"):
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = hashlib.sha256(content.encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
