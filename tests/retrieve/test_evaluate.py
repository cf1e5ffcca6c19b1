from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from rich.console import Console

from drama.encoder import Encoder
from drama.errors import UserError
from drama.retrieve.encode import encode_corpus
from drama.retrieve.evaluate import evaluate
from drama.retrieve.index import build_index
from drama.retrieve.run import read_run, without_queries, write_run
from drama.retrieve.tables import tables


def test_evaluate_bm25_a_model_and_an_index(dataset, model, tmp_path):
    encode_corpus(dataset, model, tmp_path / "vectors")
    build_index(tmp_path / "vectors", tmp_path / "index")
    out = tmp_path / "out"
    systems = {"bm25": "bm25", "tiny": model, "tiny-index": tmp_path / "index"}
    results = evaluate(dataset, systems, out=out)

    facts = results.datasets["facts"]
    assert (facts.num_queries, facts.num_documents, facts.num_judgements) == (3, 8, 6)
    assert facts.num_unknown_documents == 1
    bm25 = results.systems["bm25"]
    assert bm25.metrics["MRR@10"] == 1.0
    # q2 has a relevant document that the corpus lacks: it counts as missed
    per_query = json.loads((out / "facts" / "scores" / "bm25.json").read_text())["per_query"]
    assert per_query["Recall@100"] == {"q1": 1.0, "q2": 0.5, "q3": 1.0}
    assert results.systems["tiny"].metrics == results.systems["tiny-index"].metrics
    assert (bm25.dim, results.systems["tiny"].dim) == (None, 64)

    # the run file, read by trec_eval's code, gives the figures in the JSON
    stored = json.loads((out / "evaluation.json").read_text())
    qrels = {"q1": {"d1": 2, "d7": 1}, "q2": {"d4": 1, "gone": 1}, "q3": {"d5": 1, "d3": 0}}
    for name in systems:
        with (out / "facts" / "runs" / f"{name}.trec").open() as file:
            run = pytrec_eval.parse_run(file)
        reference = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run)
        values = {q: reference[q]["ndcg_cut_10"] for q in qrels}
        scores = json.loads((out / "facts" / "scores" / f"{name}.json").read_text())
        assert scores["per_query"]["nDCG@10"] == pytest.approx(values)
        mean = sum(values.values()) / 3
        assert stored["systems"][name]["metrics"]["nDCG@10"] == pytest.approx(mean)
    table = (out / "evaluation.md").read_text()
    assert f"| bm25 |  | **{bm25.metrics['nDCG@10']:.4f}** |" in table
    assert "6 judgements (1 of documents that the corpus lacks)" in table
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*tables(results))
    shown = console.export_text()
    assert f"{bm25.metrics['nDCG@10']:.4f}" in shown
    assert "…" not in shown
    assert "<svg" in (out / "evaluation.svg").read_text()


def test_a_dense_run_ranks_by_cosine(dataset, model, tmp_path):
    evaluate(dataset, {"tiny": model}, out=tmp_path / "out", dim=16)
    encoder = Encoder.from_pretrained(model)
    documents = [json.loads(line) for line in (dataset / "corpus.jsonl").open()]
    texts = [f"{d['title']} {d['text']}".strip() for d in documents]
    query = "why do oceans have tides"
    cosines = (
        encoder.encode([query], "query", dim=16) @ encoder.encode(texts, "document", dim=16).T
    )[0]
    lines = [
        line.split() for line in (tmp_path / "out/facts/runs/tiny.trec").read_text().splitlines()
    ]
    found = [(line[2], float(line[4])) for line in lines if line[0] == "q3"]
    order = np.argsort(-cosines)
    assert [id_ for id_, _ in found] == [documents[i]["_id"] for i in order]
    np.testing.assert_allclose([s for _, s in found], cosines[order], atol=1e-5)


