"""A run on one page: `RUN/report.html`, self-contained, with every figure drawn inline.

What a run folder lacks is left out: metrics.jsonl gives the curves, recipe.yaml the fold-out,
evaluation.json (or evaluation/evaluation.json) the bars and the table.
"""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import yaml

from drama.errors import UserError
from drama.figures import Line, Results, evaluation_bars, svg, training_figures
from drama.files import replacing


def write_report(run_dir: str | Path) -> Path:
    """Write `RUN/report.html` from what the run folder holds, and return its path.

    Raises:
        UserError: no folder, nothing in it to report, or a file that is damaged.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"{folder} is no run folder")
    lines = _read_metrics(folder / "metrics.jsonl")
    recipe, name = _read_recipe(folder / "recipe.yaml", folder.resolve().name)
    evaluations = (folder / "evaluation" / "evaluation.json", folder / "evaluation.json")
    found = next((path for path in evaluations if path.is_file()), None)
    results = _read_results(found) if found else None
    if not (lines or recipe or results):
        raise UserError(
            f"{folder} holds nothing to report: metrics.jsonl, recipe.yaml and evaluation.json "
            "are missing; give the output folder of a training run"
        )
    parts = [f"<h1>{html.escape(name)}</h1>"]
    if lines:
        parts += [_tiles(lines), '<section class="grid">']
        parts += [_card(svg(figure)) for figure in training_figures(lines)]
        parts += ["</section>"]
    if results:
        cards = _card(svg(evaluation_bars(results))) + _table(results)
        parts += [f'<h2>Evaluation</h2><section class="grid">{cards}</section>']
    if recipe:
        parts += [f"<details><summary>Recipe</summary><pre>{html.escape(recipe)}</pre></details>"]
    target = folder / "report.html"
    with replacing(target) as temporary:
        page = PAGE.format(title=html.escape(name), style=CSS, body="\n".join(parts))
        temporary.write_text(page, encoding="utf-8")
    return target


def _read_metrics(path: Path) -> list[Line]:
    """Read the steps; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    rows = path.read_text(encoding="utf-8").splitlines()
    lines: list[Line] = []
    for number, row in enumerate(rows, 1):
        try:
            line = json.loads(row)
            if not isinstance(line["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            if number == len(rows) and not row.endswith("}"):
                break
            raise UserError(f"{path}:{number}: not a JSON object with a 'step'") from None
        lines.append(line)
    return lines


def _read_recipe(path: Path, default_name: str) -> tuple[str, str]:
    """Return the recipe's text and its name."""
    if not path.is_file():
        return "", default_name
    text = path.read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    return text, str(tree.get("name", default_name)) if isinstance(tree, dict) else default_name


def _read_results(path: Path) -> Results:
    try:
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        names = [tuple(system["metrics"]) for system in results["systems"].values()]
        values = [x for system in results["systems"].values() for x in system["metrics"].values()]
        if not names or len(set(names)) != 1 or not all(isinstance(x, float | int) for x in values):
            raise ValueError("systems and metrics do not form a table")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no evaluation ({error}); evaluate again") from None
    return results


def _card(figure_svg: str) -> str:
    return f'<figure class="card">{figure_svg}</figure>'


def _tiles(lines: Sequence[Line]) -> str:
    def values(field: str) -> list[float]:
        return [line[field] for line in lines if line.get(field) is not None]

    facts: list[tuple[str, str]] = [("steps", f"{lines[-1]['step'] + 1:,}")]
    if losses := values("loss"):
        facts.append(("last loss", f"{losses[-1]:.3f}"))
    if tokens := values("tokens"):
        facts.append(("tokens", f"{sum(tokens):,.0f}"))
    if rates := values("tokens_per_s"):
        facts.append(("tokens/s, median", f"{statistics.median(rates):,.0f}"))
    if mfu := values("mfu"):
        facts.append(("MFU, median", f"{statistics.median(mfu):.1%}"))
    if memory := values("peak_mem_mib"):
        facts.append(("peak memory", f"{max(memory) / 1024:,.1f} GiB"))
    if seconds := values("seconds"):
        minutes, rest = divmod(round(sum(seconds)), 60)
        clock = f"{minutes // 60:,} h {minutes % 60:02} min" if minutes >= 60 else ""
        facts.append(("time in steps", clock or f"{minutes} min {rest:02} s"))
    tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in facts)
    return f'<section class="tiles">{tiles}</section>'


def _table(results: Results) -> str:
    systems = results["systems"]
    metrics = list(next(iter(systems.values()))["metrics"])
    best = {m: max(system["metrics"][m] for system in systems.values()) for m in metrics}
    head = "".join(f"<th>{html.escape(m)}</th>" for m in metrics)
    rows = []
    for name, system in systems.items():
        cells = "".join(
            f"<td{' class=best' if system['metrics'][m] == best[m] else ''}>"
            f"{system['metrics'][m]:.4f}</td>"
            for m in metrics
        )
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    head = f"<thead><tr><th>system</th>{head}</tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #f5f6f8;
  max-width: 1120px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 8px 0 16px; } h2 { font-size: 19px; margin: 28px 0 12px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 16px; }
.tiles div, .card, table, details { background: #fff; border: 1px solid #e4e7eb;
  border-radius: 8px; }
.tiles div { padding: 10px 16px; } .tiles b { display: block; font-size: 19px; }
.tiles span { color: #66717d; font-size: 13px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 16px; align-items: start; }
.card { margin: 0; padding: 12px; } .card svg { width: 100%; height: auto; display: block; }
.card svg text { font-family: system-ui, sans-serif !important; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 16px; text-align: right; } th:first-child { text-align: left; }
tbody tr { border-top: 1px solid #e4e7eb; } tbody th { font-weight: 500; }
.best { font-weight: 700; }
details { margin-top: 24px; padding: 10px 16px; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: 13px; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
