from __future__ import annotations

import json

import numpy as np
import pytest

from drama.errors import UserError
from drama.retrieve.encode import encode_corpus
from drama.retrieve.index import Index, build_index


@pytest.fixture
def vectors(dataset, model, tmp_path):
    return encode_corpus(dataset, model, tmp_path / "vectors")


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_search_equals_brute_force(vectors, tmp_path, kind):
    build_index(vectors.folder, tmp_path / "index", kind)
    index = Index.load(tmp_path / "index")
    q_BD = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    scores_BK, ids = index.search(q_BD, 3)
    expected_BN = q_BD.astype(np.float64) @ vectors.vectors_ND.astype(np.float64).T
    order = np.argsort(-expected_BN, axis=1)[:, :3]
    assert ids == [[vectors.ids[i] for i in row] for row in order]
    np.testing.assert_allclose(scores_BK, np.take_along_axis(expected_BN, order, 1), atol=1e-5)


def test_float16_vectors_and_a_cut_width(dataset, model, tmp_path):
    half = encode_corpus(dataset, model, tmp_path / "half", dtype="float16")
    index = Index.from_vectors(half, "flat", 16)
    q_BD = np.eye(16, dtype=np.float32)[:2]
    scores_BK, _ = index.search(q_BD, 8)
    cut = half.vectors_ND[:, :16].astype(np.float64)
    cut /= np.linalg.norm(cut, axis=1, keepdims=True)
    np.testing.assert_allclose(scores_BK, -np.sort(-cut[:, :2].T, axis=1), atol=1e-5)


def test_k_beyond_the_corpus_gives_all(vectors):
    scores_BK, ids = Index.from_vectors(vectors).search(np.ones((1, 64), np.float32), 100)
    assert scores_BK.shape == (1, 8)
    assert sorted(ids[0]) == sorted(vectors.ids)


def test_bad_queries(vectors):
    index = Index.from_vectors(vectors)
    with pytest.raises(UserError, match=r"queries of shape \(1, 32\) do not fit .* width 64"):
        index.search(np.ones((1, 32), np.float32), 1)
    with pytest.raises(UserError, match=r"k 0 must be at least 1"):
        index.search(np.ones((1, 64), np.float32), 0)


def test_unknown_type(vectors, tmp_path):
    with pytest.raises(UserError, match=r"unknown index type 'hnws' \(did you mean 'hnsw'\?\)"):
        build_index(vectors.folder, tmp_path / "index", "hnws")


def test_out_is_never_a_folder_of_something_else(vectors):
    with pytest.raises(UserError, match=r"vectors exists and is no index"):
        build_index(vectors.folder, vectors.folder)
    assert (vectors.folder / "vectors.npy").is_file()


def test_an_index_is_replaced_whole(vectors, tmp_path):
    build_index(vectors.folder, tmp_path / "index", "flat")
    build_index(vectors.folder, tmp_path / "index", "hnsw")
    assert Index.load(tmp_path / "index").meta.type == "hnsw"
    assert sorted(path.name for path in tmp_path.glob("*index*")) == ["index"]


def test_load_is_strict(vectors, tmp_path):
    folder = tmp_path / "index"
    with pytest.raises(UserError, match=r"index is no index folder"):
        Index.load(folder)
    build_index(vectors.folder, folder)
    meta = json.loads((folder / "meta.json").read_text())
    for change, message in [
        ({"dim": 32}, r"holds 8 vectors of width 64, meta\.json says 8 of width 32"),
        ({"format_version": 9}, r"meta\.json: unknown format version"),
        ({"extra": 1}, r"meta\.json: 'extra' is missing or unknown"),
    ]:
        (folder / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(UserError, match=message):
            Index.load(folder)
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "index.faiss").write_bytes(b"no index")
    with pytest.raises(UserError, match=r"index\.faiss cannot be read"):
        Index.load(folder)
