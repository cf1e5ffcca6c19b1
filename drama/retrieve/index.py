"""A FAISS index over a vectors folder.

    index.faiss  the FAISS index, inner product
    ids.txt      document ids, one a line, in the index's order
    meta.json    type, width, model and corpus

B queries, N documents, K results, D width.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from drama.errors import UserError, nearest
from drama.files import replacing_folder
from drama.retrieve.vectors import Vectors, read_ids, read_json, read_vectors, write_ids

FORMAT_VERSION = 1
TYPES = ("flat", "hnsw")
IndexType = Literal["flat", "hnsw"]
# Malkov and Yashunin 2018 (arXiv 1603.09320): links a node, and beam widths of build and search
HNSW_LINKS, HNSW_BUILD_BEAM, HNSW_SEARCH_BEAM = 32, 200, 128


@dataclass(frozen=True)
class IndexMeta:
    """What an index was built from. `max_tokens` is where documents were cut."""

    type: str
    dim: int
    rows: int
    model: str
    model_sha256: str
    corpus: str
    corpus_sha256: str
    max_tokens: int
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Index:
    """An index in memory: `faiss_index` numbers documents as `ids` does."""

    faiss_index: Any
    ids: list[str]
    meta: IndexMeta

    @classmethod
    def from_vectors(
        cls, vectors: Vectors, type: IndexType = "flat", dim: int | None = None
    ) -> Index:
        """Index vectors, cut to their first `dim` columns and normalised again.

        Raises:
            UserError: unknown type.
        """
        source = vectors.manifest
        dim = dim or source.dim
        if type == "flat":
            index: Any = faiss.IndexFlatIP(dim)
        elif type == "hnsw":
            index = faiss.IndexHNSWFlat(dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = HNSW_BUILD_BEAM
        else:
            raise UserError(
                f"unknown index type '{type}'{nearest(type, TYPES)}; there are {', '.join(TYPES)}"
            )
        for block_ND in vectors.blocks(dim):
            index.add(block_ND)
        meta = IndexMeta(
            type=type,
            dim=dim,
            rows=source.rows,
            model=source.model,
            model_sha256=source.model_sha256,
            corpus=source.corpus,
            corpus_sha256=source.corpus_sha256,
            max_tokens=source.max_tokens,
        )
        return cls(index, vectors.ids, meta)

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """Read an index folder.

        Raises:
            UserError: no index there, another format version, or files that disagree.
        """
        folder = Path(folder)
        if not is_index(folder):
            raise UserError(f"{folder} is no index folder (meta.json or index.faiss is missing)")
        value = read_json(folder / "meta.json")
        names = {field.name for field in dataclasses.fields(IndexMeta)}
        if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{folder}/meta.json: unknown format version; build the index again")
        if names != value.keys():
            wrong = min(names ^ value.keys())
            raise UserError(f"{folder}/meta.json: '{wrong}' is missing or unknown")
        meta = IndexMeta(**value)
        try:
            index = faiss.read_index(str(folder / "index.faiss"))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder}/index.faiss cannot be read: {reason}") from None
        if (index.d, index.ntotal) != (meta.dim, meta.rows):
            raise UserError(
                f"{folder}/index.faiss holds {index.ntotal} vectors of width {index.d}, meta.json "
                f"says {meta.rows} of width {meta.dim}; build the index again"
            )
        return cls(index, read_ids(folder / "ids.txt", meta.rows), meta)

    def search(self, q_BD: np.ndarray, k: int) -> tuple[np.ndarray, list[list[str]]]:
        """Return scores [B, K] float32, best first, and the ids of each query's results.

        K is `k`, or N where the index is smaller. A graph index may find fewer than K: then that
        query's list is shorter, and the scores past its end mean nothing.

        Raises:
            UserError: queries of another width than the index, or k below 1.
        """
        if q_BD.ndim != 2 or q_BD.shape[1] != self.meta.dim:
            raise UserError(
                f"queries of shape {q_BD.shape} do not fit an index of width {self.meta.dim}"
            )
        if k < 1:
            raise UserError(f"k {k} must be at least 1")
        if self.meta.type == "hnsw":
            self.faiss_index.hnsw.efSearch = max(k, HNSW_SEARCH_BEAM)
        scores_BK, rows_BK = self.faiss_index.search(
            np.ascontiguousarray(q_BD, np.float32), min(k, len(self.ids))
        )
        return scores_BK, [[self.ids[row] for row in rows if row >= 0] for rows in rows_BK]


def is_index(folder: str | Path) -> bool:
    """Whether the folder holds an index."""
    return all((Path(folder) / name).is_file() for name in ("meta.json", "index.faiss"))


def build_index(vectors_dir: str | Path, out: str | Path, type: IndexType = "flat") -> None:
    """Index a vectors folder into the folder `out`, whole or not at all.

    Args:
        type: flat (exact) or hnsw (approximate, for large corpora).

    Raises:
        UserError: unknown type, faulty vectors, or an `out` that holds something else.
    """
    out = Path(out)
    if out.exists() and not is_index(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no index; choose another folder")
    index = Index.from_vectors(read_vectors(vectors_dir), type)
    with replacing_folder(out) as folder:
        faiss.write_index(index.faiss_index, str(folder / "index.faiss"))
        write_ids(folder / "ids.txt", index.ids)
        meta = json.dumps(dataclasses.asdict(index.meta), indent=2)
        (folder / "meta.json").write_text(meta + "\n", encoding="utf-8")
