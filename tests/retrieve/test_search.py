from __future__ import annotations

import gzip
import json
import shutil

import numpy as np
import pytest
import pytrec_eval

from drama.encoder import Encoder
from drama.errors import UserError
from drama.retrieve.encode import encode_corpus
from drama.retrieve.index import build_index
from drama.retrieve.search import Hit, Searcher, search, search_file


@pytest.fixture
def index(dataset, model, tmp_path):
    own = shutil.copytree(model, tmp_path / "own-model")
    encode_corpus(dataset, own, tmp_path / "vectors", dim=32)
    build_index(tmp_path / "vectors", tmp_path / "index")
    return tmp_path / "index"


def test_hits_are_the_nearest_documents_with_their_texts(index, dataset, model):
    texts = ["what makes bread rise", "tides"]
    hits = search(index, texts, k=3)
    encoder = Encoder.from_pretrained(model)
    lines = [
        "Vaccines Vaccination trains the immune system to recognise a virus.",
        "Honey bees A colony of bees stores honey and pollinates the flowers around it.",
        "Volcanoes Magma rises through the crust and an eruption covers land with ash.",
        "Bread rises because yeast turns sugar into carbon dioxide.",
        "Tides The pull of the moon and the sun moves the water of the oceans.",
        "Photosynthesis Leaves turn light, water and carbon dioxide into sugar.",
        "Immune cells White blood cells recognise a virus and produce antibodies.",
        "Empty",
    ]
    for text, found in zip(texts, hits, strict=True):
        cosines = (
            encoder.encode([text], "query", dim=32) @ encoder.encode(lines, "document", dim=32).T
        )[0]
        order = np.argsort(-cosines)[:3]
        assert [hit.id for hit in found] == [f"d{i + 1}" for i in order]
        np.testing.assert_allclose([hit.score for hit in found], cosines[order], atol=1e-5)
        for hit in found:
            line = lines[int(hit.id[1:]) - 1]
            assert f"{hit.title} {hit.snippet}".strip() == line


def test_one_text_gives_one_list(index):
    assert search(index, "tides", k=2) == search(index, ["tides"], k=2)


def test_marks_are_words_of_the_query(index):
    (hits,) = search(index, ["Which tides move the ocean?"], k=8)
    hit = next(hit for hit in hits if hit.id == "d5")
    assert [hit.title[a:b] for a, b in hit.title_marks] == ["Tides"]
    assert [hit.snippet[a:b] for a, b in hit.marks] == ["moves", "oceans"]


def test_the_corpus_is_not_needed(index, dataset, tmp_path):
    before = search(index, "tides")
    shutil.rmtree(dataset)
    assert search(index, "tides") == before


def test_an_index_without_documents_gives_ids(index, tmp_path):
    build_index(tmp_path / "vectors", tmp_path / "bare", documents=False)
    assert search(tmp_path / "bare", "tides") == [
        [Hit(hit.id, hit.score, "", "") for hit in search(index, "tides")[0]]
    ]


@pytest.mark.parametrize("name", ["queries.jsonl", "queries.tsv", "queries.tsv.gz"])
def test_a_run_file(index, model, tmp_path, name):
    queries = {f"q{i}": f"question {i} of many" for i in range(7)}
    lines = [
        f"{id_}\t{text}\n" if ".tsv" in name else json.dumps({"_id": id_, "text": text}) + "\n"
        for id_, text in queries.items()
    ]
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt") as file:
        file.write("".join(lines))
    searcher = Searcher(index)
    assert search_file(searcher, tmp_path / name, tmp_path / "out.trec", 3, 1.0) == 7
    with (tmp_path / "out.trec").open() as file:
        run = pytrec_eval.parse_run(file)
    documents_ND = np.load(tmp_path / "vectors" / "vectors.npy")
    cosines_QN = Encoder.from_pretrained(model).encode(list(queries.values()), "query", dim=32) @ (
        documents_ND.T
    )
    for id_, cosines in zip(queries, cosines_QN, strict=True):
        best = np.argsort(-cosines)[:3]
        assert list(run[id_]) == [f"d{i + 1}" for i in best]
        np.testing.assert_allclose(list(run[id_].values()), cosines[best], atol=1e-5)


def test_a_bad_query_file(index, tmp_path):
    searcher, file = Searcher(index), tmp_path / "queries.tsv"
    for text, message in (
        ("q1 no tab\n", r"queries\.tsv:1: 1 columns, expected query id and text"),
        ("q1\ta\nq1\tb\n", r"queries\.tsv:2: query 'q1' stands in the file twice"),
        ("q1\t \n", r"queries\.tsv:1: query 'q1' is empty"),
        ("", r"queries\.tsv holds no queries"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            search_file(searcher, file, tmp_path / "out.trec", 3, 1.0)
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        search_file(searcher, tmp_path / "gone.jsonl", tmp_path / "out.trec", 3, 1.0)
    assert not (tmp_path / "out.trec").exists()


def test_what_no_run_can_be_written_of_is_refused_before_the_search(index, tmp_path, monkeypatch):
    searcher, file = Searcher(index), tmp_path / "queries.tsv"
    monkeypatch.setattr(searcher, "run", lambda *arguments: pytest.fail("searched"))
    file.write_text("q 1\tbees\n")
    with pytest.raises(UserError, match=r"queries\.tsv: the id 'q 1' cannot stand in a TREC run"):
        search_file(searcher, file, tmp_path / "out.trec", 3, 1.0)
    file.write_text("q1\tbees\n")
    with pytest.raises(UserError, match=r"queries\.tsv cannot be made: .*; choose another"):
        search_file(searcher, file, file / "out.trec", 3, 1.0)


def test_bad_input(index, dataset, make_model, tmp_path):
    with pytest.raises(UserError, match=r"query 2 of 2 is empty"):
        search(index, ["a", " "])
    with pytest.raises(UserError, match=r"facts is no index folder"):
        search(dataset, "a")

    own, other = tmp_path / "own-model", make_model(9)
    with pytest.raises(UserError, match=r"model-9 is not the model of the index, .*own-model"):
        Searcher(index, model=other)
    with pytest.raises(UserError, match=r"gone: not a model folder"):
        Searcher(index, model=tmp_path / "gone")
    weights = own / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(other.joinpath("model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"own-model has changed since the index was built"):
        search(index, "a")
    weights.write_bytes(sound)
    before = search(index, "a")
    shutil.move(own, tmp_path / "moved")
    with pytest.raises(UserError, match=r"own-model, which is not there; name its folder with"):
        search(index, "a")
    assert Searcher(index, model=tmp_path / "moved").search(["a"]) == before
