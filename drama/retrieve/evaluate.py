"""Evaluate retrieval systems on a BEIR folder: runs, metrics as trec_eval counts them, a table.

OUT/evaluation.json  metrics, per query too, so that significance can be computed later
OUT/evaluation.md    the table
OUT/runs/NAME.trec   the rankings
OUT/vectors/NAME/    a dense system's vectors, at full width; a repeated call takes them over
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import ir_measures
from ir_measures import RR, R, nDCG
from rich.table import Table

from drama.console import console
from drama.data.beir import read_corpus, read_qrels, read_queries
from drama.data.records import Document
from drama.encoder import Encoder
from drama.errors import UserError
from drama.files import replacing
from drama.retrieve.bm25 import bm25_run
from drama.retrieve.encode import check_dim, encode_corpus, load_encoder
from drama.retrieve.index import Index, is_index
from drama.retrieve.run import Run, without_queries, write_run
from drama.retrieve.search import load_index_model

METRICS = ("nDCG@10", "Recall@100", "MRR@10")
DEPTH = 100  # the deepest rank that a metric looks at

Qrels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class SystemResult:
    """One system's figures. `dim` is the width of its vectors, None for a lexical system."""

    spec: str
    dim: int | None
    metrics: dict[str, float]
    per_query: dict[str, dict[str, float]]  # metric -> query id -> value


@dataclass(frozen=True)
class Results:
    """All systems on one split. Metrics are means over the queries that the qrels judge."""

    dataset: str
    split: str
    k: int
    num_documents: int
    num_queries: int
    num_judgements: int
    num_unknown_documents: int  # judged, but not in the corpus; they count as missed, as ever
    systems: dict[str, SystemResult]

    def table(self) -> Table:
        """The table for the console; the best value of each metric is bold."""
        title = f"{self.dataset} {self.split}: {self.num_queries:,} queries, " + (
            f"{self.num_documents:,} documents"
        )
        table = Table("system", "dim", *METRICS, title=title)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self._rows("[bold]", "[/bold]"):
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The same table in Markdown."""
        header = ("system", "dim", *METRICS)
        rows = [header, ("---", *["---:"] * (len(header) - 1)), *self._rows("**", "**")]
        body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        note = (
            f"{self.dataset}, split {self.split}: {self.num_queries:,} queries, "
            f"{self.num_documents:,} documents, {self.num_judgements:,} judgements"
        )
        if self.num_unknown_documents:
            note += f" ({self.num_unknown_documents:,} of documents that the corpus lacks)"
        return f"{body}\n\n{note}. Rankings cut at {self.k:,}.\n"

    def to_json(self) -> str:
        """The JSON text of all fields."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def _rows(self, before: str, after: str) -> list[tuple[str, ...]]:
        best = {m: max(system.metrics[m] for system in self.systems.values()) for m in METRICS}
        rows = []
        for name, system in self.systems.items():
            values = [
                f"{before}{value:.4f}{after}"
                if value == best[metric] and len(self.systems) > 1
                else f"{value:.4f}"
                for metric, value in system.metrics.items()
            ]
            rows.append((name, f"{system.dim:,}" if system.dim else "", *values))
        return rows


def evaluate(
    dataset_dir: str | Path,
    systems: Mapping[str, str | Path],
    *,
    split: str = "test",
    out: Path | None = None,
    dim: int | None = None,
    max_tokens: int | None = None,
    k: int = 100,
) -> Results:
    """Run each system over a split's judged queries and score it. A document with the id of a
    query is left out of that query's ranking, as BEIR does.

    Args:
        dataset_dir: a BEIR folder.
        systems: name -> "bm25", a model folder, or an index folder over this dataset's corpus.
        split: the qrels to use.
        out: where runs, vectors and figures are kept (see the top of the file); None keeps nothing.
        dim: cut dense vectors to this width (Matryoshka); an index must have it already.
        max_tokens: where a model folder's documents are cut; default the model's.
        k: length of the rankings, at least 100.

    Raises:
        UserError: a faulty dataset, a name or a spec that is no system, an index over another
            corpus or of another width, k below 100.
    """
    folder = Path(dataset_dir)
    if k < DEPTH:
        raise UserError(f"k {k} is too short for {METRICS[1]}; the least is {DEPTH}")
    specs = {name: _check_system(name, spec) for name, spec in systems.items()}
    if not specs:
        raise UserError("no system to evaluate; give 'bm25', a model folder or an index folder")
    qrels = read_qrels(folder, split)
    texts = read_queries(folder)
    for query_id in qrels:
        if query_id not in texts:
            raise UserError(f"{folder}: qrels {split} judge query '{query_id}', which is unknown")
    queries = {query_id: texts[query_id] for query_id in qrels}
    documents = list(read_corpus(folder))
    if not documents:
        raise UserError(f"{folder} holds no documents")
    num_unknown = _count_unknown(qrels, documents, f"{folder} {split}")

    keep = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with keep as place:
        figures = {}
        for name, spec in specs.items():
            run, width = _run(
                spec,
                folder,
                documents,
                queries,
                Path(place) / "vectors" / name,
                dim=dim,
                max_tokens=max_tokens,
                k=k + 1,
            )
            run = without_queries(run, k)
            if out is not None:
                write_run(run, Path(out) / "runs" / f"{name}.trec", tag=name)
            per_query = score(qrels, run)
            means = {metric: fmean(values.values()) for metric, values in per_query.items()}
            figures[name] = SystemResult(str(spec), width, means, per_query)
    results = Results(
        dataset=folder.resolve().name,
        split=split,
        k=k,
        num_documents=len(documents),
        num_queries=len(qrels),
        num_judgements=sum(map(len, qrels.values())),
        num_unknown_documents=num_unknown,
        systems=figures,
    )
    if out is not None:
        _write(results, Path(out))
    return results


