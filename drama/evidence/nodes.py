"""A node of the graph: shipped commands that fill one folder, named by what they are.

A node's key is a hash over its commands and over the recipes that they read. The commands name the
folders of the nodes before them, whose names hold their keys, so a changed recipe gives new folders
to all that follows from it, and two cells that need the same backbone get the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from drama.demo import ROOT

RECORD = "node.json"  # written last: a folder with it is done
OUT = "{out}"  # in a command: the node's own folder


@dataclass(frozen=True)
class Node:
    """Commands that run in a row.

    Paths in them are relative to the work folder, where they run; `{out}` is this node's folder.
    minutes: as estimated for the scale. recipes: files whose content counts, relative to the
    checkout. facts: what the CSV says about it (examples, tokens).
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    minutes: float
    needs: tuple[Node, ...] = ()
    recipes: tuple[str, ...] = ()
    inputs: str = ""  # what else decides on the content: the fingerprint of the data
    facts: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @cached_property
    def key(self) -> str:
        """Ten hex digits."""
        contents = [(ROOT / path).read_text(encoding="utf-8") for path in self.recipes]
        content = json.dumps([self.name, self.commands, contents, self.inputs])
        return hashlib.sha256(content.encode()).hexdigest()[:10]

    @property
    def folder(self) -> str:
        """Relative to the work folder."""
        return f"{self.name}-{self.key}"

    def at(self, *parts: str) -> str:
        """A path inside the folder, as commands of later nodes name it."""
        return str(Path(self.folder, *parts))

    def lines(self) -> list[list[str]]:
        """The commands with the folder filled in."""
        return [[word.replace(OUT, self.folder) for word in command] for command in self.commands]

    def is_done(self, work: Path) -> bool:
        return (work / self.folder / RECORD).is_file()


@dataclass(frozen=True)
class Cell:
    """One figure's worth: a variant of an experiment with one seed.

    evaluation: the node whose OUT/evaluation holds evaluation.json. training: where examples,
    tokens and minutes are counted. perplexity: the node of a recovery and which side of it counts,
    "losses_before" or "losses_after". systems: of the evaluation; the first is the cell's own, the
    others stand beside it.
    """

    experiment: str
    variant: str
    seed: int
    evaluation: Node
    training: Node | None = None
    perplexity: tuple[Node, str] | None = None
    systems: tuple[str, ...] = ("model",)

    @property
    def name(self) -> str:
        return f"{self.experiment}/{self.variant}/{self.seed}"

    @property
    def variants(self) -> tuple[str, ...]:
        """Its names in the CSV: its own, and those of the systems beside it."""
        return self.variant, *self.systems[1:]

    def nodes(self) -> list[Node]:
        """All that it needs, in an order in which they can run."""
        ends = [self.evaluation, *([self.perplexity[0]] if self.perplexity else [])]
        return in_order(ends)


def in_order(ends: Iterable[Node]) -> list[Node]:
    """The nodes with all that they need, each once, needs first."""
    found: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.folder not in found:
            for needed in node.needs:
                visit(needed)
            found[node.folder] = node

    for end in ends:
        visit(end)
    return list(found.values())


def minutes_left(nodes: Sequence[Node], work: Path) -> float:
    """Estimated minutes of those that are not done."""
    return sum(node.minutes for node in nodes if not node.is_done(work))
