"""Start and end a server: its socket, its signals, its one line."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import signal
import socket
import webbrowser
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from aiohttp import web

from drama.console import console
from drama.errors import UserError
from drama.serve.limits import Limits

if TYPE_CHECKING:
    from drama.serve.app import Server

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_S = 10.0  # for requests that run when the end is asked for


def serve(
    model: Path | None = None,
    index: Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    dim: int | None = None,
    limits: Limits | None = None,
    open_browser: bool = False,
) -> None:
    """Serve the page and its endpoints until SIGTERM or Ctrl-C; call it in the main thread.

    Args:
        model: default the one that the index was built with.
        port: 0 takes a free one.
        dim: width of vectors; default the index's, or the model's.

    Raises:
        UserError: a port that is in use or not allowed, or from `Service`.
        SystemExit: 0, for a signal while the model loads.
    """
    before = {number: signal.signal(number, _leave) for number in SIGNALS}
    try:
        with _listening(host, port) as listener:  # a port in use is said before a long load
            local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
            if not local:
                _say(
                    f"warning: {host} can be reached from elsewhere, and nobody is asked who he is"
                )
            from drama.serve.app import Server  # these two bring torch
            from drama.serve.service import Service

            server = Server(Service(model, index, dim), limits or Limits(), local=local)
            asyncio.run(_serve(server, listener, host, open_browser))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _serve(server: Server, listener: socket.socket, host: str, open_browser: bool) -> None:
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, over.set)
    runner = web.AppRunner(
        server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=GRACE_S
    )
    await runner.setup()
    await web.SockSite(runner, listener).start()
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/"
    _say(f"{server.service.name} at {address}  (Ctrl-C ends)")
    if open_browser:
        webbrowser.open(address)
    await over.wait()
    await runner.cleanup()


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except socket.gaierror as error:
        raise UserError(f"--host {host} is no address of this machine: {error.strerror}") from None
    except OSError as error:
        why = {
            errno.EADDRINUSE: "is in use; choose another with --port",
            errno.EACCES: "is not allowed; choose one above 1023 with --port",
        }.get(error.errno or 0, f"cannot be listened at: {error.strerror}")
        raise UserError(f"port {port} of {host} {why}") from None
    return listener


def _leave(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