def score(qrels: Qrels, run: Run) -> dict[str, dict[str, float]]:
    """Per-query nDCG@10 (linear gain), Recall@100 and MRR@10: metric -> query id -> value.

    A judged query that the run lacks scores 0. All three come from trec_eval's code, so ties are
    broken alike; MRR@10 takes its reciprocal rank where that is at least 1/10.
    """
    values: dict[str, dict[str, float]] = {metric: dict.fromkeys(qrels, 0.0) for metric in METRICS}
    names = dict(zip((nDCG @ 10, R @ DEPTH, RR), METRICS, strict=True))
    for found in ir_measures.pytrec_eval.iter_calc(names, qrels, run):
        beyond = found.measure == RR and found.value < 0.1
        values[names[found.measure]][found.query_id] = 0.0 if beyond else found.value
    return values


def _check_system(name: str, spec: str | Path) -> str | Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"system name '{name}': letters, digits, '.', '_' and '-' make a name")
    if str(spec) == "bm25" or is_index(spec) or (Path(spec) / "config.json").is_file():
        return spec
    raise UserError(
        f"system '{name}': '{spec}' is none; give 'bm25', a model folder (with config.json) or an "
        "index folder (with meta.json)"
    )


def _count_unknown(qrels: Qrels, documents: list[Document], where: str) -> int:
    known = {document.id for document in documents}
    unknown = [id_ for grades in qrels.values() for id_ in grades if id_ not in known]
    if unknown:
        console.print(
            f"{where}: {len(unknown):,} judgements name documents that the corpus lacks "
            f"('{unknown[0]}' first); they count as missed"
        )
    return len(unknown)


def _run(
    spec: str | Path,
    folder: Path,
    documents: list[Document],
    queries: dict[str, str],
    vectors_dir: Path,
    *,
    dim: int | None,
    max_tokens: int | None,
    k: int,
) -> tuple[Run, int | None]:
    """Return a system's run and the width of its vectors."""
    if str(spec) == "bm25":
        return bm25_run(documents, queries, k), None
    if is_index(spec):
        index = Index.load(spec)
        _check_index(index, spec, documents, dim)
        return _dense_run(index, load_index_model(index), queries, k), index.meta.dim
    encoder = load_encoder(spec)
    check_dim(dim, encoder, spec)
    vectors = encode_corpus(folder, spec, vectors_dir, max_tokens=max_tokens, overwrite=True)
    index = Index.from_vectors(vectors, "flat", dim)
    return _dense_run(index, encoder, queries, k), index.meta.dim


def _dense_run(index: Index, encoder: Encoder, queries: dict[str, str], k: int) -> Run:
    q_BD = encoder.encode(list(queries.values()), "query", dim=index.meta.dim)
    scores_BK, ids = index.search(q_BD, k)
    return {
        query_id: {id_: float(s) for s, id_ in zip(scores, found, strict=False)}
        for query_id, scores, found in zip(queries, scores_BK, ids, strict=True)
    }


def _check_index(
    index: Index, spec: str | Path, documents: list[Document], dim: int | None
) -> None:
    if dim is not None and dim != index.meta.dim:
        raise UserError(f"{spec} is an index of width {index.meta.dim}, not {dim}; leave dim out")
    known, indexed = {document.id for document in documents}, set(index.ids)
    if known != indexed:
        example = min(known ^ indexed)
        where = "the dataset" if example in known else "the index"
        raise UserError(
            f"{spec} indexes another corpus: {len(indexed):,} documents, the dataset has "
            f"{len(known):,}, and '{example}' is only in {where}"
        )


def _write(results: Results, out: Path) -> None:
    for name, text in (
        ("evaluation.md", results.markdown()),
        ("evaluation.json", results.to_json()),
    ):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
