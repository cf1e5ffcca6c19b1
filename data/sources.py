"""Training data of other tools, read as records.

Recognised by content, from the keys of the first line (or the columns):

    our records             query, positives, negatives
    Tevatron                query_id, query, positive_passages, negative_passages
    FlagEmbedding           query, pos, neg (pos_scores, neg_scores)
    sentence-transformers   anchor, positive, negative, negative_1, ...
    BEIR folder             corpus.jsonl, queries.jsonl, qrels/train.tsv (or the only split)
    Hugging Face folder     a dataset written by `save_to_disk`, with any of these columns
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from drama.data.beir import is_beir, qrels_splits, read_corpus, read_qrels, read_queries
from drama.data.lines import read_objects
from drama.data.records import Document, Record
from drama.errors import UserError

FILE_SUFFIX = r"(\.jsonl?)?(\.gz|\.xz)?$"
Convert = Callable[[dict[str, Any]], dict[str, Any]]


def read_source(path: str | Path, name: str | None = None) -> Iterator[Record]:
    """Yield the records of a file or folder, with `source` set to `name`.

    `name` defaults to the file's stem or the folder's name; a record of our own form that
    already names its source keeps it unless `name` is given.

    Raises:
        UserError: names file, line and fault.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    default = path.resolve().name if path.is_dir() else re.sub(FILE_SUFFIX, "", path.name)
    if is_beir(path):
        records = _beir_records(path)
    elif path.is_dir():
        records = _converted(_dataset_rows(path), path)
    else:
        records = _converted(read_objects(path), path)
    empty = True
    for record in records:
        empty = False
        yield dataclasses.replace(record, source=name or record.source or default)
    if empty:
        raise UserError(f"{path} holds no records")


def _converted(rows: Iterator[tuple[str, dict[str, Any]]], path: Path) -> Iterator[Record]:
    convert: Convert | None = None
    for where, row in rows:
        try:
            convert = convert or _layout(row)
            yield Record.from_json(convert(row))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _layout(row: dict[str, Any]) -> Convert:
    for keys, convert in LAYOUTS:
        if all(key in row for key in keys):
            return convert
    known = "; ".join(", ".join(keys) for keys, _ in LAYOUTS)
    raise UserError(f"unknown layout with the keys {', '.join(row)}; known layouts have: {known}")


def _own(row: dict[str, Any]) -> dict[str, Any]:
    return row


def _tevatron(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "query": _required(row, "query"),
        "query_id": str(row.get("query_id", "")),
        "positives": [_passage(doc) for doc in _list(row, "positive_passages")],
        "negatives": [_passage(doc) for doc in _list(row, "negative_passages")],
    }


def _passage(passage: Any) -> Any:
    if not isinstance(passage, dict):
        return passage
    passage = _without_nulls(passage)
    document = {key: passage[key] for key in ("title", "text") if key in passage}
    if "docid" in passage:
        document["id"] = str(passage["docid"])
    return document


def _flag_embedding(row: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"query": _required(row, "query")}
    scores: dict[str, Any] = {}
    for key, texts_key in (("positives", "pos"), ("negatives", "neg")):
        texts = _list(row, texts_key)
        record[key] = [{"text": text} for text in texts]
        scores_key = f"{texts_key}_scores"
        if scores_key in row:
            values = _list(row, scores_key)
            if len(values) != len(texts):
                raise UserError(f"{len(texts)} texts in {texts_key}, {len(values)} {scores_key}")
            for i, (text, score) in enumerate(zip(texts, values, strict=True)):
                scores[Document.from_json({"text": text}, f"{texts_key}[{i}]").id] = score
    return record | ({"scores": scores} if scores else {})


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    names = [key for key in row if re.fullmatch(r"negative(_\d+)?", key)]
    names.sort(key=lambda key: (len(key), key))  # negative, negative_1, ..., negative_10
    return {
        "query": _required(row, "anchor"),
        "positives": [{"text": _required(row, "positive")}],
        "negatives": [{"text": row[key]} for key in names],
    }


LAYOUTS: tuple[tuple[tuple[str, ...], Convert], ...] = (
    (("query", "positives"), _own),
    (("query", "positive_passages"), _tevatron),
    (("query", "pos"), _flag_embedding),
    (("anchor", "positive"), _columns),
)


def _required(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise UserError(f"no '{key}'")
    return row[key]


def _list(row: dict[str, Any], key: str) -> list[Any]:
    value = row.get(key, [])
    if not isinstance(value, list):
        raise UserError(f"{key} must be a list")
    return value


def _dataset_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise UserError(
            f"{path} is neither a BEIR folder (corpus.jsonl, queries.jsonl, qrels/) nor a dataset "
            "written by save_to_disk; give a .jsonl file or one of these"
        )
    from datasets import Dataset, DatasetDict, load_from_disk  # slow to import

    try:
        loaded: Dataset | DatasetDict = load_from_disk(str(path))
    except Exception as error:  # pyarrow and json errors of many kinds: the folder is damaged
        raise UserError(f"{path}: the dataset does not load: {error}") from None
    if isinstance(loaded, DatasetDict):
        loaded = loaded[_one_split(path, list(loaded))]
    for number, row in enumerate(loaded):
        yield f"{path}: row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Arrow tables spell an absent field as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _one_split(path: Path, splits: list[str]) -> str:
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise UserError(f"{path} has no split 'train'; it has: {', '.join(splits) or 'none'}")


def _beir_records(folder: Path) -> Iterator[Record]:
    """Grades above 0 are positives, grades of 0 or less negatives; queries with no positive are
    left out. Only judged documents are held in memory."""
    split = _one_split(folder, qrels_splits(folder))
    qrels = read_qrels(folder, split)
    queries = read_queries(folder)
    judged = {document_id for grades in qrels.values() for document_id in grades}
    documents = {doc.id: doc for doc in read_corpus(folder) if doc.id in judged}
    for query_id, grades in qrels.items():
        if query_id not in queries:
            raise UserError(f"{folder}/qrels/{split}.tsv names the unknown query '{query_id}'")
        for document_id in grades:
            if document_id not in documents:
                raise UserError(
                    f"{folder}/qrels/{split}.tsv names the unknown document '{document_id}'"
                )
        positives = [documents[id_] for id_, grade in grades.items() if grade > 0]
        negatives = [documents[id_] for id_, grade in grades.items() if grade <= 0]
        if positives:
            record = Record(queries[query_id], tuple(positives), tuple(negatives), query_id)
            try:  # an empty judged document is a fault in a training record
                yield Record.from_json(record.to_json())
            except UserError as error:
                raise UserError(f"{folder}: query '{query_id}': {error}") from None
