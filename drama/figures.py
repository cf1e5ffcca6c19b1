"""Figures of a run and of an evaluation, drawn by matplotlib without a display.

Axes name their units, numbers carry thousands separators. Every function returns a
`matplotlib.figure.Figure`; `svg` writes one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, GREY, GRID = "#1f2933", "#66717d", "#e4e7eb"
COLOURS = ("#2f6db3", "#e08a2e", "#3a9a7b", "#8a63b8", "#c8553d", "#7b8794", "#b5a02c", "#4fb3d0")
SIZE, SMALL = (6.4, 3.2), (6.4, 2.4)  # inches
MAX_BARS, MIN_BARS, LABELLED_BARS = 60, 6, 12  # of a histogram: room for the least, however few
NO_METADATA = ("Date", "Creator", "Format", "Type")
MAX_POINTS = 1000  # a curve is averaged down to this many
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a name with a $ in it is a name
    "svg.fonttype": "none",  # text stays text: small files, the reader's own font
    "svg.hashsalt": "drama",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
}

Line = Mapping[str, Any]  # of metrics.jsonl
Results = Mapping[str, Any]  # of evaluation.json


@dataclass(frozen=True)
class Curve:
    """One figure over the steps: a field of metrics.jsonl times `scale`, in units of `label`."""

    field: str
    title: str
    label: str
    scale: float = 1.0
    noisy: bool = True  # drawn as a running mean once it is long
    format: str = ",.0f"


CURVES = (
    Curve("tokens_per_s", "Throughput", "tokens/s"),
    Curve("pairs_per_s", "Training pairs", "pairs/s"),
    Curve("mfu", "Model FLOPs utilisation", "% of peak", scale=100, format="g"),
    Curve("peak_mem_mib", "Peak memory", "GiB", scale=1 / 1024, noisy=False, format="g"),
    Curve("data_wait_s", "Waiting for data", "ms per step", scale=1000, format=",g"),
    Curve("lr", "Learning rate", "learning rate", noisy=False, format=".1e"),
    Curve("grad_norm", "Gradient norm before clipping", "norm", format=",g"),
    Curve("temperature", "Learned temperature", "temperature", noisy=False, format="g"),
    Curve("chunks_kept", "Chunks encoded once", "chunks per step", noisy=False),
)


def training_figures(lines: Sequence[Line]) -> list[Figure]:
    """The loss, what the model was judged by, then each of `CURVES` and the time of a step; fields
    that no line has, or that never change where change is the point, are left out."""
    with matplotlib.rc_context(STYLE):
        figures = [_loss(lines)] if _has(lines, "loss") else []
        judged = {name for line in lines for name in line.get("evaluation") or {}}
        ranked = {name for name in judged if name.startswith("ndcg@10")}
        for title, names in (
            ("nDCG@10 while training", sorted(ranked)),
            ("Held-out loss", sorted(judged - ranked - {"perplexity"})),
        ):
            figures += [_judged(lines, title, names)] if names else []
        wanted = [c for c in CURVES if _has(lines, c.field) and not _idle(lines, c.field)]
        figures += [_draw(lines, curve) for curve in wanted]
        return figures + ([_phases(lines)] if _has(lines, "seconds_by_phase") else [])


def evaluation_figures(results: Results) -> list[Figure]:
    """The metrics; of several datasets, then the headline metric for each of them."""
    several = len(results.get("datasets", ())) > 1
    return [evaluation_bars(results)] + ([evaluation_by_dataset(results)] if several else [])


def evaluation_bars(results: Results) -> Figure:
    """Grouped bars: a group a metric, a colour a system, the value above each bar, with whiskers
    over the interval where there is one."""
    systems: Mapping[str, Any] = results["systems"]
    metrics = list(next(iter(systems.values()))["metrics"])
    title = f"{results.get('dataset', '')} {results.get('split', '')}".strip() or "Evaluation"
    if "num_queries" in results:
        title += f", {results['num_queries']:,} queries"
    return bars(title, "score, 0 to 1", metrics, {
        name: [_point(system, metric) for metric in metrics] for name, system in systems.items()
    })  # fmt: skip


def evaluation_by_dataset(results: Results) -> Figure:
    """Grouped bars of the first metric: a group a dataset and one for the mean."""
    metric, datasets = results["metrics"][0], results["datasets"]
    groups = {found["group"] for found in datasets.values()}
    languages = [found["lang"] for found in datasets.values()]
    short = len(groups) == 1 and all(languages)
    title = f"{results['dataset']}, {metric}"
    return bars(title, metric, [*(languages if short else datasets), "mean"], {
        name: [_point(found["systems"][name], metric) for found in (*datasets.values(), results)]
        for name in results["systems"]
    })  # fmt: skip


def over_seeds(
    title: str,
    curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]],
    *,
    x_label: str,
    y_label: str,
    level: tuple[str, float] | None = None,
) -> Figure:
    """One line a system, the median of its runs, in the band from their lowest to their highest.

    curves: by system, of every run the points (x, y), as many in all runs of a system; x is their
    mean. level: name and height of a horizontal line.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(title, y_label, "g")
        for (name, runs), colour in zip(curves.items(), COLOURS, strict=False):
            x_RX, y_RX = np.moveaxis(np.array(runs, dtype=float), -1, 0)
            x = x_RX.mean(0)
            axes.fill_between(x, y_RX.min(0), y_RX.max(0), color=colour, alpha=0.2, linewidth=0)
            axes.plot(x, np.median(y_RX, 0), color=colour, linewidth=1.8, marker="o", ms=3.5,
                      label=name)  # fmt: skip
        if level is not None:
            axes.axhline(level[1], color=GREY, linewidth=1.2, linestyle="--", label=level[0])
        axes.set_xlabel(x_label)
        axes.legend(loc="upper right")
    return figure


