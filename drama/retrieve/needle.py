"""Needle and passkey retrieval: does a vector of a long text hold one sentence of it?

For each length and depth as many texts as there are needles, equal but for the needle; each query
must find its own. OUT/needle.json grows by one cell at a time, so a killed run goes on;
OUT/needle.md is the table, OUT/needle.svg the heat map.

Q queries, N documents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from drama.console import console, progress
from drama.errors import UserError, nearest
from drama.figures import heat_map, svg
from drama.files import replacing
from drama.retrieve.haystack import (
    KINDS,
    NeedleKind,
    beginning_at_random,
    draw_needles,
    make_haystacks,
    read_text,
)
from drama.retrieve.models import Model, Precision, open_model
from drama.retrieve.vectors import read_json

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DEPTHS = (0, 25, 50, 75, 100)
FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """One length and depth (%). tokens: of the shortest and the longest of its texts."""

    length: int
    depth: int
    accuracy: float
    mrr: float
    tokens: tuple[int, int]


@dataclass
class NeedleResults:
    """All cells; `about` is what they are a function of, besides their length and depth."""

    about: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return sorted({cell.length for cell in self.cells})

    @property
    def depths(self) -> list[int]:
        return sorted({cell.depth for cell in self.cells})

    @property
    def chance(self) -> tuple[float, float]:
        """Accuracy and MRR of an order drawn at random."""
        number = self.about["documents"]
        return 1 / number, sum(1 / rank for rank in range(1, number + 1)) / number

    def at(self, length: int) -> list[Cell]:
        """The cells of a length, by depth."""
        return sorted((c for c in self.cells if c.length == length), key=lambda c: c.depth)

    def table(self) -> Table:
        """Accuracy by length and depth, and the means of a length."""
        header, *rows = self._rows()
        table = Table(*header, title=self._title())
        for column in table.columns:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The same table in Markdown."""
        header, *rows = self._rows()
        lines = [header, ["---:"] * len(header), *rows]
        accuracy, mrr = self.chance
        return (
            "\n".join(f"| {' | '.join(line)} |" for line in lines)
            + f"\n\n{self._title()}. Accuracy@1 by depth of the needle; by chance {accuracy:.3f}, "
            f"MRR {mrr:.3f}. The model cuts at {self.about['max_tokens']:,} tokens.\n"
        )

    def to_json(self) -> str:
        accuracy, mrr = self.chance
        chance = {"accuracy": accuracy, "mrr": mrr}
        cells = [dataclasses.asdict(cell) for cell in self.cells]
        return json.dumps({"about": self.about, "chance": chance, "cells": cells}, indent=1) + "\n"

    def figure(self) -> str:
        """The heat map, SVG."""
        by_place = {(cell.depth, cell.length): cell.accuracy for cell in self.cells}
        values = [[by_place.get((d, n), np.nan) for n in self.lengths] for d in self.depths]
        return svg(
            heat_map(
                f"{self._title()}: accuracy@1",
                [f"{length:,}" for length in self.lengths],
                [f"{depth} %" for depth in self.depths],
                np.array(values),
                x_label="tokens",
                y_label="depth",
            )
        )

    def _title(self) -> str:
        name = Path(self.about["model"]).name
        return f"{self.about['kind']}, {name}, {self.about['documents']:,} documents"

    def _rows(self) -> list[list[str]]:
        rows = [["tokens", *(f"{depth} %" for depth in self.depths), "all", "MRR"]]
        for length in self.lengths:
            cells = {cell.depth: cell for cell in self.at(length)}
            shown = [f"{cells[d].accuracy:.2f}" if d in cells else "" for d in self.depths]
            means = [
                fmean(c.accuracy for c in cells.values()),
                fmean(c.mrr for c in cells.values()),
            ]
            rows.append([f"{length:,}", *shown, *(f"{mean:.3f}" for mean in means)])
        return rows


