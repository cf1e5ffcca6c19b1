"""docs/evidence.md: tables and figures from the CSV, put into a page whose prose is hand-written.

The template (page.md beside this file) has lines such as `{{table pruned}}`, `{{differences
pruned}}` and `{{figure pruned}}`; no number is typed there. A cell without a row shows "not run".
"""

from __future__ import annotations

import fnmatch
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drama.errors import UserError
from drama.evidence.plan import RIVALS, make_plan
from drama.evidence.rows import HEADLINE, LEFT_OUT, Row, read_rows
from drama.evidence.scales import SCALES
from drama.figures import bars, svg
from drama.files import replacing

TEMPLATE = Path(__file__).with_name("page.md")
NOT_RUN = "not run"
_PLACE = re.compile(r"^\{\{(\w+)(?: (\w+))?\}\}$", re.MULTILINE)


@dataclass(frozen=True)
class Column:
    """The mean of all metrics of a cell that a pattern matches, or of their logarithms."""

    title: str
    patterns: tuple[str, ...]
    log: bool = False

    def of(self, metrics: dict[str, float]) -> float | None:
        found = [
            math.log(value) if self.log else value
            for name, value in metrics.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)
        ]
        return statistics.fmean(found) if found else None


def _sets(title: str, *names: str) -> Column:
    return Column(title, tuple(f"nDCG@10 {name}" for name in names))


SCIFACT, XQUAD = _sets("SciFact", "scifact"), _sets("XQuAD", "xquad-*")
COLUMNS: dict[str, tuple[Column, ...]] = {
    "pruned": (Column("ln perplexity", ("perplexity",), log=True), SCIFACT, XQUAD),
    "augment": (
        SCIFACT,
        _sets("XQuAD en", "xquad-en"),
        _sets("de es ru zh", *(f"xquad-{lang}" for lang in ("de", "es", "ru", "zh"))),
        _sets("ar hi tr vi", *(f"xquad-{lang}" for lang in ("ar", "hi", "tr", "vi"))),
        _sets("QMSum", "qmsum"),
        _sets("SQuALITY", "squality"),
    ),
    "batch": (SCIFACT, XQUAD),
    "shape": (SCIFACT, XQUAD),
    "nano": tuple(_sets(name, f"mean {name}") for name in
                  ("beir", "questions", "xquad", "long", "handbook")),
}  # fmt: skip
# what is compared: for each variant that the first pattern matches, with the second
PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "pruned": (
        *((f"{size} importance {kind}", f"{size} {other} {kind}")
          for size in ("small", "large") for kind in ("recovered", "cut")
          for other in ("scratch", "random", "first", "learned")),
        ("small importance recovered", "small importance cut"),
    ),
    "augment": (("+ *", "pairs"), ("all", "pairs")),
    "batch": (("[0-9]*", "64"), ("512, margin 0.1", "512"), ("1024, margin 0.1", "1024")),
    "shape": (("bidirectional, mean", "bidirectional, last"), ("bidirectional, mean", "causal, *"),
              ("Matryoshka at 64", "alone at 64"), ("Matryoshka at 64", "plain, cut at 64"),
              ("Matryoshka at 384", "bidirectional, mean")),
    "nano": (),
}  # fmt: skip
Cells = dict[str, dict[int, dict[str, float]]]  # by variant and seed, the metrics


