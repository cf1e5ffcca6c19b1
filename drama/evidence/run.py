"""Run the cells of a plan: most valuable first, as long as the budget allows, resumable."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from drama.bench.rows import commit, device_name
from drama.console import console
from drama.demo import ON_GPU, ROOT
from drama.errors import UserError
from drama.evidence.nodes import RECORD, Cell, Node, minutes_left
from drama.evidence.rows import write_rows
from drama.files import locked, replacing


def run_cells(
    cells: Sequence[Cell], work: Path, csv: Path, *, scale: str, budget_hours: float | None = None
) -> list[str]:
    """Run what is not done, in the order of the cells; return the names of cells that failed.

    A node that ended is recorded in its folder; the commands of one that was stopped run again, and
    each of them goes on where it was. A failed node costs the cells that need it; the others go on.
    Before a cell begins, its minutes are estimated from those that the nodes of this work folder
    took; where they do not fit into what is left of the budget, the run ends.

    Raises:
        UserError: another run is in the work folder.
    """
    work.mkdir(parents=True, exist_ok=True)
    began, failed_nodes = time.monotonic(), set[str]()
    failed: list[str] = []
    every_node = list(dict.fromkeys(node for cell in cells for node in cell.nodes()))
    with locked(work / "lock"):
        for number, cell in enumerate(cells, 1):
            nodes = cell.nodes()
            if budget_hours is not None:
                left = max(budget_hours * 60 - (time.monotonic() - began) / 60, 0.0)
                needed = minutes_left(nodes, work) * pace(every_node, work)
                if needed > left:
                    _say(f"budget: {cell.name} needs {needed:.0f} minutes, {left:.0f} are left")
                    break
            console.rule(f"[bold]{number}/{len(cells)}[/] {cell.name}", align="left")
            for node in nodes:
                missing = not {need.folder for need in node.needs}.isdisjoint(failed_nodes)
                again = missing or node.folder in failed_nodes
                if not node.is_done(work) and (again or not _run(node, work)):
                    failed_nodes.add(node.folder)
            if any(node.folder in failed_nodes for node in nodes):
                failed.append(cell.name)
            else:
                write_rows(csv, work, cell, scale)
    return failed


def listed(cells: Sequence[Cell], work: Path) -> Table:
    """Every node in the order of the run, with what it costs and what is done."""
    table = Table(title=f"{len(cells)} cells")
    for heading in ("node", "for", "minutes", "all so far"):
        table.add_column(heading, justify="right" if "m" in heading or "all" in heading else "left")
    seen, total = set[str](), 0.0
    for cell in cells:
        for node in cell.nodes():
            if node.folder not in seen:
                seen.add(node.folder)
                total += node.minutes
                done = taken(node, work)
                minutes = f"{node.minutes:.1f}" + (f" ({done:.1f} taken)" if done else "")
                table.add_row(node.folder, cell.name, minutes, f"{total:.0f}")
    return table


def pace(nodes: Sequence[Node], work: Path) -> float:
    """Minutes taken over minutes estimated, of the nodes that ran through; 1 before the first."""
    done = [(node.minutes, minutes) for node in nodes if (minutes := taken(node, work))]
    estimated = sum(estimate for estimate, _ in done)
    return sum(minutes for _, minutes in done) / estimated if estimated else 1.0


def taken(node: Node, work: Path) -> float | None:
    """Minutes that the node took; None if it is not done, or was stopped and went on."""
    path = work / node.folder / RECORD
    if not path.is_file():
        return None
    minutes: float | None = json.loads(path.read_text(encoding="utf-8"))["minutes"]
    return minutes


def _run(node: Node, work: Path) -> bool:
    """Run the commands of a node; whether all of them ended well."""
    folder = work / node.folder
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    went_on = log.exists()
    _say(f"{node.folder}: about {node.minutes:.1f} minutes")
    start = time.perf_counter()
    for line in node.lines():
        command = [str(ROOT / w[7:]) if w.startswith("{root}/") else w for w in line]
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            code = subprocess.run(
                [*_program(command[0]), *command[1:]],
                cwd=work, env=_environment(), stdout=file, stderr=file, check=False,
            ).returncode  # fmt: skip
        if code:
            text = log.read_text(encoding="utf-8", errors="replace").strip()
            _say(f"  ended with exit code {code}: {text.splitlines()[-1]}")
            _say(f"  the whole of it: {log}")
            return False
    minutes = None if went_on else (time.perf_counter() - start) / 60
    device = device_name(torch.device("cuda" if ON_GPU else "cpu"))
    record = {
        "commands": node.lines(), "minutes": minutes, "commit": commit(), "device": device,
    }  # fmt: skip
    with replacing(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return True


def _program(name: str) -> list[str]:
    """The interpreter that runs us and what is installed beside it, whatever PATH says."""
    if name == "python":
        return [sys.executable]
    if name == "drama":
        return [sys.executable, "-m", "drama.cli"]
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise UserError(f"{name} is not installed beside {sys.executable}")
    return [found]


def _environment() -> dict[str, str]:
    """The checkout on the path, since the commands run in the work folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    if not ON_GPU:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
