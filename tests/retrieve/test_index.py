from __future__ import annotations

import json
import shutil
import subprocess
import sys

import faiss
import numpy as np
import pytest

from drama.errors import UserError
from drama.retrieve import index as module
from drama.retrieve.encode import encode_corpus
from drama.retrieve.index import Index, build_index
from drama.retrieve.vectors import read_vectors


@pytest.fixture
def vectors(dataset, model, tmp_path):
    return encode_corpus(dataset, model, tmp_path / "vectors")


@pytest.mark.parametrize("kind", ["flat", "hnsw", "int8", "binary"])
def test_search_equals_brute_force(vectors, tmp_path, kind):
    build_index(vectors.folder, tmp_path / "index", kind)
    index = Index.load(tmp_path / "index")
    q_BD = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    scores_BK, ids = index.search(q_BD, 3)
    expected_BN = q_BD.astype(np.float64) @ vectors.vectors_ND.astype(np.float64).T
    order = np.argsort(-expected_BN, axis=1)[:, :3]
    assert ids == [[vectors.ids[i] for i in row] for row in order]
    np.testing.assert_allclose(scores_BK, np.take_along_axis(expected_BN, order, 1), atol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "int8"])
def test_float16_vectors_and_a_cut_width(dataset, model, tmp_path, kind):
    half = encode_corpus(dataset, model, tmp_path / "half", dtype="float16")
    index = Index.from_vectors(half, kind, 16)
    q_BD = np.eye(16, dtype=np.float32)[:2]
    scores_BK, _ = index.search(q_BD, 8)
    cut = half.vectors_ND[:, :16].astype(np.float64)
    cut /= np.linalg.norm(cut, axis=1, keepdims=True)
    np.testing.assert_allclose(scores_BK, -np.sort(-cut[:, :2].T, axis=1), atol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "int8"])
def test_a_narrowed_index_is_that_of_cut_vectors(vectors, tmp_path, kind):
    build_index(vectors.folder, tmp_path / "index", kind, rows_per_file=3)
    index = Index.load(tmp_path / "index")
    q_BD = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    scores_BK, ids = index.narrowed(16).search(q_BD, 8)
    want_BK, want_ids = Index.from_vectors(vectors, "flat", 16).search(q_BD, 8)
    assert ids == want_ids
    np.testing.assert_allclose(scores_BK, want_BK, atol=1e-6)
    with pytest.raises(UserError, match="dim 65 does not fit an index of width 64"):
        index.narrowed(65)
    if kind == "int8":
        with pytest.raises(UserError, match="the whole vectors, are needed to cut them"):
            Index.load(tmp_path / "index", rerank=False).narrowed(16)


def test_k_beyond_the_corpus_gives_all(vectors):
    scores_BK, ids = Index.from_vectors(vectors).search(np.ones((1, 64), np.float32), 100)
    assert scores_BK.shape == (1, 8)
    assert sorted(ids[0]) == sorted(vectors.ids)