def find_needles(
    model: str | Path | Model,
    texts: Sequence[str | Path],
    *,
    kind: NeedleKind = "needle",
    lengths: Sequence[int] = (),
    depths: Sequence[int] = DEPTHS,
    num_documents: int = 20,
    max_tokens: int | None = None,
    precision: Precision | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> NeedleResults:
    """Measure how well a model finds a sentence in long texts, by length and depth.

    Args:
        model: its folder, or one that is open.
        texts: files of any text, see `haystack.read_text`.
        lengths: tokens; default those of `LENGTHS` that the model takes. Longer texts are cut by
            the model, as in use.
        depths: in per cent, 0 begins the text with the needle, 100 ends it.
        num_documents: texts, and queries, of a cell.
        max_tokens: where the model cuts; default its own limit.
        out: folder for results; cells that it holds are not measured again.

    Raises:
        UserError: bad arguments, too little text, or `out` holds results of other inputs.
    """
    if kind not in KINDS:
        raise UserError(f"kind '{kind}' is none{nearest(kind, KINDS)}; there are needle, passkey")
    if wrong := [depth for depth in depths if not 0 <= depth <= 100]:
        raise UserError(f"depth {wrong[0]} is no share of a text; 0 to 100 (%) are")
    draw_needles(kind, num_documents, Random(seed))  # refuses before the model is loaded
    parts = read_text(texts)
    opened = model if isinstance(model, Model) else open_model(model, precision=precision)
    limit = opened.check_max_tokens(max_tokens)
    lengths = sorted(set(lengths)) or [n for n in LENGTHS if n <= limit] or [limit]
    there = opened.count_tokens("\n\n".join(parts))
    if there < lengths[-1]:
        raise UserError(
            f"{', '.join(map(str, texts))}: the text has {there:,} tokens, {lengths[-1]:,} are "
            "needed; give more --text, or shorter --lengths"
        )
    if lengths[-1] > limit:
        console.print(f"texts are cut at the model's {limit:,} tokens (--max-tokens)")
    about = {
        "format": FORMAT,
        "model": str(Path(opened.path).resolve()),
        "model_sha256": opened.sha256,
        "compute_dtype": opened.compute_dtype,
        "max_tokens": limit,
        "text_sha256": hashlib.sha256("\0".join(parts).encode()).hexdigest(),
        "kind": kind,
        "documents": num_documents,
        "seed": seed,
    }
    results = _opened(out, about)
    known = {(cell.length, cell.depth) for cell in results.cells}
    cells = [(n, d) for n in lengths for d in sorted(set(depths)) if (n, d) not in known]
    with progress() as bar:
        task = bar.add_task(kind, total=sum(n for n, _ in cells), note="")
        for length, depth in cells:
            cell = _measure(opened, parts, kind, length, depth, num_documents, limit, seed)
            results.cells = sorted([*results.cells, cell], key=lambda c: (c.length, c.depth))
            if out is not None:
                _write(out / "needle.json", results.to_json())
            note = f"{length:,} tokens, depth {depth} %: {cell.accuracy:.2f}"
            bar.update(task, advance=length, note=note)
    if out is not None:
        _write(out / "needle.md", results.markdown())
        _write(out / "needle.svg", results.figure())
    return results


def expected_ranks(scores_QN: np.ndarray) -> tuple[float, float]:
    """Mean accuracy@1 and reciprocal rank of document i for query i.

    Equal scores stand in any order: what counts is the mean over all of them.
    """
    own_Q1 = np.diag(scores_QN)[:, None]
    better_Q, equal_Q = (scores_QN > own_Q1).sum(1), (scores_QN == own_Q1).sum(1)
    accuracy_Q = np.where(better_Q == 0, 1 / equal_Q, 0.0)
    mrr = [
        float(np.mean(1 / np.arange(better + 1, better + equal + 1)))
        for better, equal in zip(better_Q, equal_Q, strict=True)
    ]
    return float(accuracy_Q.mean()), fmean(mrr)


def _measure(
    model: Model,
    parts: Sequence[str],
    kind: NeedleKind,
    length: int,
    depth: int,
    number: int,
    max_tokens: int,
    seed: int,
) -> Cell:
    random = Random(f"{seed} {kind} {length} {depth}")
    needles = draw_needles(kind, number, random)
    filler = beginning_at_random(parts, random)
    sentences = [needle.sentence for needle in needles]
    texts = make_haystacks(filler, sentences, length, depth / 100, model.count_tokens)
    d_ND = model.encode(texts, "document", max_tokens=max_tokens)
    q_QD = model.encode([needle.query for needle in needles], "query")
    if not (np.isfinite(d_ND).all() and np.isfinite(q_QD).all()):
        raise UserError(f"{model.path} gives a vector with NaN; the weights are broken")
    # row by row: in a matrix product equal texts get scores that differ in the last bits
    accuracy, mrr = expected_ranks(np.stack([(d_ND * q_D).sum(1) for q_D in q_QD]))
    counts = [model.count_tokens(text) for text in texts]
    return Cell(length, depth, accuracy, mrr, (min(counts), max(counts)))


def _opened(out: Path | None, about: dict[str, Any]) -> NeedleResults:
    if out is None or not (out / "needle.json").is_file():
        return NeedleResults(about)
    path = out / "needle.json"
    stored = read_json(path)
    try:
        cells = [Cell(**cell | {"tokens": tuple(cell["tokens"])}) for cell in stored["cells"]]
        known = stored["about"]
    except (TypeError, KeyError):
        raise UserError(f"{path} is damaged; remove it and measure again") from None
    for name, value in about.items():
        if known.get(name) != value:
            raise UserError(
                f"{path} holds results of another {name} ({known.get(name)}, not {value}); "
                "give another --out, or remove it"
            )
    return NeedleResults(about, cells)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
