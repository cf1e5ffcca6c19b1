"""The page of a run, and the figures on it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from drama.errors import UserError
from drama.figures import (
    _running_mean,
    evaluation_bars,
    evaluation_figures,
    svg,
    training_figures,
)
from drama.report import write_report

EVALUATION = {
    "dataset": "scifact",
    "split": "test",
    "num_queries": 1300,
    "systems": {
        "bm25": {"metrics": {"nDCG@10": 0.679, "Recall@100": 0.9127, "MRR@10": 0.643}},
        "a<b>": {"metrics": {"nDCG@10": 0.71, "Recall@100": 0.9, "MRR@10": 0.65}},
    },
}
RECIPE = "name: tiny & small\ntrain:\n  lr: 2e-4  # <peak>\n"


def evaluation(step: int) -> dict[str, float]:
    return {"loss": 3.0 - step / 100, "ndcg@10 a": step / 50, "ndcg@10 b": 0.5, "ndcg@10": 0.4}


def metrics(num: int) -> list[dict]:
    return [
        {
            "step": step,
            "epoch": step / num,
            "loss": 4.0 - step / num,
            "loss_by_prefix": {"64": 4.5 - step / num, "128": 3.5 - step / num},
            "lr": 1e-4,
            "grad_norm": 1.5,
            "tokens": 600_000,
            "tokens_per_s": 1_000_000.0 + step,
            "pairs_per_s": 5000.0,
            "mfu": 0.4,
            "peak_mem_mib": 2048.0 + step,
            "data_wait_s": 0.002,
            "seconds": 0.6,
            "temperature": 0.05 - step / 1000,
            "chunks_kept": 0,
            "seconds_by_phase": {"data": 0.002, "embed": 0.2, "step": 0.4 - step / 1000},
            **({"evaluation": evaluation(step)} if step % 5 == 4 else {}),
        }
        for step in range(num)
    ]


def write_run(folder: Path, num: int = 20) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics(num)))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    return folder


class Page(HTMLParser):
    """Collects what a page says, and fails on tags that do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.links += [
            value for name, value in attributes if name.split(":")[-1] in ("src", "href") and value
        ]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(" ".join(data.split()))


def test_the_page_holds_every_part_and_needs_no_network(tmp_path):
    path = write_report(write_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path)
    # loss, two of the judgements while training, eight curves, phases, evaluation
    assert page.tags.count("svg") == 13
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    style = re.findall(r"<style[^>]*>(.*?)</style>", path.read_text(), re.DOTALL)
    assert not any("url(http" in text or "@import" in text for text in style)
    for expected in (
        "tiny & small",  # the recipe's name
        "20", "12,000,000", "1,000,010", "40.0%", "2.0 GiB", "0 min 12 s", "3.050",  # tiles
        "64 dimensions", "tokens/s", "GiB", "step", "1,000,000",  # figures
        "a<b>", "0.7100", "0.9127", "scifact test, 1,300 queries",  # evaluation
    ):  # fmt: skip
        assert expected in page.words, expected
    assert "name: tiny & small train: lr: 2e-4 # <peak>" in page.words  # the fold-out


def test_missing_parts_are_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "recipe.yaml").unlink()
    (run / "evaluation").mkdir()
    (run / "evaluation.json").rename(run / "evaluation" / "evaluation.json")
    page = Page(write_report(run))
    assert page.tags.count("svg") == 1
    assert "details" not in page.tags
    assert "run" in page.words

    (run / "evaluation" / "evaluation.json").unlink()
    lines = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5, "grad_norm": None}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(run))
    assert page.tags.count("svg") == 1
    assert "table" not in page.tags