@pytest.mark.parametrize("kind", ["flat", "int8", "binary"])
@pytest.mark.parametrize("rows_per_file", [None, 7])
def test_equal_scores_keep_the_order_of_the_corpus(tmp_path, save_vectors, kind, rows_per_file):
    rng = np.random.default_rng(3)
    vectors_ND = rng.normal(size=(60, 16)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    twins = np.sort(rng.choice(60, 25, replace=False))
    vectors_ND[twins] = vectors_ND[twins[0]]
    folder = save_vectors(tmp_path / "vectors", vectors_ND)
    build_index(folder, tmp_path / "index", kind, rows_per_file=rows_per_file, documents=False)
    for k in (3, 25):  # among them, more than asked for
        _, rows_BK = Index.load(tmp_path / "index").numbers(vectors_ND[twins[:1]], k)
        assert rows_BK.tolist() == [twins[:k].tolist()]


def test_bad_queries(vectors):
    index = Index.from_vectors(vectors)
    ones = np.ones((1, 64), np.float32)
    with pytest.raises(UserError, match=r"queries of shape \(1, 32\) do not fit .* width 64"):
        index.search(ones[:, :32], 1)
    with pytest.raises(UserError, match=r"k 0 must be at least 1"):
        index.search(ones, 0)
    with pytest.raises(UserError, match=r"effort 0 must be above 0"):
        index.search(ones, 1, effort=0)
    with pytest.raises(UserError, match=r"a query's vector is not finite"):
        index.search(ones * np.nan, 1)


def test_a_type_that_cannot_be_built(vectors, tmp_path):
    for kind, message in (
        ("hnws", r"unknown index type 'hnws' \(did you mean 'hnsw'\?\)"),
        ("ivf", r"vectors: .* type ivf trains on 1,000 documents at least, here are 8; take flat"),
    ):
        with pytest.raises(UserError, match=message):
            build_index(vectors.folder, tmp_path / "index", kind)
        with pytest.raises(UserError, match=message):
            Index.from_vectors(vectors, kind)
    with pytest.raises(UserError, match=r"rows_per_file 0 must be at least 1"):
        build_index(vectors.folder, tmp_path / "index", rows_per_file=0)
    assert not list(tmp_path.glob("*index*"))


def test_auto_says_what_it_takes_and_why(vectors, tmp_path, capsys):
    assert build_index(vectors.folder, tmp_path / "index").type == "flat"
    assert "index: type flat: 8 documents are few enough" in capsys.readouterr().err


def test_out_is_never_a_folder_of_something_else(vectors):
    with pytest.raises(UserError, match=r"vectors exists and is no index"):
        build_index(vectors.folder, vectors.folder)
    assert (vectors.folder / "vectors.npy").is_file()


def test_an_index_is_replaced_whole(vectors, tmp_path):
    build_index(vectors.folder, tmp_path / "index", "flat", rows_per_file=3)
    build_index(vectors.folder, tmp_path / "index", "hnsw")
    assert Index.load(tmp_path / "index").meta.type == "hnsw"
    assert sorted(path.name for path in tmp_path.glob("*index*")) == ["index"]
    assert len(list((tmp_path / "index").glob("*.faiss"))) == 1


def test_a_stopped_build_goes_on_to_the_same_bytes(vectors, tmp_path, monkeypatch, capsys):
    build_index(vectors.folder, tmp_path / "whole", "int8", rows_per_file=3)
    write, written = module._write, []

    def stopping(path, index):
        if path.name == "index-00001.faiss":
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, index)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", stopping)
        with pytest.raises(KeyboardInterrupt):
            build_index(vectors.folder, tmp_path / "index", "int8", rows_per_file=3)
    assert written == ["trained.faiss", "index-00000.faiss"]
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(module, "_write", lambda p, i: written.append(p.name) or write(p, i))
    build_index(vectors.folder, tmp_path / "index", "int8", rows_per_file=3)
    assert "going on after 1 of 3 files" in capsys.readouterr().err
    assert written[2:] == ["index-00001.faiss", "index-00002.faiss"]
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "index").iterdir()}
    for name in names:
        whole, again = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "index"))
        assert whole == again, name
    assert not list(tmp_path.glob(".*"))


def test_what_a_build_of_another_index_left_is_not_taken_over(vectors, tmp_path):
    left = tmp_path / ".index.building"
    left.mkdir()
    (left / "meta.json").write_text('{"type": "int8"}')
    (left / "index-00000.faiss").write_bytes(b"something else")
    build_index(vectors.folder, tmp_path / "index", "flat")
    assert Index.load(tmp_path / "index").meta.type == "flat"


