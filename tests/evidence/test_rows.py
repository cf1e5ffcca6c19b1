from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from drama.cli import main
from drama.evidence.nodes import RECORD, Cell, Node
from drama.evidence.page import write_page
from drama.evidence.rows import Row, read_rows, without_rows, write_rows
from drama.retrieve.evaluate import evaluate
from drama.retrieve.suite import load_suite, suite_datasets

# the word of a query is in its document alone; of the second set's query twice in a wrong one
WORDS = ("apple", "bridge", "candle", "dragon")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A node's folder with an evaluation that really ran: BM25 on three sets of two groups."""
    write_set(tmp_path / "sets" / "easy", {f"d{i}": f"one {w} here" for i, w in enumerate(WORDS)},
              [(w, f"d{i}") for i, w in enumerate(WORDS)])  # fmt: skip
    write_set(tmp_path / "sets" / "hard", {"d0": "apple pie pie", "d1": "apple apple apple"},
              [("apple", "d0")])  # fmt: skip
    write_set(tmp_path / "sets" / "alone", {"d0": "apple"}, [("apple", "d0")])
    (tmp_path / "suite.yaml").write_text(
        "name: three\ndatasets:\n  - {name: easy, group: both}\n  - {name: hard, group: both}\n"
        "  - {name: alone, group: other}\n"
    )
    suite = load_suite(tmp_path / "suite.yaml")
    folder = tmp_path / "work" / node().folder
    evaluate(suite_datasets(suite, tmp_path / "sets"), {"model": "bm25"}, out=folder / "evaluation")
    (folder / RECORD).write_text(json.dumps({"minutes": 1.5, "commit": "abc", "device": "d"}))
    return tmp_path / "work"


def node() -> Node:
    return Node("evaluation", (("drama", "evaluate"),), 1.0)


def write_set(folder: Path, texts: dict[str, str], asked: list[tuple[str, str]]) -> None:
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": i, "title": "", "text": text} for i, text in texts.items()]
    queries = [{"_id": f"q{n}", "text": query} for n, (query, _) in enumerate(asked)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"q{n}\t{doc}\t1\n" for n, (_, doc) in enumerate(asked)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))


def test_figures_of_an_evaluation(work: Path, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    write_rows(csv, work, Cell("shape", "a", 3, node()), "cpu")
    rows = {row.metric: row for row in read_rows(csv)}
    second = 1 / math.log2(3)  # nDCG of the only relevant one at rank 2
    assert rows["nDCG@10 easy"].value == pytest.approx(1)
    assert rows["nDCG@10 hard"].value == pytest.approx(second, abs=1e-4)
    assert rows["nDCG@10 mean both"].value == pytest.approx((1 + second) / 2, abs=1e-4)
    easy = rows["nDCG@10 easy"]
    assert (easy.low, easy.high, easy.minutes, easy.commit) == (1, 1, 1.5, "abc")
    assert (easy.scale, easy.experiment, easy.variant, easy.seed) == ("cpu", "shape", "a", 3)
    assert (easy.examples, easy.tokens) == (None, None)


def test_what_the_decontamination_left_out_is_counted(work: Path, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    asked = [("apple", "one apple here"), ("pear", "one pear here"), ("plum", "one plum here")]
    rows = [{"query": query, "positives": [{"text": text}]} for query, text in asked]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shards = Node("shards", (("drama", "shard"),), 1.0)
    training = Node("retriever", (("python",),), 1.0, (shards, node()), facts={"examples": 3})
    options = ["--decontaminate", str(tmp_path / "sets" / "easy")]
    out = ["--out", str(work / shards.folder / "shards")]
    done = CliRunner().invoke(main, ["shard", str(records), *options, *out])
    assert done.exit_code == 0, done.output
    run = work / training.folder / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"tokens": 7}\n')
    (run.parent / RECORD).write_text(json.dumps({"minutes": 1.5, "commit": "abc", "device": "d"}))
    csv = tmp_path / "rows.csv"
    write_rows(csv, work, Cell("nano", "a", 0, node(), training), "cpu")
    assert {row.value for row in read_rows(csv) if row.metric == "left out"} == {1}
    write_page(csv, tmp_path / "page.md", "cpu")
    assert "\nRecords left out of a training: nano 1.\n" in (tmp_path / "page.md").read_text()


def test_rows_of_a_cell_are_replaced_and_the_others_stay(work: Path, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    first, second = (Cell("shape", "a", seed, node()) for seed in (0, 1))
    write_rows(csv, work, second, "cpu")
    write_rows(csv, work, first, "cpu")
    before = csv.read_bytes()
    write_rows(csv, work, second, "cpu")
    assert csv.read_bytes() == before
    write_rows(csv, work, first, "gpu")
    assert [(r.scale, r.seed) for r in read_rows(csv)] == [
        *[("cpu", 0)] * 5, *[("cpu", 1)] * 5, *[("gpu", 0)] * 5,
    ]  # fmt: skip


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.csv") == []
    assert Row("cpu", "shape", "a", 0, "perplexity", 2.0).cell == ("cpu", "shape", "a", 0)


def test_cells_that_the_file_has_no_figures_of(work: Path, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    first, second = (Cell("shape", "a", seed, node()) for seed in (0, 1))
    three = Cell("nano", "n", 0, node(), systems=("model", "bm25"))
    assert without_rows(csv, [first, second, three], "cpu") == [first, second, three]
    write_rows(csv, work, second, "cpu")
    assert without_rows(csv, [first, second, three], "cpu") == [first, three]
    assert without_rows(csv, [second], "gpu") == [second]
    # one of its two systems alone is not all of it
    write_rows(csv, work, Cell("nano", "bm25", 0, node()), "cpu")
    assert without_rows(csv, [three], "cpu") == [three]
    write_rows(csv, work, Cell("nano", "n", 0, node()), "cpu")
    assert without_rows(csv, [three], "cpu") == []
