from __future__ import annotations

import io
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from rich.console import Console

from drama.encoder import Encoder
from drama.errors import UserError
from drama.retrieve.encode import encode_corpus
from drama.retrieve.evaluate import evaluate, score
from drama.retrieve.index import build_index
from drama.retrieve.run import without_queries, write_run


def test_score_of_a_case_done_by_hand():
    qrels = {"a": {"x": 2, "y": 1, "z": 0}, "b": {"w": 1}, "c": {"v": 1}}
    ranking = {f"n{i}": 1.0 - i / 100 for i in range(20)}
    run = {"a": {"z": 3.0, "y": 2.0, "x": 1.0}, "b": ranking | {"w": 0.895}}
    found = score(qrels, run)
    log = math.log2
    ideal = 2 / log(2) + 1 / log(3)
    assert found["nDCG@10"] == pytest.approx(
        {"a": (1 / log(3) + 2 / log(4)) / ideal, "b": 0.0, "c": 0.0}
    )
    assert found["Recall@100"] == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert found["MRR@10"] == {"a": 0.5, "b": 0.0, "c": 0.0}  # w stands at rank 12


def test_score_equals_pytrec_eval():
    chance = random.Random(0)
    documents = [f"d{i}" for i in range(300)]
    queries = [f"q{i}" for i in range(40)]
    qrels = {q: {d: chance.randint(0, 3) for d in chance.sample(documents, 12)} for q in queries}
    # scores of one digit: many ties
    run = {q: {d: chance.randint(0, 9) / 9 for d in chance.sample(documents, 150)} for q in queries}
    measures = {"ndcg_cut_10", "recall_100", "recip_rank"}
    reference = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    found = score(qrels, run)
    for q in queries:
        assert found["nDCG@10"][q] == reference[q]["ndcg_cut_10"]
        assert found["Recall@100"][q] == reference[q]["recall_100"]
        ranked = sorted(run[q], key=lambda d: (run[q][d], d), reverse=True)[:10]
        ranks = [rank for rank, d in enumerate(ranked, 1) if qrels[q].get(d, 0) > 0]
        assert found["MRR@10"][q] == (1 / ranks[0] if ranks else 0)


def test_evaluate_bm25_a_model_and_an_index(dataset, model, tmp_path):
    encode_corpus(dataset, model, tmp_path / "vectors")
    build_index(tmp_path / "vectors", tmp_path / "index")
    out = tmp_path / "out"
    systems = {"bm25": "bm25", "tiny": model, "tiny-index": tmp_path / "index"}
    results = evaluate(dataset, systems, out=out)

    assert (results.num_queries, results.num_documents, results.num_judgements) == (3, 8, 6)
    assert results.num_unknown_documents == 1
    bm25 = results.systems["bm25"]
    assert bm25.metrics["MRR@10"] == 1.0
    # q2 has a relevant document that the corpus lacks: it counts as missed
    assert bm25.per_query["Recall@100"] == {"q1": 1.0, "q2": 0.5, "q3": 1.0}
    assert results.systems["tiny"].metrics == results.systems["tiny-index"].metrics
    assert (bm25.dim, results.systems["tiny"].dim) == (None, 64)

    # the run file, read by trec_eval's code, gives the figures in the JSON
    stored = json.loads((out / "evaluation.json").read_text())
    qrels = {"q1": {"d1": 2, "d7": 1}, "q2": {"d4": 1, "gone": 1}, "q3": {"d5": 1, "d3": 0}}
    for name in systems:
        with (out / "runs" / f"{name}.trec").open() as file:
            run = pytrec_eval.parse_run(file)
        reference = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run)
        values = {q: reference[q]["ndcg_cut_10"] for q in qrels}
        assert stored["systems"][name]["per_query"]["nDCG@10"] == pytest.approx(values)
        mean = sum(values.values()) / 3
        assert stored["systems"][name]["metrics"]["nDCG@10"] == pytest.approx(mean)
    table = (out / "evaluation.md").read_text()
    assert f"| bm25 |  | **{bm25.metrics['nDCG@10']:.4f}** |" in table
    assert "6 judgements (1 of documents that the corpus lacks)" in table
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(results.table())
    assert f"{bm25.metrics['nDCG@10']:.4f}" in console.export_text()


def test_a_dense_run_ranks_by_cosine(dataset, model, tmp_path):
    evaluate(dataset, {"tiny": model}, out=tmp_path / "out", dim=16)
    encoder = Encoder.from_pretrained(model)
    documents = [json.loads(line) for line in (dataset / "corpus.jsonl").open()]
    texts = [f"{d['title']} {d['text']}".strip() for d in documents]
    query = "why do oceans have tides"
    cosines = (
        encoder.encode([query], "query", dim=16) @ encoder.encode(texts, "document", dim=16).T
    )[0]
    lines = [line.split() for line in (tmp_path / "out/runs/tiny.trec").read_text().splitlines()]
    found = [(line[2], float(line[4])) for line in lines if line[0] == "q3"]
    order = np.argsort(-cosines)
    assert [id_ for id_, _ in found] == [documents[i]["_id"] for i in order]
    np.testing.assert_allclose([s for _, s in found], cosines[order], atol=1e-5)


def test_repeated_calls_take_the_vectors_over_at_any_width(dataset, make_model, tmp_path):
    model = make_model(5)
    evaluate(dataset, {"m": model}, out=tmp_path / "out")
    stored = tmp_path / "out" / "vectors" / "m" / "vectors.npy"
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
        ({"bm25": "bm25"}, {"k": 50}, r"k 50 is too short for Recall@100; the least is 100"),
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


def test_bm25_on_the_demo_set(tmp_path):
    """The demo's corpus is a quarter of SciFact's, so the figure lies above the published 0.68."""
    demo = Path(__file__).parents[2] / "data" / "demo" / "scifact"
    results = evaluate(demo, {"bm25": "bm25"}, out=tmp_path)
    assert (results.num_queries, results.num_documents) == (300, 1200)
    assert results.num_unknown_documents == 0
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
        rows = (tmp_path / "out" / "runs" / f"{name}.trec").read_text().splitlines()
        assert rows
        assert "d1" not in {row.split()[2] for row in rows}


def test_the_place_of_a_left_out_document_is_filled():
    run = {"d1": {"d1": 0.9, "d2": 0.5, "d3": 0.5, "d4": 0.7}, "q": {"d1": 0.1, "d2": 0.2}}
    found = {query_id: list(scores) for query_id, scores in without_queries(run, 2).items()}
    assert found == {"d1": ["d4", "d3"], "q": ["d2", "d1"]}
