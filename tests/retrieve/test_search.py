from __future__ import annotations

import shutil

import numpy as np
import pytest

from drama.encoder import Encoder
from drama.errors import UserError
from drama.retrieve.encode import encode_corpus
from drama.retrieve.index import build_index
from drama.retrieve.search import SNIPPET, search


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


def test_long_texts_are_cut_at_a_word(jsonl, model, tmp_path):
    corpus = jsonl("long.jsonl", [{"_id": "a", "title": "T", "text": "word  and\n" * 100}])
    encode_corpus(corpus, model, tmp_path / "vectors")
    build_index(tmp_path / "vectors", tmp_path / "index")
    [[hit]] = search(tmp_path / "index", "word")
    assert len(hit.snippet) <= SNIPPET
    assert hit.snippet.endswith("word…") or hit.snippet.endswith("and…")
    assert "  " not in hit.snippet


def test_bad_input(index, dataset, make_model, tmp_path):
    with pytest.raises(UserError, match=r"query 2 of 2 is empty"):
        search(index, ["a", " "])
    with pytest.raises(UserError, match=r"facts is no index folder"):
        search(dataset, "a")

    corpus = dataset / "corpus.jsonl"
    text = corpus.read_text()
    corpus.write_text("\n".join(text.splitlines()[:2]) + "\n")
    with pytest.raises(UserError, match=r"corpus\.jsonl has changed .*: document 'd3' is gone"):
        search(index, "a")
    corpus.unlink()
    with pytest.raises(UserError, match=r"corpus\.jsonl, which is not there"):
        search(index, "a")
    corpus.write_text(text)

    weights = tmp_path / "own-model" / "model.safetensors"
    weights.write_bytes(make_model(9).joinpath("model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"own-model has changed since the index was built"):
        search(index, "a")
    shutil.rmtree(tmp_path / "own-model")
    with pytest.raises(UserError, match=r"built with the model .*own-model, which is not there"):
        search(index, "a")
