"""The types of index: what FAISS keeps for a document, and how far a search looks.

    type    what is kept                                  bytes a document, D wide
    flat    the vector; every one is compared             4 D
    hnsw    the vector, in a graph                        4 D + 272
    ivf     the vector, in lists                          4 D + 8
    int8    the vector in 8 bits a number                 D
    pq      a product quantiser's codes, in lists         D / 4 + 8
    rabitq  a bit a number and two scales, in lists       D / 8 + 16
    binary  the sign of each number                       D / 8

Sources: graphs, Malkov and Yashunin 2018 (arXiv 1603.09320); lists and product quantisers, Jégou et
al. 2011; RaBitQ, Gao and Long 2024 (arXiv 2405.12497); FAISS, Douze et al. 2024 (arXiv 2401.08281).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import faiss

from drama.errors import UserError, nearest

IndexType = Literal["flat", "hnsw", "ivf", "int8", "pq", "rabitq", "binary"]
# links a node, and beam widths of build and search
HNSW_LINKS, HNSW_BUILD_BEAM, HNSW_SEARCH_BEAM = 32, 200, 128
LIST_SAMPLE = 40  # documents to train on, a list; FAISS asks for 39
MOST_LISTS = 16_384
CODES = 256  # values of a product quantiser's byte
FLAT_ROWS = 200_000  # up to so many a scan of all takes a fraction of a second


@dataclass(frozen=True)
class Kind:
    """A type's facts.

    holds: whether the file holds whole vectors that can be read back by number.
    exact: whether the scores of the first stage are cosines of whole vectors.
    sample: documents that training takes at most, 0 for none; IVF types take more (`sample_size`).
    least: documents that it needs.
    candidates: how many a result are looked up in the vectors for re-ranking.
    """

    holds: bool = False
    exact: bool = False
    lists: bool = False
    sample: int = 0
    least: int = 1
    candidates: int = 1


KINDS: dict[str, Kind] = {
    "flat": Kind(holds=True, exact=True),
    "hnsw": Kind(holds=True, exact=True),
    "ivf": Kind(exact=True, lists=True, least=1_000),
    "int8": Kind(sample=65_536, candidates=2),
    "pq": Kind(lists=True, sample=LIST_SAMPLE * CODES, least=LIST_SAMPLE * CODES, candidates=10),
    "rabitq": Kind(lists=True, least=1_000, candidates=15),
    "binary": Kind(sample=65_536, candidates=40),
}
TYPES = tuple(KINDS)


def check_type(type: str, rows: int, where: str) -> None:
    """Refuse what cannot be built.

    Raises:
        UserError: unknown type, or fewer documents than the type trains on.
    """
    if type not in KINDS:
        raise UserError(
            f"unknown index type '{type}'{nearest(type, TYPES)}; there are {', '.join(TYPES)}"
        )
    if rows < (least := KINDS[type].least):
        raise UserError(
            f"{where}: an index of type {type} trains on {least:,} documents at least, here are "
            f"{rows:,}; take flat, or int8 where memory is short"
        )


def choose_type(rows: int, dim: int, memory: int) -> tuple[IndexType, str]:
    """The type that `auto` stands for on a machine of `memory` bytes, and why."""
    if rows <= FLAT_ROWS and rows * bytes_per_vector("flat", dim) <= memory // 4:
        return "flat", f"{rows:,} documents are few enough to compare all of them"
    needed = rows * bytes_per_vector("hnsw", dim)
    sizes = f"a graph over {rows:,} documents takes {needed / 2**30:.1f} GiB"
    if needed <= memory // 2:
        return "hnsw", f"{sizes}, at most half of the memory"
    if rows < KINDS["rabitq"].least:
        return "int8", f"{sizes}, more than half of the memory"
    return "rabitq", f"{sizes}, more than half of the memory"


def bytes_per_vector(type: str, dim: int) -> int:
    """About how many bytes a document takes in an index file."""
    return {
        "flat": 4 * dim,
        "hnsw": 4 * dim + 8 * HNSW_LINKS + 16,
        "ivf": 4 * dim + 8,
        "int8": dim,
        "pq": _sub_quantisers(dim) + 8,
        "rabitq": math.ceil(dim / 8) + 16,
        "binary": math.ceil(dim / 8),
    }[type]


def sample_size(type: str, rows: int) -> int:
    """How many of `rows` documents the type is trained on; 0 where nothing is trained."""
    kind = KINDS[type]
    lists = LIST_SAMPLE * _num_lists(rows) if kind.lists else 0
    return min(rows, max(kind.sample, lists))


def empty_index(type: str, dim: int, rows: int) -> Any:
    """A FAISS index for a corpus of `rows` documents, neither trained nor filled."""
    measure = faiss.METRIC_INNER_PRODUCT
    if type == "flat":
        return faiss.IndexFlatIP(dim)
    if type == "hnsw":
        index: Any = faiss.IndexHNSWFlat(dim, HNSW_LINKS, measure)
        index.hnsw.efConstruction = HNSW_BUILD_BEAM
        return index
    if type == "int8":
        return faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, measure)
    if type == "binary":  # above or below the median, for embeddings share a large mean
        return faiss.IndexLSH(dim, dim, False, True)
    lists = f"IVF{_num_lists(rows)}"
    if type == "ivf":
        return faiss.index_factory(dim, f"{lists},Flat", measure)
    if type == "rabitq":  # its bound needs a random rotation; FAISS draws the same one every time
        return faiss.index_factory(dim, f"RR{dim},{lists},RaBitQ", measure)
    assert type == "pq", type
    # np: not ordered for polysemous search, which takes minutes and is not used
    index = faiss.index_factory(dim, f"{lists},PQ{_sub_quantisers(dim)}np", measure)
    index.pq.cp.max_points_per_centroid = LIST_SAMPLE
    index.pq.cp.niter = 10
    return index


def look(index: Any, type: str, depth: int, effort: float) -> None:
    """Set how far a search for `depth` documents looks; all do it `effort` times as far."""
    if type == "hnsw":
        index.hnsw.efSearch = max(depth, math.ceil(HNSW_SEARCH_BEAM * effort))
    elif KINDS[type].lists:
        lists = faiss.extract_index_ivf(index)
        lists.nprobe = min(lists.nlist, math.ceil(2 * math.sqrt(lists.nlist) * effort))


def num_candidates(type: str, k: int, effort: float) -> int:
    """How many documents of the first stage are looked up for `k` results."""
    factor = KINDS[type].candidates
    # a few more than k of an exact one: FAISS' last bits depend on its blocks, ours do not
    return k + 10 if factor == 1 else max(k, math.ceil(factor * effort * max(k, 10)))


def _num_lists(rows: int) -> int:
    return max(1, min(round(4 * math.sqrt(rows)), rows // LIST_SAMPLE, MOST_LISTS))


def _sub_quantisers(dim: int) -> int:
    """A byte for four numbers, or for as few more as divide the width."""
    return next(m for m in range(max(1, dim // 4), 0, -1) if dim % m == 0)
