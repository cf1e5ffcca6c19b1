"""mteb itself, on the demo's SciFact, against our own evaluation of the same folder."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

import drama
from drama.encoder import Encoder
from drama.errors import UserError
from drama.export import export
from drama.folder import RetrieverSettings
from drama.hf import model_sha256
from drama.retrieve.datasets import read_judged
from drama.retrieve.evaluate import evaluate
from drama.retrieve.measures import score
from drama.testing import tiny_llama

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")
PromptType = pytest.importorskip("mteb.types").PromptType
SCIFACT = Path(__file__).parents[2] / "data" / "demo" / "scifact"
DOCUMENTS, QUERIES = 300, 60  # of the sample: a tiny model takes a second for them


@pytest.fixture(scope="module")
def beir(tmp_path_factory):
    """A BEIR folder: queries of the sample, the documents they are judged on, and others."""
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    judged = [line.split("\t") for line in (SCIFACT / "qrels" / "test.tsv").open()][1:]
    queries = [json.loads(line) for line in (SCIFACT / "queries.jsonl").open()][:QUERIES]
    kept = {query["_id"] for query in queries}
    judged = [row for row in judged if row[0] in kept]
    queries = [query for query in queries if query["_id"] in {row[0] for row in judged}]
    relevant = {row[1] for row in judged}
    with gzip.open(SCIFACT / "corpus.jsonl.gz", "rt") as file:
        corpus = [json.loads(line) for line in file]
    others = [document for document in corpus if document["_id"] not in relevant]
    chosen = [d for d in corpus if d["_id"] in relevant] + others[:DOCUMENTS]
    for name, rows in (("corpus", chosen), ("queries", queries)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    head = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(head + "".join("\t".join(r) for r in judged))
    return folder


@pytest.fixture(scope="module")
def task(beir, monkeypatch_module):
    """A retrieval task of mteb's own kind that reads those files and nothing from the network."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalSciFact(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalSciFact",
            description="A part of SciFact, read from local files.",
            dataset={"path": "local/scifact", "revision": "1"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc=None, **_):
            rows = {
                name: [json.loads(line) for line in (beir / f"{name}.jsonl").open()]
                for name in ("corpus", "queries")
            }
            qrels = {}
            for line in itertools.islice((beir / "qrels" / "test.tsv").open(), 1, None):
                query, document, grade = line.split("\t")
                qrels.setdefault(query, {})[document] = int(grade)
            renamed = {
                name: [{"id": row.pop("_id"), **row} for row in found]
                for name, found in rows.items()
            }
            keys = {"corpus": ("id", "title", "text"), "queries": ("id", "text")}
            made = {
                name: datasets.Dataset.from_list([{k: row[k] for k in keys[name]} for row in found])
                for name, found in renamed.items()
            }
            self.dataset = {
                "default": {"test": {**made, "relevant_docs": qrels, "top_ranked": None}}
            }
            self.data_loaded = True

    return LocalSciFact()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield patch


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retriever")
    settings = RetrieverSettings(
        "mean", query_prefix="ask: ", document_prefix="text: ", max_tokens=128
    )
    encoder = Encoder.from_pretrained(tiny_llama(folder / "llama"), settings=settings)
    return export(encoder, folder / "exported")


def scores(model, task, **options) -> dict:
    """Those of mteb, which rounds them to five digits."""
    found = mteb.evaluate(
        model, tasks=[task], cache=None, co2_tracker=False, show_progress_bar=False, **options
    )
    return found.task_results[0].scores["test"][0]


def test_mteb_gives_our_own_figures(retriever, task, beir, tmp_path):
    theirs = scores(drama.mteb_model(retriever), task, prediction_folder=tmp_path)
    names = {"nDCG@10": "ndcg_at_10", "nDCG@100": "ndcg_at_100", "Recall@100": "recall_at_100",
             "MAP@100": "map_at_100"}  # fmt: skip
    ours = evaluate(beir, {"model": retriever}, metrics=tuple(names)).systems["model"].metrics
    assert theirs["main_score"] == theirs["ndcg_at_10"]
    (path,) = tmp_path.rglob("*predictions.json")
    run = json.loads(path.read_text())["default"]["test"]
    _, qrels = read_judged(beir, "test")
    whole = score(qrels, run, tuple(names))  # mteb's ranking, not rounded
    for metric, name in names.items():
        assert ours[metric] > 0.01
        assert fmean(whole[metric].values()) == pytest.approx(ours[metric], abs=1e-6)
        assert theirs[name] == pytest.approx(ours[metric], abs=6e-6)


def test_the_folder_itself_runs_in_mteb(retriever, task):
    library = pytest.importorskip("sentence_transformers")
    ours = scores(drama.mteb_model(retriever), task)
    theirs = scores(library.SentenceTransformer(str(retriever), device="cpu"), task)
    for name in ("main_score", "ndcg_at_100", "recall_at_100", "map_at_100"):
        assert theirs[name] == ours[name]


def test_prefixes_widths_and_lengths_reach_the_vectors(retriever, task):
    """mteb asks for queries and documents apart; a task without queries gets the document's."""
    encoder, texts = Encoder.from_pretrained(retriever), ["tides", "the moon " * 40]
    model = drama.mteb_model(retriever, dim=16, max_tokens=30)
    asked = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    for prompt_type, kind in ((PromptType.query, "query"), (PromptType.document, "document"),
                              (None, "document")):  # fmt: skip
        loader = [{"text": texts[:1]}, {"text": texts[1:], "id": ["2"]}]
        got = model.encode(loader, prompt_type=prompt_type, show_progress_bar=False, **asked)
        want = encoder.embed(encoder.tokenize(texts, kind, 30), dim=16)
        np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(UserError, match="task LocalSciFact has no texts"):
        model.encode([{"image": [1]}], **asked)


def test_mtebs_cache_tells_models_and_options_apart(retriever):
    metas = [
        drama.mteb_model(retriever, **options).mteb_model_meta
        for options in ({}, {"dim": 16}, {"max_tokens": 30}, {"precision": "bf16"})
    ]
    assert len({hash(meta) for meta in metas}) == 4
    assert {meta.revision for meta in metas} == {model_sha256(retriever)}
    with pytest.raises(UserError, match="dim 65 does not fit"):
        drama.mteb_model(retriever, dim=65)


def test_drama_stays_light_and_says_what_is_missing(retriever):
    code = (
        "import sys, drama; assert 'mteb' not in sys.modules and 'torch' not in sys.modules;"
        "sys.modules['mteb'] = None\n"
        "try: drama.mteb_model\n"
        "except drama.UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'drama-retriever[mteb]'" in done.stdout
