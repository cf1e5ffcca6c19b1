"""What a run folder says about the model that came of it, for the model card.

Reads recipe.yaml, metrics.jsonl and the manifests of the shards; whatever is gone is left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drama.data.manifest import read_manifest
from drama.errors import UserError
from drama.recipe import Recipe


@dataclass(frozen=True)
class RunFacts:
    """The part of a run that ends with the model.

    recipe: the text of recipe.yaml. steps, tokens, pairs: of the training up to the model; seconds:
    the sum of its steps. loss: the mean over its last tenth of steps, at most 100. evaluation: what
    the run's own validation said of this step, by name. shards: names of the folders. sources,
    languages: records by name, of the folders that are still there. parent: from the backbone's
    pruning.json.
    """

    name: str
    recipe: str
    steps: int = 0
    tokens: int = 0
    pairs: int = 0
    seconds: float = 0.0
    loss: float | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    shards: tuple[str, ...] = ()
    sources: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    backbone: str = ""
    parent: dict[str, Any] = field(default_factory=dict)


def run_facts(run: Path, step: int | None = None) -> RunFacts | None:
    """The facts of a run up to `step`, by default all of it; None where it has no recipe of a
    retriever."""
    path = run / "recipe.yaml"
    try:
        recipe = Recipe.load(path)
    except UserError:
        return None
    lines = [line for line in _lines(run / "metrics.jsonl") if step is None or line["step"] < step]
    last = lines[-min(100, max(1, len(lines) // 10)) :]
    sources, languages = _records(recipe.data.shards)
    return RunFacts(
        name=recipe.name,
        recipe=path.read_text(encoding="utf-8"),
        steps=len(lines),
        tokens=int(sum(line["tokens"] for line in lines)),
        pairs=int(sum(line["pairs"] for line in lines)),
        seconds=sum(line["seconds"] for line in lines),
        loss=sum(line["loss"] for line in last) / len(last) if last else None,
        evaluation=lines[-1].get("evaluation") or {} if lines else {},
        shards=tuple(str(folder).rstrip("/").rpartition("/")[2] for folder in recipe.data.shards),
        sources=sources,
        languages=languages,
        backbone=recipe.model.path.resolve().name,
        parent=_parent(recipe.model.path),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The steps of metrics.jsonl that are whole."""
    found = []
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.splitlines():
        try:
            values = json.loads(line)
            needed = {name: float(values[name]) for name in ("step", "tokens", "pairs", "loss")}
        except (ValueError, TypeError, KeyError):  # cut short by a kill, or another kind of run's
            continue
        seconds = float(values.get("seconds", 0.0))
        found.append({"evaluation": values.get("evaluation"), "seconds": seconds, **needed})
    return found


def _records(folders: Iterable[Path | str]) -> tuple[dict[str, int], dict[str, int]]:
    sources: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    for folder in folders:
        if isinstance(folder, Path):
            try:
                manifest = read_manifest(folder)
            except (UserError, OSError):
                continue
            sources.update(manifest.counts("source"))
            languages.update(manifest.counts("lang"))
    return dict(sources.most_common()), dict(languages.most_common())


def _parent(backbone: Path) -> dict[str, Any]:
    try:
        facts = json.loads((backbone / "pruning.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
