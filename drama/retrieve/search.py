"""Search an index with text: encode with the index's own model, look up what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drama.data.records import Document
from drama.encoder import Encoder
from drama.errors import UserError
from drama.hf import model_sha256
from drama.retrieve.corpus import read_documents
from drama.retrieve.encode import load_encoder
from drama.retrieve.index import Index

SNIPPET = 200  # characters


@dataclass(frozen=True)
class Hit:
    """One result. `score` is the cosine of query and document."""

    id: str
    score: float
    title: str
    snippet: str


def search(index_dir: str | Path, texts: str | Sequence[str], k: int = 10) -> list[list[Hit]]:
    """Return the `k` best documents of each text, best first; one text gives one list.

    Raises:
        UserError: no index, an empty query, a model or a corpus that is gone or not the one that
            the index was built from.
    """
    queries = [texts] if isinstance(texts, str) else list(texts)
    for number, query in enumerate(queries):
        if not query.strip():
            raise UserError(f"query {number + 1} of {len(queries)} is empty")
    index = Index.load(index_dir)
    q_BD = load_index_model(index).encode(queries, "query", dim=index.meta.dim)
    scores_BK, ids = index.search(q_BD, k)
    documents = _find_documents(index, {id_ for found in ids for id_ in found})
    return [
        [_hit(documents[id_], float(score)) for score, id_ in zip(scores, found, strict=False)]
        for scores, found in zip(scores_BK, ids, strict=True)
    ]


def load_index_model(index: Index) -> Encoder:
    """Load the model that an index was built with.

    Raises:
        UserError: it is gone, or its files have changed since.
    """
    meta = index.meta
    if not Path(meta.model).is_dir():
        raise UserError(f"the index was built with the model {meta.model}, which is not there")
    if model_sha256(meta.model) != meta.model_sha256:
        raise UserError(
            f"the model {meta.model} has changed since the index was built; encode and index again"
        )
    encoder = load_encoder(meta.model)
    if encoder.dim < meta.dim:
        raise UserError(f"{meta.model} is {encoder.dim} wide, the index {meta.dim}; build it again")
    return encoder


def _find_documents(index: Index, wanted: set[str]) -> dict[str, Document]:
    """Read the corpus until all wanted documents were met."""
    path = Path(index.meta.corpus)
    if not path.is_file():
        raise UserError(f"the index was built from the corpus {path}, which is not there")
    found: dict[str, Document] = {}
    for document in read_documents(path):
        if document.id in wanted:
            found[document.id] = document
            if len(found) == len(wanted):
                return found
    if missing := wanted - found.keys():
        raise UserError(
            f"{path} has changed since the index was built: document '{min(missing)}' is gone; "
            "encode and index again"
        )
    return found


def _hit(document: Document, score: float) -> Hit:
    text = " ".join(document.text.split())
    snippet = text if len(text) <= SNIPPET else text[: SNIPPET - 1].rsplit(" ", 1)[0] + "…"
    return Hit(document.id, score, document.title, snippet)
