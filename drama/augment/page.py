"""The quality report of augmentation on one page: what was kept and dropped, lengths, languages,
tasks, own ranks, copies, and examples, for one job or for all of a run.

Names and texts come from documents and models: whatever they hold, they are shown as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from drama.augment.reports import HTML, Counts, Report, read_report
from drama.errors import UserError
from drama.figures import lengths_histogram, numbers_histogram, svg
from drama.files import replacing
from drama.html_page import card, columns, fold_out, grid, table, text, tiles, write_html

SHOWN_NAMES = 12  # of a counter; the others are summed up
SHOWN_CHARS = 600  # of a query
USAGE = {
    "sent": "calls sent",
    "retried": "of these tried again",
    "answered": "answers of the server",
    "cached": "answers of the cache",
    "refused": "requests refused",
    "unanswered": "requests left without an answer",
    "estimated": "answers whose tokens are estimated",
    "prompt_tokens": "prompt tokens paid",
    "completion_tokens": "completion tokens paid",
    "cached_prompt_tokens": "prompt tokens of the cache",
    "cached_completion_tokens": "completion tokens of the cache",
}


def write_page(
    reports: Sequence[tuple[str, Mapping[str, Any]]], path: str | Path, title: str
) -> Path:
    """Write one self-contained page for the reports of some jobs; return its path.

    reports: the name of each job's output, and what `Job.run` or `reports.read_report` gives.
    """
    assert reports
    jobs = [(name, Report.model_validate(report)) for name, report in reports]
    if len(jobs) == 1:
        name, job = jobs[0]
        subtitle = [f'<p class="note">{text(_subtitle(job))}</p>']
        return write_html(path, title, [*subtitle, *_job(job)])
    parts = [_overview(jobs)]
    for number, (name, job) in enumerate(jobs):
        note = f'<span class="note">{text(_subtitle(job))}</span>'
        parts += [f'<h2 id="job-{number}"><bdi>{text(name)}</bdi> {note}</h2>', *_job(job)]
    return write_html(path, title, parts)


def write_run(files: Sequence[str | Path], out: str | Path, title: str = "Augmentation") -> Path:
    """Write the page of several jobs, and the same as JSON beside it; return the page's path.

    files: of records, or their report.json.

    Raises:
        UserError: no .html name, or that of a job's own page; from `read_report`.
    """
    out = Path(out)
    if out.suffix != ".html" or out.name.endswith(HTML):
        raise UserError(
            f"{out}: give a name that ends in .html, not in {HTML} as the page of a job does, such "
            f"as {out.with_name('augment.html')}"
        )
    reports = [read_report(file) for file in files]
    names = [name for name, _ in reports]
    if len(set(names)) < len(names):  # of several folders
        reports = [(str(file), report) for file, (_, report) in zip(files, reports, strict=True)]
    jobs = [{"name": name, **report} for name, report in reports]
    with replacing(out.with_suffix(".json")) as temporary:
        whole = json.dumps({"jobs": jobs}, indent=1, ensure_ascii=False)
        temporary.write_text(whole + "\n", encoding="utf-8")
    return write_page(reports, out, title)


def _subtitle(job: Report) -> str:
    model = job.about.get("model")
    by = ", ".join(str(part) for part in (model, job.about.get("teacher")) if part)
    return f"{job.kind}, {by}" if by else job.kind


def _overview(jobs: Sequence[tuple[str, Report]]) -> str:
    asked = any(job.llm for _, job in jobs)
    head = ["output", "kind", "read", "kept", "share", "own document first", "found"]
    head += ["exact copies", "near copies"] + ["calls", "tokens"] * asked
    rows = []
    for number, (name, job) in enumerate(jobs):
        own, twice = job.self_retrieval, job.duplicate_queries
        cells = [text(job.kind), f"{job.read:,}", f"{job.records:,}"]
        cells += [_share(job.records, job.read)]
        cells += ["" if share is None else f"{share:.1%}" for share in (own.first, own.found)]
        cells += [f"{twice.exact:,}", f"{twice.near:,}"]
        if asked:
            counts = (job.llm.get("calls", 0), _tokens(job))
            cells += [f"{count:,}" if job.llm else "" for count in counts]
        rows.append((f'<a href="#job-{number}">{text(name)}</a>', cells))
    return table(head, rows)


def _job(job: Report) -> list[str]:
    """The parts of one job; what it has not is left out."""
    counters: list[tuple[str, Counts]] = [
        ("Languages", job.languages),
        ("Sources", job.sources if len(job.sources) > 1 else {}),
        *((name.capitalize(), counts) for name, counts in job.labels.items()),
        ("Left out of the negatives", job.negatives_left_out),
    ]
    cards = [card(_bars(counts), title) for title, counts in counters if counts]
    if job.dropped:
        kept = {"kept": job.records, **job.dropped}
        cards.insert(0, card(_bars(kept, "good", "bad"), "Kept, and dropped by reason"))
    parts = [tiles(_facts(job)), grid(_histograms(job)), columns(cards)]
    if pairs := job.duplicate_queries.examples:
        shown = (_texts({"first": first, "again": again}) for first, again in pairs)
        parts += ["<h3>Queries that come nearly twice</h3>", columns(map(card, shown))]
    if job.llm:
        parts += ["<h3>Language model</h3>", _model(job)]
    if job.examples:
        parts += [
            "<h3>Records at random</h3>",
            columns(_example(e.model_dump()) for e in job.examples),
        ]
    if job.about:
        about = json.dumps(job.about, indent=2, ensure_ascii=False)
        parts += [fold_out("What the output depends on", f"<pre>{text(about)}</pre>")]
    return parts


def _facts(job: Report) -> list[tuple[str, str]]:
    facts = [
        ("read", f"{job.read:,}"),
        ("kept", f"{job.records:,}"),
        ("dropped", f"{sum(job.dropped.values()):,}"),
        ("kept, of those read", _share(job.records, job.read)),
    ]
    for name, counts in (("positives", job.positives), ("hard negatives", job.negatives)):
        if counts:
            mean = sum(n * count for n, count in counts.items()) / sum(counts.values())
            facts.append((f"{name} a record" + ", mean" * (len(counts) > 1), f"{mean:,.4g}"))
    for name, share in job.self_retrieval:
        if share is not None:
            facts.append((f"own document {name}", f"{share:.1%}"))
    twice = job.duplicate_queries
    facts += [("queries come exactly twice", f"{twice.exact:,}")]
    facts += [("queries come nearly twice", f"{twice.near:,}")]
    if job.llm:
        facts += [("calls", f"{job.llm.get('calls', 0):,}"), ("tokens", f"{_tokens(job):,}")]
    if run := job.llm_this_run:
        paid = run.get("prompt_tokens", 0) + run.get("completion_tokens", 0)
        facts += [("tokens paid, last run", f"{paid:,}")]
    return facts


def _histograms(job: Report) -> list[str]:
    figures: list[tuple[str, Figure]] = []
    lengths = (
        ("Length of queries", job.query_chars, "queries"),
        ("Length of their documents", job.document_chars, "documents"),
    )
    for title, counts, what in lengths:
        if counts:
            figures.append((title, lengths_histogram(counts, "characters", what)))
    several = (
        ("Positives a record", job.positives),
        ("Hard negatives a record", job.negatives),
    )
    for title, counts in several:
        if len(counts) > 1:  # one number is a tile
            figures.append((title, numbers_histogram(counts, "documents", "records")))
    if job.own_ranks:
        found = {rank: count for rank, count in job.own_ranks.items() if isinstance(rank, int)}
        deeper = ("deeper", job.own_ranks.get("deeper", 0))
        drawn = numbers_histogram({1: 0} | found, "rank", "queries", deeper)
        figures.append(("Where the teacher finds a query's own document", drawn))
    return [card(svg(figure), title) for title, figure in figures]


def _bars(counts: Counts, first: str = "", rest: str = "") -> str:
    """A row for each name: its count, its share, and a bar, whose class is `first` or `rest`."""
    total, highest = sum(counts.values()), max(1, *counts.values())
    rows = list(counts.items())
    others = rows[SHOWN_NAMES:] if len(rows) > SHOWN_NAMES + 1 else []
    lines = []
    for number, (name, count) in enumerate(rows[: len(rows) - len(others)]):
        style = f'class="{rest if number else first}" style="width:{100 * count / highest:.1f}%"'
        lines.append((name or "none given", count, f"<i {style}></i>"))
    if others:
        lines.append((f"{len(others):,} others", sum(count for _, count in others), ""))
    body = "".join(
        f'<tr><th dir="auto">{text(name)}</th><td>{count:,}</td>'
        f'<td class="note">{_share(count, total)}</td><td>{bar}</td></tr>'
        for name, count, bar in lines
    )
    return f'<table class="bars"><tbody>{body}</tbody></table>'


def _model(job: Report) -> str:
    cards = [card(_numbers(job.llm.items()), "All answers that were used")]
    run = [(USAGE.get(name, name), count) for name, count in job.llm_this_run.items() if count]
    if run:
        cards.append(card(_numbers(run), "The run that ended the job"))
    return grid(cards)


def _numbers(counts: Iterable[tuple[str, int]]) -> str:
    rows = "".join(f"<tr><th>{text(name)}</th><td>{n:,}</td></tr>" for name, n in counts)
    return f'<table class="bars"><tbody>{rows}</tbody></table>'


def _example(texts: Mapping[str, str]) -> str:
    documents = {name: texts[name] for name in ("positive", "negative") if texts[name]}
    query = f'<p dir="auto">{_brief(texts["query"])}</p>'
    return f'<article class="card example">{query}{_texts(documents)}</article>'


def _texts(by_name: Mapping[str, str]) -> str:
    rows = (f'<dt>{name}</dt><dd dir="auto">{_brief(each)}</dd>' for name, each in by_name.items())
    return f"<dl>{''.join(rows)}</dl>"


def _brief(value: str) -> str:
    return text(value if len(value) <= SHOWN_CHARS else value[:SHOWN_CHARS] + " …")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _tokens(job: Report) -> int:
    return job.llm.get("prompt tokens", 0) + job.llm.get("completion tokens", 0)