@pytest.mark.parametrize("kind", ["flat", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite(tmp_path, save_vectors, kind, value):
    vectors_ND = np.eye(8, dtype=np.float32)
    vectors_ND[6, 2] = value
    folder = save_vectors(tmp_path / "vectors", vectors_ND)
    message = r"vectors/vectors\.npy: the vector of document 'd6' is not finite; encode again"
    with pytest.raises(UserError, match=message):
        build_index(folder, tmp_path / "index", kind, rows_per_file=3, documents=False)
    assert [path.name for path in tmp_path.iterdir()] == ["vectors"]


def test_vectors_that_are_not_whole(vectors, tmp_path):
    folder, out = vectors.folder, tmp_path / "index"
    manifest = (folder / "manifest.json").read_text()
    ids = (folder / "ids.txt").read_text()
    (folder / "ids.txt").write_text("d1\n")
    with pytest.raises(UserError, match=r"ids\.txt holds 1 ids for 8 vectors; encode again"):
        build_index(folder, out)
    (folder / "ids.txt").write_text(ids)
    (folder / "manifest.json").write_text(manifest.replace('"dim": 64', '"dim": 32'))
    with pytest.raises(UserError, match=r"holds float32 of shape \(8, 64\), the manifest says"):
        build_index(folder, out)
    (folder / "manifest.json").rename(folder / "progress.json")
    with pytest.raises(UserError, match=r"vectors is half-written: start the same encoding again"):
        build_index(folder, out)
    assert not list(tmp_path.glob("*index*"))


def test_the_corpus_is_copied_if_it_is_that_of_the_vectors(vectors, dataset, tmp_path):
    corpus, out = dataset / "corpus.jsonl", tmp_path / "index"
    build_index(vectors.folder, out)
    rows = [json.loads(line) for line in (out / "documents.jsonl").read_text().splitlines()]
    source = [json.loads(line) for line in corpus.read_text().splitlines()]
    assert [(r["id"], r.get("title", ""), r["text"]) for r in rows] == [
        (r["_id"], r["title"], r["text"]) for r in source
    ]
    corpus.write_text(corpus.read_text().replace("bees", "wasps"))
    with pytest.raises(UserError, match=r"corpus\.jsonl has changed since it was encoded"):
        build_index(vectors.folder, out)
    corpus.unlink()
    with pytest.raises(UserError, match=r"corpus\.jsonl .* is not there; with --no-documents"):
        build_index(vectors.folder, out)
    assert (out / "documents.jsonl").is_file()
    build_index(vectors.folder, out, documents=False)
    assert {path.name for path in out.iterdir()} == {
        "index-00000.faiss", "ids.txt", "ids.txt.offsets", "meta.json",
    }  # fmt: skip


def test_load_is_strict(vectors, tmp_path):
    folder = tmp_path / "index"
    with pytest.raises(UserError, match=r"index is no index folder"):
        Index.load(folder)
    build_index(vectors.folder, folder, rows_per_file=5)
    meta = json.loads((folder / "meta.json").read_text())
    for change, message in [
        ({"dim": 32}, r"holds 8 vectors of width 64, meta\.json says 8 of width 32"),
        ({"rows": 9}, r"holds 8 vectors of width 64, meta\.json says 9 of width 64"),
        ({"format_version": 1}, r"meta\.json: unknown format version"),
        ({"extra": 1}, r"meta\.json: 'extra' is missing or unknown"),
        ({"rows_per_file": 0}, r"meta\.json: rows_per_file 0 is no whole number above 0"),
        ({"rows": "8"}, r"meta\.json: rows '8' is no whole number above 0"),
        ({"type": "flot"}, r"meta\.json: unknown index type 'flot'"),
        ({"type": []}, r"meta\.json: unknown index type \[\]"),
    ]:
        (folder / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(UserError, match=message):
            Index.load(folder)
    (folder / "meta.json").write_text(json.dumps(meta))
    for name, fault in (
        ("ids.txt", "do not fit"),
        ("ids.txt.offsets", "do not fit"),
        ("index-00001.faiss", "is cut off or damaged; build the index again$"),
    ):
        sound = (folder / name).read_bytes()
        (folder / name).write_bytes(sound[: len(sound) // 2 // 8 * 8])
        with pytest.raises(UserError, match=rf"{name.removesuffix('.offsets')} .*{fault}"):
            Index.load(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=name.removesuffix(".offsets")):
            Index.load(folder)
        (folder / name).write_bytes(sound)
    for content, fault in ((b"no index", "is cut off or damaged"), (b"", "is empty")):
        (folder / "index-00000.faiss").write_bytes(content)
        with pytest.raises(UserError, match=rf"index-00000\.faiss {fault}; build the index again$"):
            Index.load(folder)
    (folder / "index-00000.faiss").unlink()
    with pytest.raises(UserError, match=r"index-00000\.faiss is missing; build the index again$"):
        Index.load(folder)


LIMITED = """
import resource, sys
import faiss, numpy as np
from drama.retrieve.index_search import Index

def anonymous():
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmData:")[1].split()[0])

q_BD = np.load(sys.argv[2])
Index.load(sys.argv[3]).numbers(q_BD, 10)  # what threads and libraries take
limit = anonymous() + 48 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for name in sys.argv[4:]:
    np.save(sys.argv[1] + "/" + name, Index.load(sys.argv[1] + "/" + name).numbers(q_BD, 10)[1])
try:
    faiss.read_index(sys.argv[1] + "/flat/index-00000.faiss")
except (RuntimeError, MemoryError) as error:
    print("unmapped it does not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA")
def test_an_index_larger_than_the_memory_is_searched(tmp_path, save_vectors):
    """Under a limit on memory that is not mapped from a file, less than half of the index."""
    rng = np.random.default_rng(0)
    vectors_ND = rng.normal(size=(250_000, 128)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    save_vectors(tmp_path / "vectors", vectors_ND)
    save_vectors(tmp_path / "few", vectors_ND[:100])
    np.save(tmp_path / "q.npy", vectors_ND[:40])
    for kind, vectors in (("flat", "vectors"), ("int8", "vectors"), ("small", "few")):
        build_index(
            tmp_path / vectors, tmp_path / kind, kind.replace("small", "flat"), documents=False
        )
    assert (tmp_path / "flat" / "index-00000.faiss").stat().st_size > 120 * 2**20
    program = [sys.executable, "-c", LIMITED, tmp_path, tmp_path / "q.npy", tmp_path / "small"]
    done = subprocess.run([*program, "flat", "int8"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "unmapped it does not fit\n"
    scores_BN = vectors_ND[:40] @ vectors_ND.T
    best_BK = np.argsort(-scores_BN, axis=1)[:, :10]
    np.testing.assert_array_equal(np.load(tmp_path / "flat.npy"), best_BK)
    found = np.load(tmp_path / "int8.npy")
    assert np.mean([len({*a} & {*b}) for a, b in zip(found, best_BK, strict=True)]) > 9.8


def test_a_moved_index_still_works(vectors, tmp_path):
    build_index(vectors.folder, tmp_path / "index", "int8")
    shutil.move(tmp_path / "index", tmp_path / "elsewhere")
    index = Index.load(tmp_path / "elsewhere", rerank=True)
    assert index.ids[-1] == "d8"
    assert list(index.ids) == list(read_vectors(vectors.folder).ids)
    with pytest.raises(IndexError):
        index.ids[8]
    assert faiss.downcast_index(index.files[0]).ntotal == 8
