"""What can be evaluated: BM25, a model folder, an index folder, a TREC run file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bm25s

from drama.data.beir import corpus_file, read_corpus
from drama.errors import UserError
from drama.hf import model_sha256
from drama.retrieve.bm25 import K1, B, bm25_run
from drama.retrieve.corpus import Corpus
from drama.retrieve.encode import encode_corpus
from drama.retrieve.index import Index, is_index
from drama.retrieve.index_search import is_reranked
from drama.retrieve.models import Model, is_model, open_model
from drama.retrieve.run import Run, read_run, without_queries
from drama.retrieve.search import load_index_model

Kind = Literal["bm25", "model", "index", "run"]
PLACE = "{dataset}"  # in a path: the name of the dataset


@dataclass(frozen=True)
class System:
    """A system by name. `dim` and `max_tokens` are for models; None is the model's own."""

    name: str
    spec: str
    dim: int | None = None
    max_tokens: int | None = None

    def at(self, dataset: str) -> System:
        """The system for one dataset."""
        spec = self.spec.replace(PLACE, dataset)
        return System(self.name, spec, self.dim, self.max_tokens)

    def kind(self) -> Kind:
        """What the spec stands for.

        Raises:
            UserError: nothing.
        """
        path = Path(self.spec)
        if self.spec == "bm25":
            return "bm25"
        if is_index(path):
            return "index"
        if is_model(path):
            return "model"
        if path.is_file():
            return "run"
        raise UserError(
            f"system '{self.name}': '{self.spec}' is none; give 'bm25', a model folder (with "
            "config.json), an index folder (with meta.json) or a TREC run file"
        )

    def inputs(self) -> dict[str, Any]:
        """What the system's rankings are a function of, beside the data."""
        kind, options = self.kind(), {"dim": self.dim, "max_tokens": self.max_tokens}
        if kind == "bm25":
            return {"kind": kind, "k1": K1, "b": B, "bm25s": bm25s.__version__}
        if kind == "model":
            return {"kind": kind, "sha256": model_sha256(self.spec), **options}
        path = Path(self.spec)
        files = [path] if kind == "run" else sorted(p for p in path.rglob("*") if p.is_file())
        found = {"kind": kind, "sha256": [_sha256(file) for file in files], "dim": self.dim}
        return found | {"reranked": is_reranked(path)} if kind == "index" else found


def check_systems(systems: Sequence[System], datasets: Sequence[str]) -> None:
    """Refuse what is no system before any work begins.

    Raises:
        UserError: none at all, a bad name, a spec that is nothing, or one file or index for
            several datasets.
    """
    if not systems:
        raise UserError(
            "no system to evaluate; give 'bm25', a model folder, an index folder or a run file"
        )
    for system in systems:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", system.name):
            raise UserError(
                f"system name '{system.name}': letters, digits, '.', '_' and '-' make a name"
            )
        if PLACE in system.spec:
            for dataset in datasets:
                system.at(dataset).kind()
        elif system.kind() in ("run", "index") and len(datasets) > 1:
            raise UserError(
                f"system '{system.name}': '{system.spec}' is for one dataset, and there are "
                f"{len(datasets)}; put {PLACE} into the path, it stands for the dataset's name"
            )


def run_system(
    system: System, folder: Path, queries: dict[str, str], vectors_dir: Path, depth: int
) -> tuple[Run, int | None]:
    """Rank for each query, `depth` documents at most; and the width of the vectors.

    A document with the id of a query is left out of that query's ranking, as BEIR does; a run file
    is taken as it is.

    Raises:
        UserError: an index over another corpus or of another width, a width that does not fit the
            model, or a faulty run file.
    """
    kind, spec = system.kind(), system.spec
    if kind == "run":
        return read_run(spec), None
    if kind == "bm25":
        run = bm25_run(list(read_corpus(folder)), queries, depth + 1)
        return without_queries(run, depth), None
    if kind == "index":
        index = Index.load(spec)
        _check_index(index, spec, folder, system.dim)
        model = load_index_model(index)
    else:
        model = open_model(spec)
        model.check_dim(system.dim)
        vectors = encode_corpus(
            folder, model, vectors_dir, max_tokens=system.max_tokens, overwrite=True
        )
        index = Index.from_vectors(vectors, "flat", system.dim)
    run = _dense_run(index, model, queries, depth + 1)
    return without_queries(run, depth), index.meta.dim


def _dense_run(index: Index, model: Model, queries: dict[str, str], k: int) -> Run:
    q_BD = model.encode(list(queries.values()), "query", dim=index.meta.dim)
    scores_BK, ids = index.search(q_BD, k)
    return {
        query_id: {id_: float(s) for s, id_ in zip(scores, found, strict=False)}
        for query_id, scores, found in zip(queries, scores_BK, ids, strict=True)
    }


def _check_index(index: Index, spec: str, folder: Path, dim: int | None) -> None:
    if dim is not None and dim != index.meta.dim:
        raise UserError(f"{spec} is an index of width {index.meta.dim}, not {dim}; leave dim out")
    known, indexed = set(Corpus.scan(corpus_file(folder)).ids), set(index.ids)
    if known != indexed:
        example = min(known ^ indexed)
        where = "the dataset" if example in known else "the index"
        raise UserError(
            f"{spec} indexes another corpus: {len(indexed):,} documents, the dataset has "
            f"{len(known):,}, and '{example}' is only in {where}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
