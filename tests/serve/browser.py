"""A real Chromium without a window, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_S = 60.0


def executable() -> str | None:
    """The path of a Chromium, where one is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab; an asynchronous context manager.

    problems: errors and warnings of the console, and uncaught exceptions. requests: addresses of
    all that the tab asked for.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def __aenter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [
                executable() or NAMES[0], "--headless=new", "--no-sandbox", "--disable-gpu",
                "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-port=0",
                "--disable-background-networking", f"--user-data-dir={self._folder.name}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port = (await self._until(Path(self._folder.name) / "DevToolsActivePort")).split()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (tab,) = [tab for tab in await answer.json() if tab["type"] == "page"]
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
        self._reader = asyncio.create_task(self._read())
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        await self._session.close()
        self._process.terminate()
        await asyncio.to_thread(self._process.wait)
        self._folder.cleanup()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = len(self._answers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        answer = await asyncio.wait_for(self._answers[number], WAIT_S)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def wait_for(self, script: str) -> Any:
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + WAIT_S
        while not (value := await self.evaluate(script)):
            assert time.monotonic() < deadline, f"never true: {script}; {self.problems}"
            await asyncio.sleep(0.05)
        return value

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        code = {"Enter": 13, "ArrowLeft": 37, "ArrowRight": 39}[key]
        event = {"key": key, "windowsVirtualKeyCode": code}
        down = event | ({"text": "\r"} if key == "Enter" else {})
        await self.call("Input.dispatchKeyEvent", type="keyDown", **down)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    async def _read(self) -> None:
        async for message in self._socket:
            value = json.loads(message.data)
            event = value.get("params", {})
            if "id" in value:
                self._answers[value["id"]].set_result(value)
            elif value["method"] == "Network.requestWillBeSent":
                self.requests.append(event["request"]["url"])
            elif value["method"] == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(event["exceptionDetails"]))
            elif value["method"] == "Log.entryAdded":
                self.problems.append(event["entry"]["text"])
            elif value["method"] == "Runtime.consoleAPICalled":
                self.problems.append(json.dumps(event["args"]))

    async def _until(self, path: Path) -> str:
        deadline = time.monotonic() + WAIT_S
        while not (path.is_file() and (text := path.read_text())):
            assert time.monotonic() < deadline, "Chromium does not start"
            await asyncio.sleep(0.05)
        return text
