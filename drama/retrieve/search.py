"""Search an index with text: encode with the index's own model, look up what was found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drama.console import progress
from drama.data.beir import read_query_file
from drama.data.records import Document
from drama.errors import UserError
from drama.hf import model_sha256
from drama.retrieve.index import Index
from drama.retrieve.lines import Lines
from drama.retrieve.models import Model, open_model
from drama.retrieve.run import Run, check_ids, write_run
from drama.retrieve.snippet import Spans, marks, query_words, snippet

BATCH = 256  # queries of a file that are searched together
TAG = "drama"  # of a run file


@dataclass(frozen=True)
class Hit:
    """One result. `score` is the cosine of query and document.

    title_marks, marks: (start, end) of words of the query, in the title and in the snippet.
    """

    id: str
    score: float
    title: str
    snippet: str
    title_marks: Spans = ()
    marks: Spans = ()

    def to_json(self) -> dict[str, Any]:
        """A plain object of all fields."""
        return dataclasses.asdict(self)


class Searcher:
    """An open index with its model and its documents; asked again and again.

    Args:
        model: a folder with the index's model, where it is no longer where it was.
        rerank: see `Index.load`.
        graph: see `open_model`; it takes longer to open, which only many queries repay.

    Raises:
        UserError: no index, or a model that is gone or not the one that the index was built with.
    """

    def __init__(
        self,
        index_dir: str | Path,
        *,
        model: Path | None = None,
        rerank: bool | None = None,
        graph: bool = False,
    ) -> None:
        self.index = Index.load(index_dir, rerank=rerank)
        self.encoder = load_index_model(self.index, model, graph=graph)
        kept = self.index.meta.documents
        self.documents = Lines(Path(index_dir) / "documents.jsonl") if kept else None

    def search(self, texts: Sequence[str], k: int = 10, effort: float = 1.0) -> list[list[Hit]]:
        """The `k` best documents of each text, best first. `effort`: see `Index.numbers`.

        Raises:
            UserError: an empty query.
        """
        check_queries(texts)
        scores_BK, rows_BK = self.index.numbers(self._embed(texts), k, effort)
        return list(map(self.hits, texts, scores_BK, rows_BK))

    def hits(self, text: str, scores_K: np.ndarray, rows_K: np.ndarray) -> list[Hit]:
        """The documents of these numbers (-1 is none), with the words of `text` marked."""
        words = query_words(text)
        return [
            self._hit(int(row), float(score), words)
            for score, row in zip(scores_K, rows_K, strict=True)
            if row >= 0
        ]

    def run(self, queries: dict[str, str], k: int, effort: float = 1.0) -> Run:
        """The rankings of many queries, id to text."""
        run: Run = {}
        pairs = list(queries.items())
        with progress() as bar:
            task = bar.add_task("search", total=len(pairs), note="")
            for start in range(0, len(pairs), BATCH):
                ids, texts = zip(*pairs[start : start + BATCH], strict=True)
                scores_BK, found = self.index.search(self._embed(texts), k, effort)
                for id_, scores, documents in zip(ids, scores_BK, found, strict=True):
                    run[id_] = dict(zip(documents, map(float, scores), strict=False))
                bar.update(task, advance=len(ids))
        return run

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.encoder.encode(list(texts), "query", dim=self.index.meta.dim)

    def document(self, row: int) -> Document | None:
        """The document of a number; None where the index keeps no copies."""
        return Document(**json.loads(self.documents[row])) if self.documents is not None else None

    def _hit(self, row: int, score: float, words: frozenset[str]) -> Hit:
        document = self.document(row)
        if document is None:
            return Hit(self.index.ids[row], score, "", "")
        text, spans = snippet(document.text, words)
        title = document.title
        return Hit(document.id, score, title, text, marks(title, words), spans)


def search(index_dir: str | Path, texts: str | Sequence[str], k: int = 10) -> list[list[Hit]]:
    """Return the `k` best documents of each text, best first; one text gives one list.

    Raises:
        UserError: no index, an empty query, a model that is gone or not the one that the index was
            built with.
    """
    queries = [texts] if isinstance(texts, str) else list(texts)
    check_queries(queries)
    return Searcher(index_dir).search(queries, k)


def search_file(searcher: Searcher, queries: Path, out: Path, k: int, effort: float) -> int:
    """Search for each query of a file, write a TREC run file, and return the number of queries.

    Raises:
        UserError: from `read_query_file`, an id with white space, or an `out` that cannot be
            written.
    """
    asked = read_query_file(queries)
    check_ids(asked, queries)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent} cannot be made: {error.strerror}; choose another") from None
    write_run(searcher.run(asked, k, effort), out, TAG)
    return len(asked)


def check_queries(texts: Sequence[str]) -> None:
    """Refuse queries that are empty or no text.

    Raises:
        UserError: names the query by its number.
    """
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"query {number} of {len(texts)} is empty")
        try:
            text.encode()
        except UnicodeEncodeError:  # surrogates, which stand for bytes that could not be read
            raise UserError(f"query {number} of {len(texts)} is not valid UTF-8") from None


def load_index_model(index: Index, model: Path | None = None, *, graph: bool = False) -> Model:
    """Load the model that an index was built with, from `model` where that is given.

    graph: see `open_model`.

    Raises:
        UserError: it is gone, its files have changed since, or `model` is another one.
    """
    meta = index.meta
    folder = model or Path(meta.model)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: not a model folder"
            if model
            else f"the index was built with the model {meta.model}, which is not there; "
            "name its folder with --model"
        )
    if model_sha256(folder) != meta.model_sha256:
        raise UserError(
            f"{folder} is not the model of the index, which was built with {meta.model}"
            if model
            else f"the model {meta.model} has changed since the index was built; encode and index "
            "again"
        )
    loaded = open_model(folder, graph=graph)
    if loaded.dim < meta.dim:
        raise UserError(f"{folder} is {loaded.dim} wide, the index {meta.dim}; build it again")
    return loaded
