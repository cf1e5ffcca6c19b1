"""A small retriever, documents that mean harm, their index, and a server of them in a process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from drama.encoder import Encoder
from drama.export import export
from drama.folder import RetrieverSettings
from drama.retrieve.encode import encode_corpus
from drama.retrieve.index import build_index
from drama.testing import tiny_llama

SCRIPT = '<script>document.title = "owned"</script> bread'
DOCUMENTS = [
    ("b1", "Bread", "\U0001f35e\U0001f35e bread rises because yeast turns sugar into gas."),
    ("b2", "Honey bees", "A colony of bees stores honey."),
    ("b3", "", "The pull of the moon moves the oceans."),
    ("x1", SCRIPT, '<img src="http://192.0.2.1/x" onerror="alert(1)"> <b>bread</b>'),
    ("x2", "\u202edaerb\u202c", "bread \u202eto be read from the right\u202c \u05dc\u05d7\u05dd"),
    ("x3", "Long", "bread and more " * 70_000),
]


@dataclass(frozen=True)
class World:
    """Folders."""

    model: Path
    vectors: Path
    index: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("serve")
    llama = tiny_llama(folder / "llama", num_hidden_layers=1)
    settings = RetrieverSettings(pooling="mean", matryoshka_dims=(16, 64))
    export(Encoder.from_pretrained(llama, settings=settings), folder / "tiny")
    rows = [{"_id": id_, "title": a, "text": b} for id_, a, b in DOCUMENTS]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode_corpus(folder / "corpus.jsonl", folder / "tiny", folder / "vectors")
    build_index(folder / "vectors", folder / "index", "int8")
    return World(folder / "tiny", folder / "vectors", folder / "index")


def start(*arguments: str) -> tuple[subprocess.Popen[str], str, str]:
    """`drama serve` on a free port, its address once it is ready, and what it has said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "drama.cli", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if address := re.search(r"http://\S+:\d+", line):
            return process, address[0], said
    raise AssertionError(said)


def end(process: subprocess.Popen[Any], number: signal.Signals) -> int:
    """End a server by a signal; its exit code."""
    process.send_signal(number)
    try:
        return process.wait(60)
    finally:
        process.kill()


@pytest.fixture(scope="session")
def address(world: World) -> Iterator[str]:
    process, address, _ = start("--index", str(world.index))
    yield address
    assert end(process, signal.SIGINT) == 0
