"""The CSV of figures: one row a cell and metric."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from drama.bench.rows import device_name
from drama.data.manifest import read_manifest
from drama.evidence.nodes import RECORD, Cell, Node
from drama.files import replacing
from drama.prune.output import REPORT_NAME

HEADLINE = "nDCG@10"
LEFT_OUT = "left out"  # records of the training's shards that stand in a test set


@dataclass(frozen=True)
class Row:
    """A figure. low and high: its 95 % interval over queries, where one evaluation gives it."""

    scale: str
    experiment: str
    variant: str
    seed: int
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    examples: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    commit: str = ""
    device: str = ""

    @property
    def cell(self) -> tuple[str, str, str, int]:
        return self.scale, self.experiment, self.variant, self.seed


def read_rows(path: Path) -> list[Row]:
    """All rows of the file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{f.name: _read(f.type, row[f.name]) for f in fields(Row)})
                for row in csv.DictReader(file)]  # fmt: skip


def write_rows(path: Path, work: Path, cell: Cell, scale: str) -> None:
    """Put the figures of a cell that ended into the file, in the place of its older ones."""
    new = list(rows_of(cell, work, scale))
    cells = {row.cell for row in new}
    rows = [row for row in read_rows(path) if row.cell not in cells] + new
    rows.sort(key=lambda row: (row.cell, row.metric))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _written(value) for name, value in asdict(row).items()})


def without_rows(path: Path, cells: Sequence[Cell], scale: str) -> list[Cell]:
    """The cells of which the file has no figures, or not those of all their systems."""
    written = {row.cell for row in read_rows(path)}
    return [
        cell for cell in cells
        if not written.issuperset((scale, cell.experiment, v, cell.seed) for v in cell.variants)
    ]  # fmt: skip


def rows_of(cell: Cell, work: Path, scale: str) -> Iterable[Row]:
    """nDCG@10 of every set and of every group of sets; what the decontamination left out of the
    training, and the perplexity, where there are such."""
    folder = work / cell.evaluation.folder
    found = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    sets = {name: result["systems"] for name, result in found["datasets"].items()}
    sets |= {f"mean {name}": systems for name, systems in found["groups"].items()}
    counted = _training_facts(cell, work)
    for variant, system in zip(cell.variants, cell.systems, strict=True):
        common: dict[str, Any] = {
            "scale": scale, "experiment": cell.experiment, "variant": variant, "seed": cell.seed,
        }  # fmt: skip
        own = counted if system == "model" else _facts(folder)
        for name, systems in sets.items():
            low, high = systems[system]["intervals"][HEADLINE]
            value = systems[system]["metrics"][HEADLINE]
            yield Row(**common, metric=f"{HEADLINE} {name}", value=value, low=low, high=high, **own)
        if cell.perplexity is not None:
            node, side = cell.perplexity
            path = work / node.folder / "run" / "model" / REPORT_NAME
            recovery = json.loads(path.read_text(encoding="utf-8"))["recoveries"][-1]
            losses = recovery[side]
            # before the first step the student stands beside its parent, where there is one
            perplexity = math.exp(losses.get("student", losses)["loss"])
            yield Row(**common, metric="perplexity", value=perplexity, **own)
        if cell.training is not None and system == "model":
            yield Row(**common, metric=LEFT_OUT, value=_left_out(cell.training, work), **own)


def _left_out(training: Node, work: Path) -> int:
    folders = [work / node.folder / "shards" for node in training.needs]
    manifests = [read_manifest(folder) for folder in folders if folder.is_dir()]
    reasons = Counter[str]()
    for manifest in manifests:
        reasons.update(manifest.left_out)
    return sum(count for reason, count in reasons.items() if reason.startswith("in "))


def _training_facts(cell: Cell, work: Path) -> dict[str, Any]:
    """Examples, tokens and minutes of the training; of the evaluation where there is none."""
    if cell.training is None:
        return _facts(work / cell.evaluation.folder)
    folder = work / cell.training.folder
    with (folder / "run" / "metrics.jsonl").open(encoding="utf-8") as file:
        tokens = sum(json.loads(line).get("tokens", 0) for line in file)
    return {**_facts(folder), "examples": cell.training.facts["examples"], "tokens": int(tokens)}


def _facts(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "minutes": record["minutes"],
        "commit": record["commit"],
        "device": record.get("device") or device_name(here),  # older records do not have it
    }


def _read(kind: Any, text: str) -> Any:
    if "str" in str(kind):
        return text
    if not text:
        return None
    return int(text) if str(kind).startswith("int") else float(text)


def _written(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else value