def lengths_histogram(counts: Mapping[int, int], x_label: str, y_label: str) -> Figure:
    """Bars between powers of two, without a title. counts: by the upper end of a bar, which belongs
    to it; the bar that ends at 1 holds the zeros too."""
    low, high = (power(counts).bit_length() - 1 for power in (min, max))
    while high - low + 1 < MIN_BARS:  # a lone bar in the middle
        low, high = max(low - 1, 0), high + 1
    ends = [1 << n for n in range(low, high + 1)]
    with matplotlib.rc_context(STYLE):
        figure, axes = _small_axes(x_label, y_label)
        heights_N = np.array([counts.get(end, 0) for end in ends])
        _counted_bars(axes, np.arange(len(ends)) + 0.5, heights_N, 0.94)
        axes.set_xlim(-0.05, len(ends) + 0.05)
        axes.set_xticks(range(len(ends) + 1), [f"{end:,}" for end in (ends[0] // 2, *ends)])
    return figure


def numbers_histogram(
    counts: Mapping[int, int], x_label: str, y_label: str, beyond: tuple[str, int] | None = None
) -> Figure:
    """A bar for each whole number, without a title; neighbours share one where there are too many.

    beyond: name and count of a last bar, apart from the others.
    """
    low, high = min(counts), max(counts)
    size = math.ceil((high - low + 1) / MAX_BARS)
    heights_N = np.zeros((high - low) // size + 1, np.int64)
    for number, count in counts.items():
        heights_N[(number - low) // size] += count
    with matplotlib.rc_context(STYLE):
        label = x_label + (f", {size} a bar" if size > 1 else "")
        figure, axes = _small_axes(label, y_label)
        middles_N = low + size * np.arange(len(heights_N)) + (size - 1) / 2
        _counted_bars(axes, middles_N, heights_N, 0.88 * size)
        right = low + size * max(len(heights_N), MIN_BARS) - 0.5
        if beyond is not None:
            name, count = beyond
            axes.bar(right + size, count, 0.88 * size, color=COLOURS[4])
            right += 2 * size
            axes.text(right, count, f"{name} {count:,}", fontsize=9, color=INK, ha="right",
                      va="bottom")  # fmt: skip
            ticks = MaxNLocator(8, integer=True).tick_values(low, high)
            axes.set_xticks([tick for tick in ticks if low <= tick <= high])  # none under the last
        axes.set_xlim(low - 0.6 * size, right)
    return figure


def _small_axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    # constrained layout would draw everything twice, and the room for these labels is known
    figure, axes = _axes("", y_label, ",.0f", SMALL, None)
    figure.subplots_adjust(0.13, 0.21, 0.96, 0.98)
    axes.set_xlabel(x_label)
    axes.margins(y=0.15)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return figure, axes


def _counted_bars(axes: Axes, places_N: np.ndarray, heights_N: np.ndarray, width: float) -> None:
    bars = axes.bar(places_N, heights_N, width, color=COLOURS[0])
    if len(heights_N) <= LABELLED_BARS:
        labels = [f"{height:,}" if height else "" for height in heights_N.tolist()]
        axes.bar_label(bars, labels, padding=2, fontsize=9, color=INK)


def heat_map(
    title: str,
    x: Sequence[str],
    y: Sequence[str],
    values_YX: np.ndarray,
    *,
    x_label: str,
    y_label: str,
) -> Figure:
    """A field a value, 0 to 1, from light to dark, with the value in it; NaN leaves it empty."""
    inches = max(SIZE[0], 1.4 + 0.62 * len(x)), 1.3 + 0.4 * len(y)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(title, y_label, "g", inches)
        axes.imshow(values_YX, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
        axes.grid(visible=False)
        axes.set_xlabel(x_label)
        axes.set_xticks(range(len(x)), x)
        axes.set_yticks(range(len(y)), y)
        for (row, column), value in np.ndenumerate(values_YX):
            if np.isfinite(value):
                colour = "white" if value > 0.6 else INK
                axes.text(
                    column, row, f"{value:.2f}", color=colour, ha="center", va="center", size=9
                )
    return figure


def lines_under_each_other(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], *, marks: Sequence[float]
) -> Figure:
    """A panel a label over the same steps, each with its curves by name; marks: upright lines."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], 2.6 * len(panels)), layout="constrained")
        for axes, (label, curves) in zip(
            figure.subplots(len(panels), sharex=True), panels.items(), strict=True
        ):
            for place in marks:
                axes.axvline(place, color=GRID, linewidth=0.8)
            for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
                steps, values = np.array(points, dtype=float).T
                size = math.ceil(len(steps) / MAX_POINTS)
                axes.plot(_binned(steps, size), _binned(values, size), ".", ms=2, color=colour,
                          label=name)  # fmt: skip
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.legend(loc="lower left", ncols=2, markerscale=4)
        axes.set_xlabel("step")
    return figure


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(NO_METADATA))
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _point(system: Mapping[str, Any], metric: str) -> tuple[float, float, float]:
    """A value with its interval; without one, from itself to itself."""
    value = system["metrics"][metric]
    low, high = system.get("intervals", {}).get(metric, (value, value))
    return value, low, high


def bars(
    title: str,
    label: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float]]],
) -> Figure:
    """Bars from 0 to 1: value, low and high of each group, by name of the series.

    label: of the vertical axis.
    """
    width, narrow = 0.8 / len(series), len(groups) > 6
    inches = max(SIZE[0], 1.2 + (0.3 if narrow else 0.62) * len(groups) * len(series))
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(title, label, ".1f", (inches, 3.6))
        for number, (name, points) in enumerate(series.items()):
            places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
            value_G, low_G, high_G = np.array(points, dtype=float).T
            colour = COLOURS[number % len(COLOURS)]
            bars = axes.bar(places, value_G, width * 0.9, color=colour, label=name)
            if (low_G < high_G).any():
                reach = np.maximum(0, [value_G - low_G, high_G - value_G])
                axes.errorbar(places, value_G, reach, fmt="none", ecolor=GREY, elinewidth=1)
            if not narrow:
                tops = [f"{value:.3f}" for value in value_G]
                for bar, top, text in zip(bars, high_G, tops, strict=True):
                    axes.annotate(
                        text, (bar.get_x() + bar.get_width() / 2, top), (0, 3), ha="center",
                        textcoords="offset points", fontsize=8.5, color=INK,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                    )  # fmt: skip
        axes.set_xlabel("")
        long = max(map(len, groups)) > 4 and narrow
        axes.set_xticks(range(len(groups)), groups, color=INK,
                        rotation=30 if long else 0, ha="right" if long else "center")  # fmt: skip
        axes.tick_params(axis="x", length=0, pad=6)
        axes.set_ylim(0, 1.08)
        axes.set_yticks(np.linspace(0, 1, 6))
        figure.legend(loc="outside lower center", ncols=min(4, len(series)))
    return figure


def _loss(lines: Sequence[Line]) -> Figure:
    figure, axes = _axes("Training loss", "loss", "g")
    steps = _column([line["step"] for line in lines])
    losses = _column([line.get("loss") for line in lines])
    widths = sorted({w for line in lines for w in line.get("loss_by_prefix") or {}}, key=int)
    if len(widths) > 1:
        for width, colour in zip(widths, _ramp(len(widths)), strict=True):
            prefix = _column([(line.get("loss_by_prefix") or {}).get(width) for line in lines])
            _plot(axes, steps, prefix, colour, f"{int(width):,} dimensions", faint=False)
    _plot(axes, steps, losses, INK, "all, weighted" if len(widths) > 1 else "loss")
    if len(widths) > 1:
        axes.legend(ncols=2, loc="upper right")
    return figure


def _judged(lines: Sequence[Line], title: str, names: Sequence[str]) -> Figure:
    is_loss = title == "Held-out loss"
    figure, axes = _axes(title, "loss" if is_loss else "nDCG@10", "g")
    judged = [line for line in lines if line.get("evaluation")]
    steps = [line["step"] + 1 for line in judged]
    for number, name in enumerate(names):
        values = _column([line["evaluation"].get(name) for line in judged])
        label = name.removeprefix("ndcg@10 ").removeprefix("loss ")
        label = {"ndcg@10": "mean", "loss": "all"}.get(label, label)
        colour = INK if name in ("ndcg@10", "loss") else COLOURS[number % len(COLOURS)]
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", ms=3.5, label=label)
    if len(names) > 1:
        axes.legend(ncols=2, loc="upper right" if is_loss else "lower right")
    return figure


def _phases(lines: Sequence[Line]) -> Figure:
    """Where a step's time goes, phases on top of each other."""
    figure, axes = _axes("Time of a step", "seconds", "g")
    timed = [line for line in lines if line.get("seconds_by_phase")]
    names = list(timed[-1]["seconds_by_phase"])
    size = math.ceil(len(timed) / MAX_POINTS)
    steps = _binned(_column([line["step"] for line in timed]), size)
    layers = []
    for name in names:
        layer = _binned(_column([line["seconds_by_phase"].get(name, 0.0) for line in timed]), size)
        layers.append(_running_mean(layer, len(layer) // 50))
    axes.stackplot(steps, layers, labels=names, colors=COLOURS, linewidth=0)
    axes.legend(ncols=4, loc="lower right")
    return figure


def _idle(lines: Sequence[Line], field: str) -> bool:
    """A temperature that is not learned, graphs that are never kept: no curve."""
    values = {line.get(field) for line in lines}
    return field in ("temperature", "chunks_kept") and len(values) == 1


def _draw(lines: Sequence[Line], curve: Curve) -> Figure:
    figure, axes = _axes(curve.title, curve.label, curve.format)
    steps = _column([line["step"] for line in lines])
    values = _column([line.get(curve.field) for line in lines]) * curve.scale
    _plot(axes, steps, values, COLOURS[0], curve.title, noisy=curve.noisy)
    highest = float(values[np.isfinite(values)].max(initial=0))
    axes.set_ylim(0, highest * 1.1 or 1)
    return figure


def _axes(
    title: str,
    label: str,
    format: str,
    size: tuple[float, float] = SIZE,
    layout: Literal["constrained"] | None = "constrained",
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout=layout)
    axes = figure.add_subplot()
    axes.set_title(title, pad=10)
    axes.set_ylabel(label)
    axes.set_xlabel("step")
    axes.grid(axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:{format}}" if y else "0"))
    return figure, axes


def _plot(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colour: Any,
    label: str,
    *,
    noisy: bool = True,
    faint: bool = True,
) -> None:
    """Draw a curve; a long noisy one as its running mean, over the faint steps if `faint`."""
    size = math.ceil(len(steps) / MAX_POINTS)
    steps, values = _binned(steps, size), _binned(values, size)
    reach = len(values) // 50
    if noisy and reach:
        if faint:
            axes.plot(steps, values, color=to_rgba(colour, 0.25), linewidth=0.8)
        values = _running_mean(values, reach)
    marker = "o" if len(values) == 1 else ""
    axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, label=label)


def _has(lines: Sequence[Line], field: str) -> bool:
    return any(line.get(field) is not None for line in lines)


def _column(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _binned(values: np.ndarray, size: int) -> np.ndarray:
    """Means of `size` neighbours; the last bin may be shorter."""
    starts = np.arange(0, len(values), size)
    return np.add.reduceat(values, starts) / np.diff([*starts, len(values)])


def _running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and its `reach` neighbours on both sides, as far as there are any.

    Values that are not finite are skipped.
    """
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    first, end = np.maximum(0, places - reach), np.minimum(len(values), places + reach + 1)
    num = count[end] - count[first]
    return np.where(num > 0, (total[end] - total[first]) / np.maximum(num, 1), math.nan)


def _ramp(num: int) -> list[Any]:
    """Light to dark, for widths in ascending order."""
    return [matplotlib.colormaps["YlGnBu"](x) for x in np.linspace(0.35, 0.85, num)]