def write_page(csv: Path, page: Path, scale: str) -> None:
    """Make the page and its figures from the rows of one scale.

    Raises:
        UserError: a template that names what there is not.
    """
    rows = [row for row in read_rows(csv) if row.scale == scale]
    figures = page.with_suffix("")

    def fill(place: re.Match[str]) -> str:
        kind, name = place[1], place[2] or ""
        if kind == "machine":
            return _machine(rows, scale)
        if kind == "left_out":
            return _left_out(rows)
        if name not in COLUMNS or kind not in ("table", "differences", "figure"):
            raise UserError(f"{TEMPLATE}: {place[0]} is no table, differences or figure of a known "
                            "experiment")  # fmt: skip
        cells, expected = cells_of(rows, name), variants_of(name, scale)
        if name == "nano":
            expected = [*_nano_models(rows, expected), *RIVALS]
        if kind == "table":
            if name == "nano":
                return _by_set(rows, expected)
            return table(cells, expected, COLUMNS[name])
        if kind == "differences":
            return differences(cells, PAIRS[name], expected, COLUMNS[name])
        return _figure(cells, expected, COLUMNS[name], name, figures)

    text = _PLACE.sub(fill, TEMPLATE.read_text(encoding="utf-8"))
    with replacing(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cells_of(rows: Sequence[Row], experiment: str) -> Cells:
    """The rows of an experiment by variant and seed."""
    cells: Cells = {}
    for row in rows:
        if row.experiment == experiment:
            seeds = cells.setdefault(row.variant, {})
            seeds.setdefault(row.seed, {})[row.metric] = row.value
    return cells


def variants_of(experiment: str, scale: str) -> list[str]:
    """What a whole run has, in the order of the plan."""
    plan = make_plan(SCALES[scale], None, Path("llm"), "teacher", [experiment])
    return list(dict.fromkeys(variant for cell in plan for variant in cell.variants))


def table(cells: Cells, variants: Sequence[str], columns: Sequence[Column]) -> str:
    """Mean and standard deviation over seeds; of one seed the figure alone."""
    lines = ["| | seeds | " + " | ".join(column.title for column in columns) + " |",
             "| --- | ---: |" + " ---: |" * len(columns)]  # fmt: skip
    for variant in variants:
        seeds = cells.get(variant, {})
        shown = [
            _mean([value for metrics in seeds.values()
                   if (value := column.of(metrics)) is not None])
            for column in columns
        ]  # fmt: skip
        lines.append(f"| {variant} | {len(seeds)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return NOT_RUN
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def differences(
    cells: Cells,
    pairs: Sequence[tuple[str, str]],
    variants: Sequence[str],
    columns: Sequence[Column],
) -> str:
    """First minus second over the seeds that both have, with the p of a paired t-test."""
    lines = ["| | minus | " + " | ".join(column.title for column in columns) + " |",
             "| --- | --- |" + " ---: |" * len(columns)]  # fmt: skip
    for first, second in _matching(pairs, variants):
        shown = [paired(cells.get(first, {}), cells.get(second, {}), column) for column in columns]
        lines.append(f"| {first} | {second} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _matching(pairs: Sequence[tuple[str, str]], variants: Sequence[str]) -> list[tuple[str, str]]:
    found = [
        (a, b)
        for first, second in pairs
        for a in variants
        for b in variants
        if a != b and fnmatch.fnmatchcase(a, first) and fnmatch.fnmatchcase(b, second)
    ]
    return list(dict.fromkeys(found))


def paired(
    first: dict[int, dict[str, float]], second: dict[int, dict[str, float]], column: Column
) -> str:
    """Mean of the differences seed by seed, and p where there are two seeds or more."""
    gaps = [
        a - b
        for seed in sorted(first.keys() & second.keys())
        if (a := column.of(first[seed])) is not None and (b := column.of(second[seed])) is not None
    ]
    if not gaps:
        return NOT_RUN
    shown = f"{statistics.fmean(gaps):+.3f}"
    p = p_of(gaps)
    return shown if p is None else f"{shown} (p {p:.3f})"


def p_of(gaps: Sequence[float]) -> float | None:
    """Two-sided p of Student's t-test that the mean is 0; None below two gaps, or if all are equal.

    By its series for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    if len(gaps) < 2 or (spread := statistics.stdev(gaps)) == 0:
        return None
    degrees = len(gaps) - 1
    t = abs(statistics.fmean(gaps)) * math.sqrt(len(gaps)) / spread
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 1 - inside


def _nano_models(rows: Sequence[Row], expected: Sequence[str]) -> list[str]:
    """drama-nano in the trainings that were run, the longest last; else the scale's own."""
    examples = {row.variant: row.examples or 0 for row in rows
                if row.experiment == "nano" and row.variant not in RIVALS}  # fmt: skip
    own = [variant for variant in expected if variant not in RIVALS]
    return sorted(examples, key=lambda variant: examples[variant]) or own


def _by_set(rows: Sequence[Row], systems: Sequence[str]) -> str:
    """One line a test set: every system with its interval over queries; then where the longest
    training is ahead of the rivals and where behind."""
    own = {(row.variant, row.metric): row for row in rows if row.experiment == "nano"}
    names = {"bm25": "BM25", "MiniLM": "all-MiniLM-L6-v2"} | {
        system: f"drama-nano, {system}" for system in systems if system not in RIVALS
    }
    model = next(system for system in reversed(systems) if system not in RIVALS)
    lines = ["| nDCG@10 | " + " | ".join(names[system] for system in systems) + " |",
             "| --- |" + " ---: |" * len(systems)]  # fmt: skip
    metrics = sorted({metric for _, metric in own if metric.startswith(HEADLINE)})
    for metric in metrics:
        shown = [
            f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
            if (row := own.get((system, metric))) else NOT_RUN
            for system in systems
        ]  # fmt: skip
        lines.append(f"| {metric.removeprefix(f'{HEADLINE} ')} | " + " | ".join(shown) + " |")
    if not metrics:
        lines.append("| all |" + f" {NOT_RUN} |" * len(systems))
        return "\n".join(lines)
    apart = [_apart(own, metrics, model, rival, names) for rival in RIVALS]
    return "\n".join([*lines, f"\n{_trainings(own, systems)}", *apart])


def _trainings(rows: dict[tuple[str, str], Row], systems: Sequence[str]) -> str:
    """Pairs, minutes and machine of every training of the model, named by steps and batch."""
    told = []
    for system in systems:
        row = next((row for (variant, _), row in rows.items() if variant == system), None)
        if row is not None and row.examples:
            minutes = "" if row.minutes is None else f"{row.minutes:.0f} minutes "
            told.append(f"{system}, {row.examples:,} pairs, {minutes}on {row.device}")
    return f"Trained, steps x pairs: {'; '.join(told) or NOT_RUN}."


def _apart(
    rows: dict[tuple[str, str], Row],
    metrics: Sequence[str],
    model: str,
    rival: str,
    names: dict[str, str],
) -> str:
    """Where the model and a rival differ by more than both intervals."""
    ahead, behind, unsure = list[str](), list[str](), list[str]()
    for metric in metrics:
        one, other = rows.get((model, metric)), rows.get((rival, metric))
        if one is None or other is None or " mean " in metric:
            continue
        assert one.low is not None
        assert one.high is not None
        assert other.low is not None
        assert other.high is not None
        apart = ahead if one.low > other.high else behind if one.high < other.low else unsure
        apart.append(metric.removeprefix(f"{HEADLINE} "))
    told = ", ".join(ahead) or "no set"
    return (
        f"\nThe longest training against {names[rival]}, intervals apart: ahead on {told};"
        f" behind on {len(behind)} sets; neither on {', '.join(unsure) or 'no set'}."
    )


def _figure(
    cells: Cells, variants: Sequence[str], columns: Sequence[Column], name: str, folder: Path
) -> str:
    """Bars of the variants that were run, from the lowest to the highest seed."""
    shown = [column for column in columns if not column.log]
    points = {
        variant: [[value for metrics in cells[variant].values()
                   if (value := column.of(metrics)) is not None] for column in shown]
        for variant in variants if variant in cells
    }  # fmt: skip
    shown_at = [i for i in range(len(shown)) if points and all(p[i] for p in points.values())]
    if not shown_at:
        return f"*Figure: {NOT_RUN}.*"
    series = {
        shown[i].title: [(statistics.fmean(p[i]), min(p[i]), max(p[i])) for p in points.values()]
        for i in shown_at
    }
    drawn = bars(f"{name}: mean, lowest and highest seed", "nDCG@10", list(points), series)
    with replacing(folder / f"{name}.svg") as temporary:
        temporary.write_text(svg(drawn), encoding="utf-8")
    return f"![{name}]({folder.name}/{name}.svg)"


def _left_out(rows: Sequence[Row]) -> str:
    """The most of every experiment's trainings, of those whose figures have a count."""
    found = [row for row in rows if row.metric == LEFT_OUT]
    counts = {name: [r.value for r in found if r.experiment == name] for name in COLUMNS}
    shown = [f"{name} {max(values):,.0f}" for name, values in counts.items() if values]
    return f"Records left out of a training: {', '.join(shown) or NOT_RUN}."


def _machine(rows: Sequence[Row], scale: str) -> str:
    if not rows:
        return f"*Scale `{scale}`: {NOT_RUN}.*"
    devices = ", ".join(sorted({row.device for row in rows}))
    commits = ", ".join(sorted({row.commit for row in rows}))
    cells = len({row.cell for row in rows})
    return f"Scale `{scale}`, {cells} cells, on {devices}; commit {commits}."
