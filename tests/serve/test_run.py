"""`drama serve` starts, says where, and ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from drama.cli import main
from drama.retrieve.models import open_model
from tests.serve.conftest import World, end, start


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["serve", *arguments])
    assert done.exit_code == 2, done.output
    return done.stderr.splitlines()[-1]


def embed(address: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/embed", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        value: dict[str, Any] = json.load(answer)
    return value


def test_a_port_in_use(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused("--index", str(world.index), "--port", str(port))
    assert line == (f"drama: error: port {port} of 127.0.0.1 is in use; choose another with --port")


def test_what_is_refused_before_it_serves(world: World, tmp_path: Path) -> None:
    free = ("--port", "0")
    assert "name a model with --model, or an index with --index" in refused(*free)
    assert "not a model folder" in refused("--model", str(tmp_path), *free)
    assert "dim 65 does not fit" in refused("--model", str(world.model), "--dim", "65", *free)
    assert "no address of this machine" in refused("--host", "no.invalid", *free)


def test_the_end_while_a_request_runs(world: World) -> None:
    """What runs is answered. The model alone is served, to every machine, with a warning."""
    process, ready, said = start("--model", str(world.model), "--dim", "16", "--host", "0.0.0.0")
    assert "0.0.0.0 can be reached from elsewhere" in said
    address = ready.replace("0.0.0.0", "127.0.0.1")
    named = urllib.request.Request(f"{address}/health", headers={"Host": "box"})
    with urllib.request.urlopen(named) as answer:
        assert json.load(answer)["status"] == "ok"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{address}/search?q=a")

    answers: list[dict[str, Any]] = []
    texts = ["word " * 100] * 64
    asking = threading.Thread(target=lambda: answers.append(embed(address, input=texts)))
    asking.start()
    while True:
        with urllib.request.urlopen(f"{address}/health") as answer:
            if json.load(answer)["pending"]:
                break
        assert asking.is_alive()
    assert end(process, signal.SIGTERM) == 0
    asking.join()
    want_BD = open_model(world.model).encode(texts[:1], "document", dim=16)
    np.testing.assert_allclose(answers[0]["data"][63]["embedding"], want_BD[0], atol=1e-6)


def test_a_signal_while_the_model_loads(world: World) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "drama.cli", "serve", "--model", str(world.model), "--port",
         str(port)], stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while True:  # it listens first
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
