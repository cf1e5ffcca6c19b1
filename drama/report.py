"""A run on one page: `RUN/report.html`, self-contained, with every figure drawn inline.

What a run folder lacks is left out: metrics.jsonl gives the curves, recipe.yaml the fold-out,
evaluation.json (or evaluation/evaluation.json) the bars and the table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import yaml

from drama.errors import UserError
from drama.figures import Line, Results, evaluation_figures, svg, training_figures
from drama.html_page import card, fold_out, grid, table, text, tiles, write_html


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
    parts: list[str] = []
    if lines:
        parts += [tiles(_facts(lines)), grid(card(svg(x)) for x in training_figures(lines))]
    if results:
        shown = grid([*(card(svg(x)) for x in evaluation_figures(results)), _table(results)])
        parts += ["<h2>Evaluation</h2>", shown]
    if recipe:
        parts += [fold_out("Recipe", f"<pre>{text(recipe)}</pre>")]
    return write_html(folder / "report.html", name, parts)


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


def _facts(lines: Sequence[Line]) -> list[tuple[str, str]]:
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
    return facts


def _table(results: Results) -> str:
    systems = results["systems"]
    metrics = list(next(iter(systems.values()))["metrics"])
    best = {m: max(system["metrics"][m] for system in systems.values()) for m in metrics}

    def cell(value: float, metric: str) -> str:
        return f"<b>{value:.4f}</b>" if value == best[metric] else f"{value:.4f}"

    rows = (
        (text(name), [cell(system["metrics"][metric], metric) for metric in metrics])
        for name, system in systems.items()
    )
    return table(["system", *metrics], rows)
