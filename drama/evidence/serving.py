"""Run a command beside a language model's server.

    python -m drama.evidence.serving LLM --out FOLDER -- drama augment queries ... \
        --model {model} --base-url {url}

LLM is what `drama prune` takes; it is written to FOLDER/llm as an ordinary folder, `transformers
serve` opens it on a free port of this machine, and the command runs with {model} and {url} filled
in. The server ends with the command.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from drama.errors import UserError, exit_on_user_error
from drama.files import replacing_folder

PATIENCE = 300  # seconds for a server to come up


@contextmanager
def serving(model: Path, log: Path) -> Iterator[str]:
    """`transformers serve` with one model, on the GPU where there is one; yields its address.

    Raises:
        UserError: it ended, or did not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "transformers"
    command = [str(program), "serve", str(model), "--port", str(port), "--continuous-batching"]
    if not _has_gpu():
        command += ["--device", "cpu", "--cb-num-blocks", "512", "--cb-block-size", "32"]
        command += ["--cb-max-batch-tokens", "2048"]
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        try:
            _wait(process, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait(30)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    last = time.monotonic() + PATIENCE
    while time.monotonic() < last:
        if process.poll() is not None:
            raise UserError(f"the server ended with exit code {process.returncode}; see {log}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except urllib.error.HTTPError:  # it answers, whatever it says
            return
        except OSError:
            time.sleep(1)
    raise UserError(f"the server did not answer within {PATIENCE} seconds; see {log}")


def unpack(llm: Path, folder: Path) -> Path:
    """The model as an ordinary folder, which a server wants; done once."""
    if not (folder / "config.json").is_file():
        from drama.prune.source import load_llm

        with replacing_folder(folder) as temporary:
            for part in load_llm(llm):
                part.save_pretrained(temporary)
    return folder


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@click.command()
@click.argument("llm", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.argument("command", nargs=-1, required=True)
def main(llm: Path, out: Path, command: Sequence[str]) -> None:
    """Run COMMAND while LLM is served."""
    with exit_on_user_error("serving"):
        model = unpack(llm, out / "llm")
        with serving(model.resolve(), out / "server.txt") as url:
            words = [w.replace("{model}", str(model.resolve())).replace("{url}", url)
                     for w in command]  # fmt: skip
            if words[0] == "drama":
                words[:1] = [sys.executable, "-m", "drama.cli"]
            code = subprocess.run(words, check=False).returncode
    sys.exit(code)


if __name__ == "__main__":
    main()