def test_repeated_calls_take_the_vectors_over_at_any_width(dataset, make_model, tmp_path):
    model = make_model(5)
    evaluate(dataset, {"m": model}, out=tmp_path / "out")
    stored = tmp_path / "out" / "facts" / "vectors" / "m" / "vectors.npy"
    before = stored.stat().st_mtime_ns
    first = evaluate(dataset, {"m": model}, out=tmp_path / "out", dim=8)
    assert stored.stat().st_mtime_ns == before
    assert first.systems["m"].dim == 8
    # a model that was trained further under the same path is encoded again
    weights = make_model(6).joinpath("model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights)
    evaluate(dataset, {"m": model}, out=tmp_path / "out")
    assert stored.stat().st_mtime_ns != before


def test_without_out_nothing_is_kept(dataset, model, tmp_path):
    kept = evaluate(dataset, {"m": model}, out=tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    assert evaluate(dataset, {"m": model}).systems == kept.systems
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("systems", "options", "message"),
    [
        ({"bm25": "bm25"}, {"metrics": ["nDCG10"]}, r"unknown metric 'nDCG10'"),
        (
            {"bm25": "bm25"},
            {"against": "bm52"},
            r"--against bm52: no system of that name \(did you mean 'bm25'\?\) and no run file",
        ),
        ({"bm25": "bm25"}, {"split": "tset"}, r"no qrels split 'tset' \(did you mean 'test'\?\)"),
        ({}, {}, r"no system to evaluate; give 'bm25'"),
        ({"a/b": "bm25"}, {}, r"system name 'a/b': letters, digits"),
        ({"x": "nowhere"}, {}, r"system 'x': 'nowhere' is none; give 'bm25', a model folder"),
    ],
)
def test_bad_options(dataset, systems, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(dataset, systems, **options)


def test_bad_width(dataset, model, tmp_path):
    with pytest.raises(UserError, match=r"dim 100 does not fit .*tiny: 1 to 64 do"):
        evaluate(dataset, {"m": model}, dim=100)
    encode_corpus(dataset, model, tmp_path / "vectors", dim=32)
    build_index(tmp_path / "vectors", tmp_path / "index")
    with pytest.raises(UserError, match=r"index is an index of width 32, not 16; leave dim out"):
        evaluate(dataset, {"m": tmp_path / "index"}, dim=16)


def test_an_index_over_another_corpus(dataset, jsonl, model, tmp_path):
    rows = [{"_id": f"d{i}", "text": "some text"} for i in range(1, 8)]
    encode_corpus(jsonl("other.jsonl", rows), model, tmp_path / "vectors")
    build_index(tmp_path / "vectors", tmp_path / "index")
    message = r"indexes another corpus: 7 documents, the dataset has 8, and 'd8' is only in the da"
    with pytest.raises(UserError, match=message):
        evaluate(dataset, {"m": tmp_path / "index"})


def test_a_faulty_dataset(dataset, tmp_path):
    qrels = dataset / "qrels" / "test.tsv"
    qrels.write_text(qrels.read_text() + "q9\td1\t1\n")
    with pytest.raises(UserError, match=r"qrels test judge query 'q9', which is unknown"):
        evaluate(dataset, {"bm25": "bm25"})
    (dataset / "corpus.jsonl").write_text("")
    shutil.copy(qrels, dataset / "qrels" / "dev.tsv")
    qrels.write_text("q1\td1\t1\n")
    with pytest.raises(UserError, match=r"facts holds no documents"):
        evaluate(dataset, {"bm25": "bm25"})


def test_run_files_rank_as_trec_eval_does(tmp_path):
    write_run({"q": {"a": 1.0, "c": 0.5, "b": 1.0}}, tmp_path / "r.trec", tag="t")
    assert (tmp_path / "r.trec").read_text().splitlines() == [
        "q Q0 b 1 1.0 t",
        "q Q0 a 2 1.0 t",
        "q Q0 c 3 0.5 t",
    ]
    with pytest.raises(UserError, match=r"the id 'a b' cannot stand in a TREC run"):
        write_run({"q": {"a b": 1.0}}, tmp_path / "r.trec", tag="t")


def test_bm25_on_the_demo_set(tmp_path, capsys):
    """The demo's corpus is a quarter of SciFact's, so the figure lies above the published 0.68."""
    demo = Path(__file__).parents[2] / "data" / "demo" / "scifact"
    results = evaluate(demo, {"bm25": "bm25"}, out=tmp_path)
    assert (results.num_queries, results.num_documents) == (300, 1200)
    # published figures are of the whole corpus
    assert results.datasets["scifact"].published == {}
    assert "published figures are of 300 queries and 5,183 documents" in capsys.readouterr().err
    assert results.systems["bm25"].metrics["nDCG@10"] == pytest.approx(0.7009, abs=0.002)


def test_a_query_that_is_a_document_does_not_find_itself(dataset, model, tmp_path):
    """As in ArguAna, with the ids of the queries among those of the documents."""
    texts = {"d1": "Vaccination trains the immune system to recognise a virus."}
    (dataset / "queries.jsonl").write_text(json.dumps({"_id": "d1", "text": texts["d1"]}) + "\n")
    (dataset / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd1\td7\t1\n")
    encode_corpus(dataset, model, tmp_path / "vectors")
    build_index(tmp_path / "vectors", tmp_path / "index")
    systems = {"bm25": "bm25", "tiny": model, "tiny-index": tmp_path / "index"}
    results = evaluate(dataset, systems, out=tmp_path / "out")
    assert results.systems["bm25"].metrics["nDCG@10"] == 1.0
    for name in systems:
        rows = (tmp_path / "out" / "facts" / "runs" / f"{name}.trec").read_text().splitlines()
        assert rows
        assert "d1" not in {row.split()[2] for row in rows}


def test_the_place_of_a_left_out_document_is_filled():
    run = {"d1": {"d1": 0.9, "d2": 0.5, "d3": 0.5, "d4": 0.7}, "q": {"d1": 0.1, "d2": 0.2}}
    found = {query_id: list(scores) for query_id, scores in without_queries(run, 2).items()}
    assert found == {"d1": ["d4", "d3"], "q": ["d2", "d1"]}


# -- runs, comparisons, several datasets ----------------------------------------------------------


@pytest.fixture
def three(dataset: Path, tmp_path: Path) -> list[Path]:
    """Three datasets; the later ones judge fewer queries."""
    folders = [dataset]
    for name, lines in (("second", 4), ("third", 2)):
        folder = tmp_path / name
        shutil.copytree(dataset, folder)
        qrels = folder / "qrels" / "test.tsv"
        qrels.write_text("".join(qrels.read_text().splitlines(keepends=True)[:lines]))
        folders.append(folder)
    return folders


def test_a_run_file_scores_as_in_pytrec_eval(dataset, tmp_path):
    """Out of order, with wrong ranks, ties, a query that is not judged and one that is missing."""
    run = tmp_path / "given.trec"
    run.write_text(
        "q3 Q0 d3 1 0.5 x\nq3 Q0 d5 2 0.75 x\nq1 Q0 d7 9 1.0 x\nq1\tQ0\td1\t9\t1.0\tx\n"
        "q4 Q0 d1 1 2.0 x\nq1 Q0 d2 1 7.5 x\n"
    )
    metrics = {"nDCG@10": "ndcg_cut_10", "Recall@10": "recall_10", "MAP@100": "map_cut_100"}
    found = evaluate(dataset, {"given": run}, metrics=list(metrics), out=tmp_path / "out")
    qrels = {"q1": {"d1": 2, "d7": 1}, "q2": {"d4": 1, "gone": 1}, "q3": {"d5": 1, "d3": 0}}
    with run.open() as file:
        read = pytrec_eval.parse_run(file)
    reference = pytrec_eval.RelevanceEvaluator(qrels, set(metrics.values())).evaluate(read)
    for metric, name in metrics.items():
        mean = sum(reference[q][name] for q in qrels if q in reference) / 3
        assert found.systems["given"].metrics[metric] == pytest.approx(mean)
    assert found.systems["given"].dim is None
    assert read_run(tmp_path / "out/facts/runs/given.trec") == read_run(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 d1 1.0\n", r"a.trec:1: 3 columns, expected query, Q0, document"),
        ("q1 Q0 d1 1 high x\n", r"a.trec:1: score 'high' is not a number"),
        ("q1 Q0 d1 1 nan x\n", r"a.trec:1: the score is NaN"),
        ("q Q0 d 1 1 x\nq Q0 d 2 0 x\n", r"a.trec:2: query 'q' has document 'd' twice"),
        ("", r"a.trec holds no rankings"),
    ],
)
def test_a_faulty_run_file(dataset, tmp_path, text, message):
    (tmp_path / "a.trec").write_text(text)
    with pytest.raises(UserError, match=message):
        evaluate(dataset, {"a": tmp_path / "a.trec"})


def test_several_datasets_have_a_mean_and_a_summary(three, model, tmp_path):
    out = tmp_path / "out"
    results = evaluate(three, {"bm25": "bm25", "tiny": model}, out=out)
    assert (results.baseline, list(results.datasets)) == ("bm25", ["facts", "second", "third"])
    for metric in results.metrics:
        for name, system in results.systems.items():
            each = [d.systems[name].metrics[metric] for d in results.datasets.values()]
            assert system.metrics[metric] == pytest.approx(np.mean(each))
    assert results.systems["bm25"].against == {}
    mean = results.systems["tiny"].against["nDCG@10"]
    assert mean.difference == pytest.approx(
        results.systems["tiny"].metrics["nDCG@10"] - results.systems["bm25"].metrics["nDCG@10"]
    )
    assert mean.low <= mean.difference <= mean.high
    # corrected over the datasets, not over the mean, which is one test
    assert mean.p_holm == mean.p
    ps = [d.systems["tiny"].against["nDCG@10"] for d in results.datasets.values()]
    assert min(p.p_holm for p in ps) == pytest.approx(min(1.0, 3 * min(p.p for p in ps)))
    # a query alone has both signs equally far from 0
    assert ps[2].p == 1.0
    text = (out / "evaluation.md").read_text()
    for line in ("| facts | 3 | ", "| mean | 6 | ", "## third test: 1 queries, 8 documents"):
        assert line in text
    assert json.loads((out / "evaluation.json").read_text())["systems"]["tiny"]["dim"] == 64


def test_against_an_earlier_run_per_dataset(three, model, make_model, tmp_path):
    evaluate(three, {"old": model}, out=tmp_path / "old")
    pattern = str(tmp_path / "old" / "{dataset}" / "runs" / "old.trec")
    results = evaluate(three, {"new": make_model(3)}, against=pattern)
    assert (list(results.systems), results.baseline) == (["new", "old"], "old")
    assert list(results.systems["new"].against) == list(results.metrics)
    again = evaluate(three, {"same": pattern, "old": model}, against="old")
    same = again.systems["same"].against["nDCG@10"]
    assert (same.difference, same.p) == (0.0, 1.0)
    with pytest.raises(UserError, match=r"old.trec' is for one dataset, and there are 3; put {da"):
        evaluate(three, {"old": tmp_path / "old" / "facts" / "runs" / "old.trec"})


def test_a_repeated_call_takes_over_what_has_the_same_inputs(three, model, tmp_path, capsys):
    out = tmp_path / "out"
    first = evaluate(three, {"bm25": "bm25", "tiny": model}, out=out)
    written = (out / "evaluation.json").read_bytes()
    capsys.readouterr()
    assert evaluate(three, {"bm25": "bm25", "tiny": model}, out=out) == first
    assert (out / "evaluation.json").read_bytes() == written
    assert capsys.readouterr().err.count("as before") == 6
    # a changed judgement, and only there
    qrels = three[1] / "qrels" / "test.tsv"
    qrels.write_text(qrels.read_text().replace("q1\td1\t2", "q1\td1\t1"))
    changed = evaluate(three, {"bm25": "bm25", "tiny": model}, out=out)
    assert capsys.readouterr().err.count("as before") == 4
    assert changed.datasets["facts"] == first.datasets["facts"]
    # other options
    evaluate(three, {"bm25": "bm25", "tiny": model}, out=out, dim=8)
    assert capsys.readouterr().err.count("as before") == 3
    # the vectors go where that is asked for
    assert (out / "third" / "vectors").is_dir()
    evaluate(three, {"bm25": "bm25", "tiny": model}, out=out, drop_vectors=True)
    assert not list(out.glob("*/vectors"))


def test_scores_of_an_index_without_its_vectors_are_not_taken_over(
    dataset, model, tmp_path, capsys
):
    encode_corpus(dataset, model, tmp_path / "vectors")
    build_index(tmp_path / "vectors", tmp_path / "index", "binary")
    systems, out = {"i": tmp_path / "index"}, tmp_path / "out"
    (tmp_path / "vectors").rename(tmp_path / "away")
    evaluate(dataset, systems, out=out)
    rough = (out / "facts" / "runs" / "i.trec").read_text()
    (tmp_path / "away").rename(tmp_path / "vectors")
    evaluate(dataset, systems, out=out)
    assert (out / "facts" / "runs" / "i.trec").read_text() != rough
    capsys.readouterr()
    evaluate(dataset, systems, out=out)
    assert capsys.readouterr().err.count("as before") == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "{}", "[]", "half"])
