"""Every type on clustered vectors, against brute force in numpy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest

from drama import cli_search
from drama.errors import UserError
from drama.retrieve.index import Index, build_index
from drama.retrieve.index_types import (
    TYPES,
    bytes_per_vector,
    check_type,
    choose_type,
    empty_index,
    sample_size,
)
from drama.retrieve.vectors import read_vectors

ROWS, DIM = 12_000, 32
# least recall@10: with the whole vectors, and by the first stage alone
RECALL = {
    "flat": (1.0, 1.0),
    "hnsw": (0.98, 0.98),
    "ivf": (0.98, 0.98),
    "int8": (0.995, 0.95),
    "pq": (0.97, 0.6),
    "rabitq": (0.97, 0.55),
    "binary": (0.93, 0.3),
}
LOSSY = ("int8", "pq", "rabitq", "binary")


def normalised(x_ND):
    return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory, save_vectors):
    """A vectors folder, queries near some of its rows, and their exact scores in float64."""
    folder = tmp_path_factory.mktemp("types")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(300, DIM)) + 0.4
    vectors_ND = normalised(
        centres[rng.integers(300, size=ROWS)] + 0.6 * rng.normal(size=(ROWS, DIM))
    )
    save_vectors(folder / "vectors", vectors_ND)
    picked_BD = vectors_ND[rng.choice(ROWS, 100)]
    q_BD = normalised(picked_BD + 0.05 * rng.normal(size=picked_BD.shape))
    return folder, q_BD, q_BD.astype(np.float64) @ vectors_ND.astype(np.float64).T


@pytest.fixture(scope="module", params=TYPES)
def built(world, request):
    folder = world[0]
    build_index(folder / "vectors", folder / request.param, request.param, documents=False)
    return request.param, folder / request.param


def recall(rows_BK, scores_BN):
    best = np.argsort(-scores_BN, axis=1)[:, :10]
    return np.mean([len({*a} & {*b}) / 10 for a, b in zip(rows_BK[:, :10], best, strict=True)])


def test_recall_and_scores(world, built):
    kind, folder = built
    _, q_BD, expected_BN = world
    index = Index.load(folder)
    scores_BK, rows_BK = index.numbers(q_BD, 10)
    raw_scores_BK, raw_BK = Index.load(folder, rerank=False).numbers(q_BD, 10)
    found, raw = recall(rows_BK, expected_BN), recall(raw_BK, expected_BN)
    assert found >= RECALL[kind][0]
    assert raw >= RECALL[kind][1]
    assert found >= raw
    assert (index.vectors is not None) == (kind in (*LOSSY, "ivf"))
    # exact scores: those of numpy, and to the bit those of the flat index
    np.testing.assert_allclose(scores_BK, np.take_along_axis(expected_BN, rows_BK, 1), atol=1e-6)
    exact = Index.from_vectors(read_vectors(world[0] / "vectors"), "flat")
    for scores, rows, *flat in zip(scores_BK, rows_BK, *exact.numbers(q_BD, 30), strict=True):
        of_row = dict(zip(flat[1], flat[0], strict=True))
        assert all(of_row.get(row, score) == score for row, score in zip(rows, scores, strict=True))
        assert len(of_row.keys() & set(rows)) >= 5
    assert (np.diff(scores_BK, axis=1) <= 0).all()
    # what a first stage alone calls a score is an estimate of the cosine; a sign counts from the
    # median, so binary's is of the centred vectors
    error = np.abs(raw_scores_BK - np.take_along_axis(expected_BN, raw_BK, 1)).mean()
    assert error < (0.2 if kind in LOSSY else 1e-6)


def test_a_query_alone_gets_the_bits_that_it_gets_in_a_batch(world, built):
    index = Index.load(built[1])
    scores_BK, rows_BK = index.numbers(world[1], 10)
    for i in (0, 57):
        alone_scores, alone_rows = index.numbers(world[1][i : i + 1], 10)
        np.testing.assert_array_equal(alone_scores[0], scores_BK[i])
        np.testing.assert_array_equal(alone_rows[0], rows_BK[i])


def test_the_number_of_files_changes_nothing(world, built):
    kind, folder = built
    build_index(
        world[0] / "vectors", folder.with_name("cut"), kind, rows_per_file=5_000, documents=False
    )
    assert len(list(folder.with_name("cut").glob("index-*.faiss"))) == 3
    whole, cut = Index.load(folder), Index.load(folder.with_name("cut"))
    if kind == "hnsw":  # a graph a file: others are found, not fewer
        assert recall(cut.numbers(world[1], 10)[1], world[2]) >= RECALL[kind][0]
        return
    for effort in (0.2, 1):
        for a, b in zip(
            whole.numbers(world[1], 30, effort), cut.numbers(world[1], 30, effort), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_effort_buys_recall(world, built):
    kind, folder = built
    index = Index.load(folder)
    least, most = (recall(index.numbers(world[1], 10, e)[1], world[2]) for e in (0.02, 8))
    if kind == "flat":
        assert least == most == 1
    elif kind == "hnsw":  # its beam is never narrower than what is asked for
        assert most >= max(least, 0.99)
    else:
        assert most > max(least, 0.99)


def test_the_table_of_bytes_is_what_the_files_take(world, built):
    kind, folder = built
    file = folder / "index-00000.faiss"
    faiss.write_index(_emptied(file), str(folder.with_name("empty.faiss")))
    size = file.stat().st_size - folder.with_name("empty.faiss").stat().st_size
    assert size / ROWS == pytest.approx(bytes_per_vector(kind, DIM), rel=0.03)


def _emptied(file: Path):
    index = faiss.read_index(str(file))
    index.reset()
    return index


def test_built_twice_gives_the_same_bytes(world, built):
    kind, folder = built
    if kind == "hnsw":
        pytest.skip("threads link the nodes of a graph in no fixed order")
    again = folder.with_name(f"{kind}-again")
    build_index(world[0] / "vectors", again, kind, documents=False)
    for name in ("index-00000.faiss", "meta.json", "ids.txt"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_vectors_that_changed_or_went(world, built, tmp_path, save_vectors, capsys):
    kind, folder = built
    own = shutil.copytree(folder, tmp_path / "own")
    meta = json.loads((own / "meta.json").read_text())
    source = tmp_path / "vectors"

    def load(**options):
        (own / "meta.json").write_text(json.dumps(meta | {"vectors": str(source)}))
        return Index.load(own, **options)

    if kind in ("flat", "hnsw"):  # hold them
        assert load().vectors is None
        return
    assert load().vectors is None
    said = " ".join(capsys.readouterr().err.split())
    assert said == f"{own}: {source} is not there, so nothing is re-ranked"
    with pytest.raises(
        UserError, match=r"vectors, the vectors that .*own was built from, are not there"
    ):
        load(rerank=True)
    save_vectors(source, np.eye(DIM, dtype=np.float32))
    with pytest.raises(UserError, match=r"vectors holds other vectors than .* --no-rerank"):
        load()
    assert load(rerank=False).vectors is None


def test_auto():
    gib = 2**30
    assert choose_type(5_000, 768, 16 * gib)[0] == "flat"
    assert choose_type(200_000, 768, 16 * gib)[0] == "flat"
    kind, why = choose_type(1_000_000, 768, 16 * gib)
    assert kind == "hnsw"
    assert why == "a graph over 1,000,000 documents takes 3.1 GiB, at most half of the memory"
    kind, why = choose_type(10_000_000, 768, 16 * gib)
    assert kind == "rabitq"
    assert why.endswith("takes 31.1 GiB, more than half of the memory")
    assert choose_type(500, 768, 2**20)[0] == "int8"  # too few to train lists


def test_training_is_bounded():
    assert [sample_size(kind, 10**9) for kind in ("flat", "hnsw", "int8", "binary")] == [
        0, 0, 65_536, 65_536,
    ]  # fmt: skip
    assert {sample_size(kind, 10**9) for kind in ("ivf", "pq", "rabitq")} == {40 * 16_384}
    assert empty_index("ivf", 8, 10**6).nlist == 4_000
    assert empty_index("ivf", 8, 1_000).nlist == 25


def test_too_few_documents():
    with pytest.raises(UserError, match=r"V: .* pq trains on 10,240 documents at least, here are"):
        check_type("pq", 10_239, "V")
    with pytest.raises(UserError, match=r"here are 999; take flat, or int8"):
        check_type("rabitq", 999, "V")


def test_the_command_line_offers_all_types():
    assert set(cli_search.TYPES) == {"auto", *TYPES}
