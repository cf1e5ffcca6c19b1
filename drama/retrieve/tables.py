"""Tables of an evaluation, for the console and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from drama.retrieve.published import BESIDE, Published
from drama.retrieve.results import DatasetResult, Results, SystemResult

PUBLISHED = " ‡"
SURE = 0.05  # a corrected p value below it is marked
Row = tuple[str, ...]
Rows = list[Row]


def tables(results: Results) -> list[Table]:
    """For the console: of one dataset its figures and their intervals, of several the summary."""
    marks = ("[bold]", "[/bold]")
    if len(results.datasets) > 1:
        title = f"{results.dataset}: {results.metrics[0]}, {results.num_queries:,} queries"
        first = _rich(title, *_summary(results, *marks))
        return [first, _sure(results, *_means(results.systems, results, {}, *marks))]
    ((name, found),) = results.datasets.items()
    header, body = _dataset(results, found, *marks)
    figures = 2 + len(results.metrics)  # the columns that fit a terminal together
    first = _rich(_title(name, found), header[:figures], [row[:figures] for row in body])
    return [first, _sure(results, header, body)]


def _sure(results: Results, header: Row, body: Rows) -> Table:
    """Our systems' headline metric with its interval and its difference to the baseline."""
    rest = 2 + len(results.metrics)
    rows = [(row[0], row[2], *row[rest:]) for row in body if row[rest]]
    return _rich("how sure that is", (header[0], header[2], *header[rest:]), rows)


def markdown(results: Results) -> str:
    """The whole report: summary, a table a dataset, and how to read them."""
    metric = results.metrics[0]
    parts = [f"# {results.dataset}"]
    if len(results.datasets) > 1:
        parts += [f"{metric}, {results.num_queries:,} queries in all.",
                  _table(*_summary(results, "**", "**"))]  # fmt: skip
        means = _means(results.systems, results, results.published, "**", "**")
        parts += [f"## Mean over {len(results.datasets)} datasets", _table(*means)]
    for name, found in results.datasets.items():
        parts += [f"## {_title(name, found)}", _table(*_dataset(results, found, "**", "**")),
                  _note(found)]  # fmt: skip
    parts.append(_method(results))
    return "\n\n".join(parts) + "\n"


def _title(name: str, found: DatasetResult) -> str:
    return f"{name} {found.split}: {found.num_queries:,} queries, {found.num_documents:,} documents"


def _note(found: DatasetResult) -> str:
    note = f"{found.num_judgements:,} judgements"
    if found.num_unknown_documents:
        note += f" ({found.num_unknown_documents:,} of documents that the corpus lacks)"
    return note + "."


def _dataset(results: Results, found: DatasetResult, left: str, right: str) -> tuple[Row, Rows]:
    return _means(found.systems, results, found.published, left, right)


def _means(
    systems: Mapping[str, SystemResult], results: Results, published: Published, left: str,
    right: str,
) -> tuple[Row, Rows]:  # fmt: skip
    """A row a system, then what is published; header and body."""
    metrics, headline = results.metrics, results.metrics[0]
    compared = any(system.against for system in systems.values())
    header = ("system", "dim", *metrics, f"{results.level:.0%} interval")
    if compared:
        header += (f"minus {results.baseline}", "p, Holm")
    best = {m: max(system.metrics[m] for system in systems.values()) for m in metrics}
    body: Rows = []
    for name, system in systems.items():
        values = [
            f"{left}{value:.4f}{right}" if value == best[m] and len(systems) > 1 else f"{value:.4f}"
            for m, value in system.metrics.items()
        ]
        low, high = system.intervals[headline]
        row = (name, f"{system.dim:,}" if system.dim else "", *values, f"{low:.3f} to {high:.3f}")
        if compared:
            row += _against(system, headline)
        body.append(row)
    for other in _beside(published, headline, systems):
        figures = [_known(published, metric, other) for metric in metrics]
        row = (f"{other}{PUBLISHED}", "", *figures, "")
        body.append(row + (("", "") if compared else ()))
    return header, body