def test_damaged_scores_and_facts_are_as_good_as_absent(dataset, tmp_path, capsys, damage):
    out = tmp_path / "out"
    first = evaluate(dataset, {"bm25": "bm25"}, out=out)
    files = [out / "facts" / "scores" / "bm25.json", out / "facts" / "facts.json"]
    sound = [json.loads(file.read_text()) for file in files]
    sound[0]["per_query"].popitem()
    sound[1]["facts"].popitem()
    for file, value in zip(files, sound, strict=True):
        text = {"cut": file.read_text()[:40], "empty": "", "half": json.dumps(value)}
        file.write_text(text.get(damage, damage))
    capsys.readouterr()
    assert evaluate(dataset, {"bm25": "bm25"}, out=out) == first
    assert "as before" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_ids_that_no_run_holds_are_refused_before_the_work(dataset, model, tmp_path, name):
    for file in (dataset / name, dataset / "qrels" / "test.tsv"):
        text = file.read_text().replace("d5", "d 5") if name == "corpus.jsonl" else file.read_text()
        file.write_text(text if name == "corpus.jsonl" else text.replace("q3", "q 3"))
    with pytest.raises(UserError, match=r"facts.*: the id '[dq] [35]' cannot stand in a TREC run"):
        evaluate(dataset, {"m": model}, out=tmp_path / "out")
    assert not (tmp_path / "out" / "facts" / "vectors").exists()


