"""Pages that need nothing beside themselves: one look, and one way to write what others wrote.

Everything that was not written here goes through `text`. The functions return HTML; `write_html`
makes a file of it, which loads nothing from anywhere and runs no script.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from drama.files import replacing

# what no page may hold: half a surrogate pair, control characters but for tab and line feed, and
# those that would show the text after them in another order
_NO_TEXT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def text(value: Any) -> str:
    """A value as HTML text, also in quoted attributes; what cannot be shown becomes U+FFFD."""
    return html.escape(_NO_TEXT.sub("\ufffd", str(value)))


def card(content: str, title: str = "") -> str:
    """A white box around HTML, such as the `<svg>` of a figure."""
    head = f"<figcaption>{text(title)}</figcaption>" if title else ""
    return f'<figure class="card">{head}{content}</figure>'


def grid(cards: Iterable[str]) -> str:
    """Cards side by side, as many as fit; nothing where there are none."""
    inside = "\n".join(cards)
    return f'<section class="grid">{inside}</section>' if inside else ""


def columns(cards: Iterable[str]) -> str:
    """Cards of unlike heights, in columns without gaps; nothing where there are none."""
    inside = "\n".join(cards)
    return f'<section class="columns">{inside}</section>' if inside else ""


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Numbers to be seen first: (name, value) each."""
    inside = "".join(f"<div><b>{text(value)}</b><span>{text(n)}</span></div>" for n, value in facts)
    return f'<section class="tiles">{inside}</section>'


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table; head is text, the rows are HTML: the row's name, then its cells."""
    titles = "".join(f"<th>{text(title)}</th>" for title in head)
    body = "".join(
        f'<tr><th dir="auto">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    top = f"<thead><tr>{titles}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def fold_out(summary: str, content: str) -> str:
    """HTML that is shown on demand."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def write_html(path: str | Path, title: str, parts: Iterable[str]) -> Path:
    """Write a page with the title above its parts of HTML; return its path."""
    body = "\n".join([f"<h1>{text(title)}</h1>", *filter(None, parts)])
    with replacing(path) as temporary:
        page = PAGE.format(title=text(title), style=CSS, body=body)
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #f5f6f8;
  max-width: 1120px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 8px 0 16px; } h2 { font-size: 21px; margin: 36px 0 12px; }
h3 { font-size: 17px; margin: 24px 0 10px; }
h1, h2, p, dd, .bars th { overflow-wrap: anywhere; }
.note { color: #66717d; font-size: 13px; font-weight: 400; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 16px; }
.tiles div, .card, .wide > table, details { background: #fff; border: 1px solid #e4e7eb;
  border-radius: 8px; }
.tiles div { padding: 10px 16px; } .tiles b { display: block; font-size: 19px; }
.tiles span { color: #66717d; font-size: 13px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 16px; align-items: start; margin-bottom: 16px; }
.card { margin: 0; padding: 12px 14px; min-width: 0; }
.card svg { width: 100%; height: auto; display: block; }
.card svg text { font-family: system-ui, sans-serif !important; }
.columns { columns: 2 440px; column-gap: 16px; }
.columns .card { break-inside: avoid; margin-bottom: 16px; }
figcaption { font-weight: 700; margin-bottom: 6px; }
.wide { overflow-x: auto; margin-bottom: 16px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 16px; text-align: right; } th:first-child { text-align: left; }
tbody tr { border-top: 1px solid #e4e7eb; } tbody th { font-weight: 500; }
.bars { width: 100%; font-size: 13px; } .bars tr { border: 0; }
.bars th, .bars td { padding: 2px 0 2px 10px; line-height: 1.35; }
.bars th { width: 42%; padding-left: 0; } .bars td { width: 1%; white-space: nowrap; }
.bars td:last-child { width: auto; text-align: left; }
.bars i { display: block; height: 13px; min-width: 1px; border-radius: 2px; background: #2f6db3; }
.bars .good { background: #3a9a7b; } .bars .bad { background: #c8553d; }
.example p { font-weight: 600; margin: 0 0 6px; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 12px; margin: 0;
  font-size: 13px; }
dt { color: #66717d; } dd { margin: 0; }
details { margin-top: 16px; padding: 10px 16px; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: 13px; } a { color: #2f6db3; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