def _against(system: SystemResult, metric: str) -> tuple[str, str]:
    if not system.against:
        return "", ""
    c = system.against[metric]
    return f"{c.difference:+.4f} ({c.low:+.3f} to {c.high:+.3f})", f"{c.p_holm:.4f}"


def _summary(results: Results, left: str, right: str) -> tuple[Row, Rows]:
    """A row a dataset, a column a system and published system, the headline metric."""
    headline, names = results.metrics[0], list(results.systems)
    beside: list[str] = []
    for figures in (*(found.published for found in results.datasets.values()), results.published):
        beside += [o for o in _beside(figures, headline, results.systems) if o not in beside]
    header = ("dataset", "queries", *names, *(f"{other}{PUBLISHED}" for other in beside))

    def row(
        title: str, queries: str, systems: Mapping[str, SystemResult], published: Published
    ) -> tuple[str, ...]:
        best = max(system.metrics[headline] for system in systems.values())
        cells = []
        for system in systems.values():
            value = system.metrics[headline]
            cell = f"{value:.4f}"
            if value == best and len(systems) > 1:
                cell = f"{left}{cell}{right}"
            sure = system.against and system.against[headline].p_holm < SURE
            cells.append(cell + (" †" if sure else ""))
        return title, queries, *cells, *(_known(published, headline, o) for o in beside)

    body = [
        row(name, f"{found.num_queries:,}", found.systems, found.published)
        for name, found in results.datasets.items()
    ]
    body += [row(f"mean, {group}", "", systems, {}) for group, systems in results.groups.items()]
    body.append(row("mean", f"{results.num_queries:,}", results.systems, results.published))
    spans = [f"{low:.3f} to {high:.3f}" for low, high in
             (system.intervals[headline] for system in results.systems.values())]  # fmt: skip
    body.append((f"{results.level:.0%} interval", "", *spans, *("" for _ in beside)))
    return header, body


def _beside(published: Published, metric: str, ours: Mapping[str, object]) -> list[str]:
    """The published systems to show: the paper's, and those that ours are named after."""
    own = {name.lower() for name in ours}
    return [
        system for system in published.get(metric, {})
        if system in BESIDE or (system.lower() in own and system.lower() != "bm25")
    ]  # fmt: skip


def _known(published: Published, metric: str, system: str) -> str:
    value = published.get(metric, {}).get(system)
    return "" if value is None else f"{value:.3f}"


def _method(results: Results) -> str:
    headline, across = results.metrics[0], len(results.datasets) > 1
    text = (
        f"Rankings cut at {results.depth:,}. A judged query without results scores 0. Intervals "
        f"of {headline}: BCa bootstrap over queries, {results.draws:,} draws"
    )
    text += ", for means inside each dataset." if across else "."
    if results.baseline and len(results.systems) > 1:
        text += (
            f" Differences of {headline} to {results.baseline}: their intervals, and p of the "
            "paired randomisation test, corrected by Holm over all datasets and systems"
        )
        text += f"; † is p < {SURE}." if across else "."
    shown = [results.published, *(found.published for found in results.datasets.values())]
    if any(shown):
        text += f"{PUBLISHED} published: docs/results/published.csv, with their sources."
    return text


def _table(header: Row, body: Rows) -> str:
    rows = [header, ("---", *["---:"] * (len(header) - 1)), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rich(title: str, header: Row, body: Rows) -> Table:
    shown = any(cell.endswith(PUBLISHED) for cell in (*header, *(row[0] for row in body)))
    caption = "‡ published" if shown else None
    table = Table(*header, title=title, caption=caption, caption_justify="right")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in body:
        table.add_row(*row, style="dim" if row[0].endswith(PUBLISHED) else None)
    return table
