"""What the server does with a model and an index, HTTP apart. B texts, D width."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from drama.errors import UserError
from drama.retrieve.index import Index
from drama.retrieve.models import DOCUMENT_PROMPTS, TOKEN_BUDGET, Model, OurModel, open_model
from drama.retrieve.search import Searcher
from drama.serve.asked import EmbedRequest, RequestError, SearchRequest
from drama.serve.worker import GivenUpError, Stopping

STEP = 8  # texts that are embedded before asking whether anybody still waits
NARROW_BYTES = 2**28  # the most that an index of cut vectors may take


class Service:
    """A model, and an index where there is one.

    width: of vectors unless a request says otherwise. dims: the widths that a search can compare.

    Raises:
        UserError: neither model nor index, from `Searcher` or `open_model`, or a `dim` that fits
            neither.
    """

    def __init__(self, model: Path | None, index: Path | None, dim: int | None = None) -> None:
        if index is None and model is None:
            raise UserError("name a model with --model, or an index with --index")
        self.searcher = Searcher(index, model=model, graph=True) if index is not None else None
        self.model: Model = (
            self.searcher.encoder if self.searcher else open_model(model or ".", graph=True)
        )
        folder = Path(self.model.path).resolve()  # runs keep theirs in RUN/model
        self.name = folder.parent.name if folder.name == "model" else folder.name
        widest = self.searcher.index.meta.dim if self.searcher else self.model.dim
        if dim is not None and dim > widest:
            raise UserError(f"dim {dim} does not fit: {self.model.path} has up to {widest} here")
        self.width = dim or widest
        trained = {width for width in self.model.trained_dims if width < widest}
        self.dims = sorted({*trained, widest, self.width})
        self._indexes = {self.searcher.index.meta.dim: self.searcher.index} if self.searcher else {}
        if self.searcher and not self._can_narrow(self.searcher.index):
            if self.width != widest:
                raise UserError(f"{index} cannot be searched at another width than {widest}")
            self.dims = [widest]

    def embed(self, asked: EmbedRequest, stopping: Stopping) -> tuple[np.ndarray, int]:
        """Vectors [B, dim] and the number of tokens that the model read.

        Raises:
            RequestError: a width that the model does not have.
            GivenUpError: nobody waits any more.
        """
        try:
            dim = self.model.check_dim(asked.dim or self.width)
        except UserError:
            raise RequestError(
                422,
                f"'dimensions' {asked.dim} does not fit: 1 to {self.model.dim} do",
                "dimensions",
            ) from None
        limit, blocks, tokens = self.model.max_tokens, [], 0
        for start in range(0, len(asked.texts), STEP):
            if stopping():
                raise GivenUpError
            texts = asked.texts[start : start + STEP]
            prepared = self.model.prepare(texts, asked.kind, limit)
            blocks.append(self.model.embed(prepared, asked.kind, limit, dim, TOKEN_BUDGET))
            if self.model.unit == "tokens":
                tokens += sum(map(len, prepared))
            else:
                tokens += sum(min(self.model.count_tokens(text), limit) for text in texts)
        vectors_BD = np.concatenate(blocks)
        if not np.isfinite(vectors_BD).all():
            raise RequestError(
                500, "the model gives vectors that are not finite; its weights are broken"
            )
        return vectors_BD, tokens

    def search(self, asked: SearchRequest, stopping: Stopping) -> dict[str, Any]:
        """What `drama search --json` prints, the rows of the documents, and milliseconds.

        Raises:
            RequestError: no index, or a width that cannot be searched.
            GivenUpError: nobody waits any more.
        """
        if stopping():
            raise GivenUpError
        if self.searcher is None:
            raise RequestError(404, "no index is served; start with --index")
        dim = asked.dim or self.width
        if dim not in self.dims:
            choices = ", ".join(map(str, self.dims))
            raise RequestError(422, f"'dim' {dim} cannot be searched; there are {choices}", "dim")
        index = self._index(dim)
        model, limit = self.model, self.model.max_tokens
        times = [time.perf_counter()]

        def timed(value: Any) -> Any:
            times.append(time.perf_counter())
            return value

        prepared = timed(model.prepare([asked.text], "query", limit))
        q_BD = timed(model.embed(prepared, "query", limit, dim, TOKEN_BUDGET))
        scores_BK, rows_BK = timed(index.numbers(q_BD, asked.k))
        hits = timed(self.searcher.hits(asked.text, scores_BK[0], rows_BK[0]))
        rows = [int(row) for row in rows_BK[0] if row >= 0]
        names: tuple[str, ...] = ("tokenise", "encode", "search", "snippet")
        spent = [1000 * (end - start) for start, end in pairwise(times)]
        if model.unit != "tokens":  # sentence-transformers tokenises as it encodes
            names, spent = names[1:], spent[1:]
        return {
            "query": asked.text,
            "hits": [hit.to_json() | {"row": row} for hit, row in zip(hits, rows, strict=True)],
            "dim": dim,
            "ms": {name: round(ms, 3) for name, ms in zip(names, spent, strict=True)},
        }

    def document(self, row: int) -> dict[str, str]:
        """One document whole.

        Raises:
            RequestError: 404, no such row, or no copies of the documents.
        """
        if self.searcher is None or not 0 <= row < self.searcher.index.meta.rows:
            raise RequestError(404, f"there is no document {row}")
        document = self.searcher.document(row)
        if document is None:
            raise RequestError(404, "the index keeps no documents; build it without --no-documents")
        return {"id": document.id, "title": document.title, "text": document.text}

    def facts(self) -> dict[str, Any]:
        """What the page says of model and index; None where it is not known."""
        meta = self.searcher.index.meta if self.searcher else None
        return {
            **_model_facts(self.model),
            "width": self.model.dim,
            "trained_dims": list(self.model.trained_dims),
            "max_tokens": self.model.max_tokens,
            "dims": self.dims,
            "dim": self.width,
            "index": {"type": meta.type, "documents": meta.rows, "dim": meta.dim} if meta else None,
        }

    def _index(self, dim: int) -> Index:
        if dim not in self._indexes:
            self._indexes[dim] = self._indexes[max(self._indexes)].narrowed(dim)
        return self._indexes[dim]

    def _can_narrow(self, index: Index) -> bool:
        sizes = (dim * index.meta.rows * 4 for dim in self.dims if dim < index.meta.dim)
        return index.has_whole_vectors and sum(sizes) <= NARROW_BYTES


def _model_facts(model: Model) -> dict[str, Any]:
    if isinstance(model, OurModel):
        settings, config = model.encoder.settings, model.encoder.backbone.config
        return {
            "architecture": config.model_type,
            "layers": config.num_hidden_layers,
            "mask": settings.attention,
            "pooling": settings.pooling,
            "query_prefix": settings.query_prefix,
            "document_prefix": settings.document_prefix,
            "graph": model.graph is not None,
        }
    retriever: Any = getattr(model, "retriever", ())  # a list of sentence-transformers' modules
    config = next((m.auto_model.config for m in retriever if hasattr(m, "auto_model")), None)
    modes = (getattr(module, "pooling_mode", None) for module in retriever)
    prompts = getattr(retriever, "prompts", {})
    return {
        "architecture": getattr(config, "model_type", None),
        "layers": getattr(config, "num_hidden_layers", None),
        "mask": None,
        "pooling": next((str(mode) for mode in modes if mode), None),
        "query_prefix": prompts.get("query") or "",
        "document_prefix": next((prompts[n] for n in DOCUMENT_PROMPTS if prompts.get(n)), ""),
        "graph": False,
    }