def test_a_killed_evaluation_goes_on_to_the_same_bytes(three, model, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "drama.cli", "evaluate", *map(str, three),
        "--system", "bm25", "--model", f"tiny={model}", "--out", str(out),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / "facts" / "scores" / "bm25.json").is_file():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "evaluation.json").exists()
    scored = out / "facts" / "scores" / "bm25.json"
    before = scored.stat().st_mtime_ns
    systems = {"bm25": "bm25", "tiny": str(model)}
    evaluate(three, systems, out=out)
    assert scored.stat().st_mtime_ns == before
    evaluate(three, systems, out=tmp_path / "undisturbed")
    for name in ("evaluation.json", "evaluation.md", "evaluation.svg", "third/runs/tiny.trec"):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_published_figures_stand_beside_a_set_of_the_published_size(dataset, tmp_path):
    """Of another size they are left out; the demo's SciFact is a quarter of the real one."""
    folder = tmp_path / "scifact"
    shutil.copytree(dataset, folder)
    with (folder / "corpus.jsonl").open("a") as file:
        file.writelines(f'{{"_id": "x{i}", "text": "filler {i}"}}\n' for i in range(5175))
    with (folder / "queries.jsonl").open("a") as file:
        file.writelines(f'{{"_id": "r{i}", "text": "filler {i}"}}\n' for i in range(297))
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.writelines(f"r{i}\tx{i}\t1\n" for i in range(297))
    results = evaluate(folder, {"bm25": "bm25", "DRAGON": "bm25"}, out=tmp_path / "out")
    assert results.datasets["scifact"].published["nDCG@10"]["Drama 0.1B"] == 0.757
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| Drama 0.1B ‡ |  | 0.757 |" in text
    assert "| DRAGON ‡ |  | 0.679 |" in text  # one of ours is called so
    assert "bge-base" not in text