def test_curves_are_the_numbers(tmp_path):
    figures = training_figures(metrics(20))
    loss, ndcg, held_out, throughput, pairs, mfu, memory, wait, lr, norm, temperature, phases = (
        figures
    )
    judged = {line.get_label(): line for line in ndcg.axes[0].lines}
    assert list(judged) == ["mean", "a", "b"]
    np.testing.assert_array_equal(judged["a"].get_xdata(), [5, 10, 15, 20])
    np.testing.assert_allclose(judged["a"].get_ydata(), np.array([4, 9, 14, 19]) / 50)
    (held_out_loss,) = held_out.axes[0].lines
    np.testing.assert_allclose(held_out_loss.get_ydata(), 3 - np.array([4, 9, 14, 19]) / 100)
    np.testing.assert_allclose(
        temperature.axes[0].lines[0].get_ydata(), 0.05 - np.arange(20) / 1000
    )
    assert [layer.get_label() for layer in phases.axes[0].collections] == ["data", "embed", "step"]
    top = phases.axes[0].collections[-1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(0.602)
    curves = {line.get_label(): line for line in loss.axes[0].lines}
    assert list(curves) == ["64 dimensions", "128 dimensions", "all, weighted"]
    expected = {"64 dimensions": 4.5, "128 dimensions": 3.5, "all, weighted": 4.0}
    for label, first in expected.items():
        np.testing.assert_array_equal(curves[label].get_xdata(), np.arange(20))
        np.testing.assert_allclose(curves[label].get_ydata(), first - np.arange(20) / 20)
    scaled = {"% of peak": (mfu, 40.0), "ms per step": (wait, 2.0), "GiB": (memory, 2.0)}
    for label, (figure, first) in scaled.items():
        assert figure.axes[0].get_ylabel() == label
        assert figure.axes[0].lines[0].get_ydata()[0] == pytest.approx(first)
    for figure in (throughput, pairs, lr, norm):
        assert figure.axes[0].get_ylim()[0] == 0


def test_a_recovery_shows_held_out_losses_by_source() -> None:
    lines = [
        {"step": step, "loss": 2.0,
         "evaluation": {"loss": 3.0, "perplexity": 20.1, "loss de": 3.5, "loss en": 2.5}}
        for step in range(3)
    ]  # fmt: skip
    _, held_out, *_ = training_figures(lines)
    axes = held_out.axes[0]
    assert (axes.get_title(loc="left"), axes.get_ylabel()) == ("Held-out loss", "loss")
    found = {str(line.get_label()): float(line.get_ydata()[0]) for line in axes.lines}
    assert found == {"all": 3.0, "de": 3.5, "en": 2.5}


def test_a_long_run_is_thinned_and_keeps_its_course():
    loss, *_ = training_figures(metrics(25_000))
    curve = loss.axes[0].lines[-1]
    assert 500 <= len(curve.get_xdata()) <= 1000
    steps = curve.get_xdata()[50:-50]
    np.testing.assert_allclose(curve.get_ydata()[50:-50], 4.0 - steps / 25_000, atol=1e-6)
    assert len(svg(loss)) < 200_000


def test_running_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=41)
    values[[3, 4, 20]] = np.nan
    expected = [np.nanmean(values[max(0, i - 4) : i + 5]) for i in range(41)]
    np.testing.assert_allclose(_running_mean(values, 4), expected)
    assert np.isnan(_running_mean(np.full(9, np.nan), 1)).all()


def test_a_single_step_and_a_loss_of_nan(tmp_path):
    write_run(tmp_path / "one", num=1)
    ElementTree.fromstring(svg(training_figures(metrics(1))[0]))
    assert write_report(tmp_path / "one").is_file()
    lines = metrics(3)
    lines[1]["loss"] = float("nan")
    (tmp_path / "one" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert write_report(tmp_path / "one").is_file()


def test_bars_are_the_metrics():
    axes = evaluation_bars(EVALUATION).axes[0]
    for bars, system in zip(axes.containers, EVALUATION["systems"].values(), strict=True):
        assert [bar.get_height() for bar in bars] == list(system["metrics"].values())
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        "nDCG@10",
        "Recall@100",
        "MRR@10",
    ]


def test_the_last_line_of_a_killed_run_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 20, "lo')
    assert "20" in Page(write_report(run)).words
    path.write_text('{"step": 0, "lo\n' + path.read_text())
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a JSON object with a 'step'"):
        write_report(run)


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is no run folder"):
        write_report(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty holds nothing to report: metrics\.jsonl, recipe"):
        write_report(empty)
    assert list(empty.iterdir()) == []
    (empty / "recipe.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"recipe\.yaml is not valid YAML"):
        write_report(empty)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"evaluation\.json is no evaluation \(Expecting"),
        ("[]", r"evaluation\.json is no evaluation"),
        ('{"systems": {}}', r"is no evaluation \(systems and metrics do not form a table\)"),
        ('{"systems": {"a": {"metrics": {"x": "1"}}}}', r"do not form a table"),
        ('{"systems": {"a": {"metrics": {"x": 1}}, "b": {"metrics": {}}}}', r"do not form a table"),
    ],
)
def test_bad_evaluation(tmp_path, text, message):
    run = write_run(tmp_path / "run")
    (run / "evaluation.json").write_text(text)
    with pytest.raises(UserError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


def test_several_datasets_are_a_second_figure_with_whiskers():
    def system(value: float) -> dict:
        return {
            "metrics": {"nDCG@10": value, "MRR@10": 0.5},
            "intervals": {"nDCG@10": [value - 0.1, value + 0.05], "MRR@10": [0.5, 0.5]},
        }

    values = {"de": (0.3, 0.4), "sw": (0.5, 0.8), "th": (0.1, 0.6)}
    results = {
        "dataset": "miracl",
        "metrics": ["nDCG@10", "MRR@10"],
        "systems": {"a": system(0.3), "b": system(0.6)},
        "datasets": {
            f"miracl-{lang}": {
                "group": "miracl",
                "lang": lang,
                "systems": {"a": system(a), "b": system(b)},
            }
            for lang, (a, b) in values.items()
        },
    }
    first, second = evaluation_figures(results)
    assert [bar.get_height() for bar in first.axes[0].containers[0]] == [0.3, 0.5]
    axes = second.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [*values, "mean"]
    assert [bar.get_height() for bar in axes.containers[0]] == [0.3, 0.5, 0.1, 0.3]
    (segments,) = (c for c in axes.collections[:1])
    low_high = [tuple(segment[:, 1]) for segment in segments.get_segments()]
    assert low_high[0] == pytest.approx((0.2, 0.35))
    assert len(evaluation_figures({**results, "datasets": {}})) == 1
