"""The teacher: a retriever that ranks a whole corpus for each query.

Documents are encoded once, into `vectors.npy` [N, D] float16 of a folder that jobs on the same
corpus share; a killed run goes on where it stood. The search is exact unless told otherwise: the
vectors are mapped and go through FAISS in blocks, so the memory does not grow with the corpus.

B queries, N documents, K results, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from drama.augment.corpus import Corpus, Draw, inputs_sha256, write_corpus
from drama.console import console
from drama.data.sources import Source
from drama.distributed import Ranks
from drama.errors import UserError
from drama.files import locked, replacing
from drama.hf import model_sha256
from drama.retrieve.fill import Window, begin_vectors, fill_vectors
from drama.retrieve.index import Index
from drama.retrieve.index_types import HNSW_SEARCH_BEAM
from drama.retrieve.models import Encode, open_model
from drama.retrieve.vectors import BLOCK, Vectors, VectorsManifest, open_vectors

Search = Literal["flat", "hnsw"]
WINDOW = 2048  # documents that are encoded, and recorded as done, together
OWN_SETTING = "the teacher's own"


@dataclass(frozen=True)
class Retrieval:
    """What is searched, and by whom.

    model: a folder of ours or any that sentence-transformers loads.
    work: the folder for corpus and vectors; jobs on the same corpus should share it.
    search: flat is exact; hnsw is approximate, for corpora of many millions on a CPU.
    draw: which part of the sources is the corpus; None: all of them.
    """

    sources: tuple[Source, ...]
    model: str
    work: Path
    text_column: str | None = None
    search: Search = "flat"
    draw: Draw | None = None

    @cached_property
    def model_sha256(self) -> str:
        """See `drama.hf.model_sha256`; read once, a teacher may have gigabytes.

        Raises:
            UserError: no such model.
        """
        return model_sha256(self.model)

    def about(self) -> dict[str, Any]:
        """Plain values that change whenever a ranking may."""
        return {
            "corpus": [source.path for source in self.sources],
            "corpus_files": inputs_sha256(self.sources, self.text_column, self.draw),
            "teacher": str(Path(self.model).resolve()),
            "teacher_sha256": self.model_sha256,
            "search": self.search,
        }

    def read(self) -> Corpus:
        """Read the corpus, without a teacher, as far as that was not done before.

        Raises:
            UserError: from `write_corpus`, or another job is at it.
        """
        with self._locked():
            return self._corpus()

    def open(self, ranks: Ranks | None = None) -> tuple[Corpus, Teacher]:
        """Read and encode the corpus, as far as that was not done before.

        ranks: who shares the encoding; every rank calls this.

        Raises:
            UserError: from `write_corpus` and `Teacher`, or another job is at it.
        """
        device = None if ranks is None else ranks.device
        # before hours of reading
        sha256, encode = self.model_sha256, open_model(self.model, device=device).encode
        with nullcontext() if ranks and not ranks.is_main else self._locked():
            if ranks is not None:
                ranks.on_main(self._write)
            corpus = self._corpus()
            folder = self.work / f"vectors-{sha256[:12]}"
            name = Path(self.model).name
            teacher = Teacher(encode, name, sha256, corpus, folder, self.search, ranks)
        return corpus, teacher

    def _write(self) -> None:
        self._corpus()

    def _locked(self) -> AbstractContextManager[None]:
        self.work.mkdir(parents=True, exist_ok=True)
        return locked(self.work / ".lock")

    def _corpus(self) -> Corpus:
        folder = self.work / "corpus"
        return write_corpus(self.sources, folder, text_column=self.text_column, draw=self.draw)


class Teacher:
    """A corpus' vectors, and the model that made them and makes those of the queries.

    Args:
        encode: the model. name, sha256: of its folder, for the manifest of the vectors.
        folder: for the vectors; what a killed run has left there is gone on with.
        ranks: who shares the encoding; every rank makes the same teacher.

    Raises:
        UserError: too little disk, vectors of another corpus in the folder, or a model that gives
            vectors with NaN.
    """

    def __init__(
        self,
        encode: Encode,
        name: str,
        sha256: str,
        corpus: Corpus,
        folder: Path,
        search: Search = "flat",
        ranks: Ranks | None = None,
    ) -> None:
        self.encode = encode
        manifest = VectorsManifest(
            model=name,
            model_sha256=sha256,
            corpus=corpus.folder.name,
            corpus_sha256=corpus.sha256,
            rows=len(corpus),
            kind="document",
            max_tokens=0,
            dim=self.encode(["width"], "document").shape[1],
            dtype="float16",
            compute_dtype=OWN_SETTING,
            window=WINDOW,
            token_budget=0,
        )

        def windows(numbers: Iterable[int]) -> Iterator[Window]:
            for number in numbers:
                batch = next(corpus.batches(WINDOW, number * WINDOW))
                texts = [item.document.full_text for item in batch]
                yield Window(number, texts, [item.number for item in batch])

        if ranks is None:
            begin_vectors(folder, manifest)
        else:
            ranks.on_main(partial(begin_vectors, folder, manifest))
        fill_vectors(folder, windows, self._rounded, unit="characters", ranks=ranks)
        self.vectors_ND, self.manifest = open_vectors(folder)
        self._graph = _graph(folder, self.vectors_ND, self.manifest) if search == "hnsw" else None

    def embed(self, queries: Sequence[str]) -> np.ndarray:
        """Vectors of queries, [B, D] float32 of norm 1."""
        if not queries:
            return np.empty((0, self.manifest.dim), np.float32)
        return np.ascontiguousarray(self.encode(queries, "query"), np.float32)

    def search(self, queries: Sequence[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
        """`nearest` of the queries' vectors."""
        return self.nearest(self.embed(queries), depth)

    def nearest(self, q_BD: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Document numbers [B, K] int64 and cosines [B, K] float32, best first.

        K is `depth`, or N where the corpus is smaller. A graph may find fewer: its lists end in
        numbers of -1. The result depends on the queries and on which of them come together (the
        last bits of a vector do), so a job that must repeat itself asks in the same batches.
        """
        depth = min(depth, len(self.vectors_ND))
        if self._graph is None:
            return self._exact(q_BD, depth)
        self._graph.hnsw.efSearch = max(depth, HNSW_SEARCH_BEAM)
        scores_BK, numbers_BK = self._graph.search(q_BD, depth)
        return numbers_BK, scores_BK

    def cosines(self, q_BD: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """The cosine of each query with the document beside it, [B], as the search would give it
        if the document were in the corpus."""
        cosines_B: np.ndarray = np.einsum("bd,bd->b", q_BD, self._rounded(texts).astype(np.float32))
        return cosines_B

    def _rounded(self, texts: Sequence[str]) -> np.ndarray:
        return self.encode(texts, "document").astype(np.float16)

    def _exact(self, q_BD: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        scores_BK = np.empty((len(q_BD), 0), np.float32)
        numbers_BK = np.empty((len(q_BD), 0), np.int64)
        for start in range(0, len(self.vectors_ND), BLOCK):
            block_ND = np.ascontiguousarray(self.vectors_ND[start : start + BLOCK], np.float32)
            found_BK, rows_BK = faiss.knn(
                q_BD, block_ND, min(depth, len(block_ND)), metric=faiss.METRIC_INNER_PRODUCT
            )
            scores_BK = np.concatenate([scores_BK, found_BK], axis=1)
            numbers_BK = np.concatenate([numbers_BK, rows_BK + start], axis=1)
            best_BK = np.argsort(-scores_BK, axis=1, kind="stable")[:, :depth]
            scores_BK = np.take_along_axis(scores_BK, best_BK, axis=1)
            numbers_BK = np.take_along_axis(numbers_BK, best_BK, axis=1)
        return numbers_BK, scores_BK


def _graph(folder: Path, vectors_ND: np.ndarray, manifest: VectorsManifest) -> Any:
    """The HNSW index, built once: threads link its nodes in no fixed order."""
    path = folder / "hnsw.faiss"
    if not path.is_file():
        console.print(f"{folder}: building the graph", markup=False, soft_wrap=True)
        index = Index.from_vectors(Vectors(folder, vectors_ND, [], manifest), "hnsw")
        with replacing(path) as temporary:
            faiss.write_index(index.files[0], str(temporary))
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); remove it") from None
