"""A FAISS index over a vectors folder: opening and searching one; `index.py` builds them.

    index-00000.faiss  the first documents, at most `rows_per_file`; and so on
    ids.txt            document ids, one a line, in the index's order
    documents.jsonl    {id, title, text}, one a line, in the same order; may be missing
    meta.json          type, width, rows, vectors, model and corpus

All of it is mapped: FAISS 1.15 maps every type of `index_types` (IO_FLAG_MMAP_IFC), so a folder may
be larger than memory. The first stage searches file after file and merges. Its candidates are then
scored again in float64 from whole vectors, and equal scores keep the corpus' order. So the results
do not depend on the number of files (but for graphs, one a file), of threads or of queries.

B queries, N documents, C candidates, K results, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from drama.console import console
from drama.errors import UserError
from drama.retrieve.index_types import (
    KINDS,
    IndexType,
    check_type,
    empty_index,
    look,
    num_candidates,
    sample_size,
)
from drama.retrieve.lines import Lines
from drama.retrieve.vectors import Vectors, VectorsManifest, cut, open_vectors, read_json

FORMAT_VERSION = 2
GATHER = 2**22  # numbers of whole vectors that are scored together, 48 MiB


@dataclass(frozen=True)
class IndexMeta:
    """What an index was built from. `max_tokens` is where documents were cut."""

    type: str
    dim: int
    rows: int
    rows_per_file: int
    vectors: str
    vectors_sha256: str  # of their manifest
    model: str
    model_sha256: str
    corpus: str
    corpus_sha256: str
    max_tokens: int
    documents: bool
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(
        cls,
        folder: Path,
        source: VectorsManifest,
        type: str,
        *,
        dim: int | None = None,
        rows_per_file: int | None = None,
        documents: bool = False,
    ) -> IndexMeta:
        """The facts of an index over the vectors of a folder."""
        return cls(
            type=type,
            dim=dim or source.dim,
            rows=source.rows,
            rows_per_file=rows_per_file or source.rows,
            vectors=str(folder.resolve()),
            vectors_sha256=manifest_sha256(source),
            model=source.model,
            model_sha256=source.model_sha256,
            corpus=source.corpus,
            corpus_sha256=source.corpus_sha256,
            max_tokens=source.max_tokens,
            documents=documents,
        )

    def file_names(self) -> list[str]:
        """Of the FAISS files, in the order of the documents."""
        return [f"index-{i:05d}.faiss" for i in range(-(-self.rows // self.rows_per_file))]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class Index:
    """An index that can be searched.

    files: FAISS indexes, each over the documents that follow those of the one before.
    ids: of the documents, by their number.
    vectors: the whole vectors, for re-ranking; None where the scores of the first stage stand.
    """

    files: list[Any]
    ids: Sequence[str]
    meta: IndexMeta
    vectors: Vectors | None = None

    @classmethod
    def from_vectors(
        cls, vectors: Vectors, type: IndexType = "flat", dim: int | None = None
    ) -> Index:
        """Index vectors in memory, cut to their first `dim` columns and normalised again.

        Raises:
            UserError: unknown type, or too few vectors for it.
        """
        meta = IndexMeta.of(vectors.folder, vectors.manifest, type, dim=dim)
        check_type(type, meta.rows, str(vectors.folder))
        index = trained_index(vectors, meta)
        for block_ND in vectors.blocks(meta.dim):
            index.add(block_ND)
        return cls([index], vectors.ids, meta, None if KINDS[type].holds else vectors)

    @classmethod
    def load(cls, folder: str | Path, *, rerank: bool | None = None) -> Index:
        """Open an index folder.

        Args:
            rerank: score the candidates again by the vectors folder that the index was built from,
                where the type does not hold whole vectors. None does so if that folder is there.

        Raises:
            UserError: no index there, another format version, files that disagree, or vectors that
                are not those of the index, or gone where `rerank` asks for them.
        """
        folder = Path(folder)
        meta = read_meta(folder)
        files = [_open_file(folder / name) for name in meta.file_names()]
        found = {index.d for index in files}, sum(index.ntotal for index in files)
        if found != ({meta.dim}, meta.rows):
            widths = ", ".join(map(str, sorted(found[0])))
            raise UserError(
                f"{folder} holds {found[1]} vectors of width {widths}, meta.json says {meta.rows} "
                f"of width {meta.dim}; build the index again"
            )
        ids = Lines(folder / "ids.txt")
        if len(ids) != meta.rows:
            raise UserError(
                f"{folder}/ids.txt holds {len(ids)} ids for {meta.rows} vectors; "
                "build the index again"
            )
        wanted = rerank is not False and not KINDS[meta.type].holds
        return cls(files, ids, meta, _whole_vectors(folder, meta, rerank) if wanted else None)

    def search(
        self, q_BD: np.ndarray, k: int, effort: float = 1.0
    ) -> tuple[np.ndarray, list[list[str]]]:
        """Return scores [B, K] float32, best first, and the ids of each query's results.

        K is `k`, or N where the index is smaller. Where an approximate index finds fewer, that
        query's list is shorter, and the scores past its end are -inf.

        Raises:
            UserError: from `numbers`.
        """
        scores_BK, rows_BK = self.numbers(q_BD, k, effort)
        return scores_BK, [[self.ids[row] for row in rows if row >= 0] for rows in rows_BK]

    def numbers(
        self, q_BD: np.ndarray, k: int, effort: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores [B, K] float32 and numbers [B, K] int64 of documents, best first; -1 is none.

        Scores are cosines, or what the type makes of them where nothing is re-ranked.

        Args:
            effort: how far an approximate index looks, as a multiple of its default: lists that are
                searched, the width of a graph's beam, and candidates for re-ranking.

        Raises:
            UserError: queries of another width than the index or not finite, k below 1, or an
                effort that is not positive.
        """
        if q_BD.ndim != 2 or q_BD.shape[1] != self.meta.dim:
            raise UserError(
                f"queries of shape {q_BD.shape} do not fit an index of width {self.meta.dim}"
            )
        if not np.isfinite(q_BD).all():
            raise UserError("a query's vector is not finite; the model's weights are broken")
        if k < 1:
            raise UserError(f"k {k} must be at least 1")
        if not 0 < effort < float("inf"):
            raise UserError(f"effort {effort} must be above 0; 1 is the default")
        q_BD = np.ascontiguousarray(q_BD, np.float32)
        k = min(k, self.meta.rows)
        whole = self.has_whole_vectors
        depth = min(num_candidates(self.meta.type, k, effort) if whole else k, self.meta.rows)
        scores_BC, rows_BC = self._first_stage(q_BD, depth, effort)
        if whole:
            scores_BC = self._cosines(q_BD, rows_BC)
        return _best(scores_BC, rows_BC, k)

    @property
    def has_whole_vectors(self) -> bool:
        """Whether whole vectors can be read, from the index or from the folder it was built of."""
        return KINDS[self.meta.type].holds or self.vectors is not None

    def narrowed(self, dim: int) -> Index:
        """A flat index over the first `dim` numbers of each whole vector, in memory.

        Raises:
            UserError: wider than the index, or whole vectors that are not there.
        """
        if not 1 <= dim <= self.meta.dim:
            raise UserError(f"dim {dim} does not fit an index of width {self.meta.dim}")
        if not self.has_whole_vectors:
            raise UserError(f"{self.meta.vectors}, the whole vectors, are needed to cut them")
        flat, step = faiss.IndexFlatIP(dim), max(1, GATHER // self.meta.dim)
        for start in range(0, self.meta.rows, step):
            rows_M = np.arange(start, min(start + step, self.meta.rows))
            flat.add(np.ascontiguousarray(cut(self._take(rows_M), dim)))
        meta = dataclasses.replace(self.meta, type="flat", dim=dim, rows_per_file=self.meta.rows)
        return Index([flat], self.ids, meta)

    def _first_stage(
        self, q_BD: np.ndarray, depth: int, effort: float
    ) -> tuple[np.ndarray, np.ndarray]:
        scores_BC = np.empty((len(q_BD), 0), np.float32)
        rows_BC = np.empty((len(q_BD), 0), np.int64)
        start = 0
        for index in self.files:
            look(index, self.meta.type, depth, effort)
            found_BC, local_BC = index.search(q_BD, min(depth, index.ntotal))
            if self.meta.type == "binary":
                # the angle that so many differing signs speak of, Charikar 2002
                found_BC = np.cos(np.pi / self.meta.dim * found_BC)
            scores_BC = np.concatenate(
                [scores_BC, np.where(local_BC < 0, -np.inf, found_BC)], axis=1, dtype=np.float32
            )
            rows_BC = np.concatenate([rows_BC, np.where(local_BC < 0, -1, local_BC + start)], 1)
            scores_BC, rows_BC = _best(scores_BC, rows_BC, depth)
            start += index.ntotal
        return scores_BC, rows_BC

    def _cosines(self, q_BD: np.ndarray, rows_BC: np.ndarray) -> np.ndarray:
        scores_BC = np.empty(rows_BC.shape, np.float32)
        step = max(1, GATHER // (rows_BC.shape[1] * self.meta.dim))
        for i in range(0, len(q_BD), step):
            rows_bC = rows_BC[i : i + step]
            wanted_M, places = np.unique(rows_bC, return_inverse=True)
            wholes_MD = self._take(np.maximum(wanted_M, 0))
            wholes_bCD = wholes_MD[places.reshape(rows_bC.shape)]
            # a sum along a row: its bits depend on nothing but the row, as a matrix product's do
            products_bCD = wholes_bCD.astype(np.float64) * q_BD[i : i + step, None]
            scores_BC[i : i + step] = products_bCD.sum(axis=2)
        scores_BC[rows_BC < 0] = -np.inf
        return scores_BC

    def _take(self, rows_M: np.ndarray) -> np.ndarray:
        """Whole vectors [M, D] of sorted row numbers."""
        if self.vectors is not None:
            return self.vectors.take(rows_M, self.meta.dim)
        parts, start = [], 0
        for index in self.files:
            first, last = np.searchsorted(rows_M, (start, start + index.ntotal))
            if last > first:
                parts.append(index.reconstruct_batch(rows_M[first:last] - start))
            start += index.ntotal
        return np.concatenate(parts)


def _best(scores_BC: np.ndarray, rows_BC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` best of each query; equal scores in the order of the rows."""
    order_BK = np.lexsort((rows_BC, -scores_BC), axis=1)[:, :k]
    best = (np.take_along_axis(values, order_BK, axis=1) for values in (scores_BC, rows_BC))
    return tuple(best)  # type: ignore[return-value]


def trained_index(vectors: Vectors, meta: IndexMeta) -> Any:
    """An empty FAISS index that was trained on a sample of the vectors, where its type is.

    The sample takes a row of each of as many equal stretches: the same ones every time.

    Raises:
        UserError: a vector of the sample that is not finite.
    """
    index = empty_index(meta.type, meta.dim, meta.rows)
    if size := sample_size(meta.type, meta.rows):
        shifts_M = np.random.default_rng(0).random(size)
        rows_M = ((np.arange(size) + shifts_M) * (meta.rows / size)).astype(np.int64)
        sample_MD = vectors.take(rows_M, meta.dim)
        check_finite(sample_MD, rows_M, vectors)
        index.train(sample_MD)
    return index


def check_finite(block_MD: np.ndarray, rows_M: Iterable[int], vectors: Vectors) -> None:
    """Refuse vectors with NaN or infinity.

    Raises:
        UserError: names the document.
    """
    finite_M = np.isfinite(block_MD).all(axis=1)
    if not finite_M.all():
        row = next(row for row, fine in zip(rows_M, finite_M, strict=True) if not fine)
        raise UserError(
            f"{vectors.folder}/vectors.npy: the vector of document '{vectors.ids[row]}' is "
            "not finite; encode again"
        )


def is_index(folder: str | Path) -> bool:
    """Whether the folder holds an index."""
    return all((Path(folder) / name).is_file() for name in ("meta.json", "ids.txt"))


def is_reranked(folder: Path) -> bool:
    """Whether an index folder is searched with whole vectors unless one says otherwise.

    Raises:
        UserError: from `read_meta`.
    """
    meta = read_meta(folder)
    return not KINDS[meta.type].holds and Path(meta.vectors).is_dir()


def manifest_sha256(manifest: VectorsManifest) -> str:
    """One hash for all that the vectors are a function of."""
    value = json.dumps(dataclasses.asdict(manifest), sort_keys=True)
    return hashlib.sha256(value.encode()).hexdigest()


def read_meta(folder: Path) -> IndexMeta:
    """Read an index folder's meta.json.

    Raises:
        UserError: no index there, another format version, keys that are missing or unknown, or
            values that no index has.
    """
    if not is_index(folder):
        raise UserError(f"{folder} is no index folder (meta.json or ids.txt is missing)")
    value = read_json(folder / "meta.json")
    names = {field.name for field in dataclasses.fields(IndexMeta)}
    if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder}/meta.json: unknown format version; build the index again")
    if names != value.keys():
        wrong = min(names ^ value.keys())
        raise UserError(f"{folder}/meta.json: '{wrong}' is missing or unknown")
    for name in ("dim", "rows", "rows_per_file"):
        if type(value[name]) is not int or value[name] < 1:
            raise UserError(
                f"{folder}/meta.json: {name} {value[name]!r} is no whole number above 0; "
                "build the index again"
            )
    if value["type"] not in list(KINDS):
        raise UserError(
            f"{folder}/meta.json: unknown index type {value['type']!r}; build the index again"
        )
    return IndexMeta(**value)


def _open_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is missing; build the index again")
    with path.open("rb") as file:  # FAISS would not tell a lack of rights from damage
        if not file.read(1):
            raise UserError(f"{path} is empty; build the index again")
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError:
        raise UserError(f"{path} is cut off or damaged; build the index again") from None


def _whole_vectors(folder: Path, meta: IndexMeta, rerank: bool | None) -> Vectors | None:
    source = Path(meta.vectors)
    if rerank is None and not source.is_dir():
        note = f"{folder}: {source} is not there, so nothing is re-ranked"
        console.print(note, markup=False, soft_wrap=True)
        return None
    if not source.is_dir():
        raise UserError(
            f"{source}, the vectors that {folder} was built from, are not there to re-rank with; "
            "bring them back or leave --rerank out"
        )
    vectors_ND, manifest = open_vectors(source)
    if manifest_sha256(manifest) != meta.vectors_sha256:
        raise UserError(
            f"{source} holds other vectors than those that {folder} was built from; build the "
            "index again, or search it with --no-rerank"
        )
    if (mapped := getattr(vectors_ND, "_mmap", None)) is not None:
        mapped.madvise(mmap.MADV_RANDOM)  # a row is a kilobyte or two, reading ahead brings 128
    return Vectors(source, vectors_ND, [], manifest)
