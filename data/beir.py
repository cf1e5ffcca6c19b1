"""BEIR folders: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, each plain, .gz, .xz or .zst.

The layout of Thakur et al. 2021, "BEIR" (arXiv 2104.08663): corpus lines hold `_id`, `title`,
`text`; query lines hold `_id`, `text`; qrels are tab-separated with a header line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drama.data.lines import PACKED_SUFFIXES, read_lines, read_objects
from drama.data.records import Document
from drama.errors import UserError, nearest


def is_beir(folder: str | Path) -> bool:
    """Whether the folder holds a BEIR corpus."""
    return _find(Path(folder), "corpus.jsonl") is not None


def corpus_file(folder: str | Path) -> Path:
    """Where the documents of a BEIR folder stand.

    Raises:
        UserError: no corpus.
    """
    return _require(Path(folder), "corpus.jsonl")


def read_corpus(folder: str | Path) -> Iterator[Document]:
    """Yield the documents of a BEIR folder in file order.

    Empty documents are let through: published collections hold a few, and rankings count them.

    Raises:
        UserError: no corpus, or a line that is no document, or an id that came before.
    """
    seen: set[str] = set()
    for where, value in read_objects(corpus_file(folder)):
        id_ = _field(value, "_id", where)
        if id_ in seen:
            raise UserError(f"{where}: document '{id_}' stands in the corpus twice")
        seen.add(id_)
        title = _field(value, "title", where) if value.get("title") is not None else ""
        yield Document(text=_field(value, "text", where), title=title, id=id_)


def read_queries(folder: str | Path) -> dict[str, str]:
    """The queries of a BEIR folder, id to text, in file order.

    Raises:
        UserError: no queries file, or from `read_query_file`.
    """
    return read_query_file(_require(Path(folder), "queries.jsonl"))


def read_query_file(path: str | Path) -> dict[str, str]:
    """The queries of a file, id to text, in file order: lines of {_id, text}, or, where the name
    ends in .tsv, of id, tab, text; packed or not.

    Raises:
        UserError: no such file, a line that is no query, an id that came before, or no queries.
    """
    path = Path(path)
    rows = _tab_separated(path) if ".tsv" in path.suffixes else _json_queries(path)
    queries: dict[str, str] = {}
    for where, id_, text in rows:
        if id_ in queries:
            raise UserError(f"{where}: query '{id_}' stands in the file twice")
        queries[id_] = text
        if not text.strip():
            raise UserError(f"{where}: query '{id_}' is empty")
    if not queries:
        raise UserError(f"{path} holds no queries")
    return queries


def qrels_splits(folder: str | Path) -> list[str]:
    """The names of the qrels splits in a BEIR folder, sorted."""
    files = (Path(folder) / "qrels").glob("*.tsv*")
    return sorted({file.name.split(".tsv")[0] for file in files})


def read_qrels(folder: str | Path, split: str) -> dict[str, dict[str, int]]:
    """Relevance grades of one split: query id to document id to grade, in file order.

    Raises:
        UserError: unknown split, a row without three columns, a grade that is no integer, or a
            pair judged twice with different grades.
    """
    path = _find(Path(folder), f"qrels/{split}.tsv")
    if path is None:
        splits = qrels_splits(folder)
        raise UserError(
            f"{folder} has no qrels split '{split}'{nearest(split, splits)}; "
            f"it has: {', '.join(splits) or 'none'}"
        )
    qrels: dict[str, dict[str, int]] = {}
    for number, line in read_lines(path):
        columns = line.split("\t")
        if len(columns) != 3:
            raise UserError(
                f"{path}:{number}: {len(columns)} columns, expected query-id, corpus-id, score "
                "with tabs between"
            )
        query_id, document_id, score = columns
        try:
            grade = int(score)
        except ValueError:
            if number == 1:
                continue  # the header line
            raise UserError(f"{path}:{number}: score '{score}' is not an integer") from None
        if qrels.setdefault(query_id, {}).setdefault(document_id, grade) != grade:
            raise UserError(
                f"{path}:{number}: query '{query_id}', document '{document_id}' is judged "
                f"{qrels[query_id][document_id]} above and {grade} here"
            )
    if not qrels:
        raise UserError(f"{path} holds no judgements")
    return qrels


def _find(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}{suffix}" for suffix in PACKED_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _require(folder: Path, name: str) -> Path:
    path = _find(folder, name)
    if path is None:
        raise UserError(f"{folder} is no BEIR folder: it has no {name} (.gz and .xz are read too)")
    return path


def _json_queries(path: Path) -> Iterator[tuple[str, str, str]]:
    for where, value in read_objects(path):
        yield where, _field(value, "_id", where), _field(value, "text", where)


def _tab_separated(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in read_lines(path):
        columns = line.split("\t")
        if len(columns) != 2:
            raise UserError(
                f"{path}:{number}: {len(columns)} columns, expected query id and text with a tab "
                "between"
            )
        yield f"{path}:{number}", columns[0], columns[1]


def _field(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        fault = "has no" if text is None else "is not a string:"
        raise UserError(f"{where}: the line {fault} '{key}'")
    return text
