"""Rows of other tools' training data, turned into records. Recognised by the keys of a row:

our records             query, positives, negatives
Tevatron                query_id, query, positive_passages, negative_passages
FlagEmbedding           query, pos, neg (pos_scores, neg_scores, prompt)
sentence-transformers   anchor, positive, negative, negative_1, ...
DPR                     question, positive_ctxs, hard_negative_ctxs, negative_ctxs
NVIDIA inline           query, pos_doc, neg_doc
texts                   text, and none of the above: a document without a query
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from drama.data.records import Document
from drama.errors import UserError, nearest

Row = dict[str, Any]
KEPT = ("query_id", "prompt", "lang")  # of whatever layout, where a row has them
TEXTS = "texts"


def layout_of(row: Row, text_column: str | None = None) -> str:
    """The name of a row's layout; with `text_column` every row is a text, which stands there.

    Raises:
        UserError: no layout has these keys.
    """
    if text_column is not None:
        _column(row, text_column)
        return TEXTS
    for name, (keys, _) in LAYOUTS.items():
        if all(key in row for key in keys):
            return name
    known = "; ".join(", ".join(keys) for keys, _ in LAYOUTS.values())
    raise UserError(f"unknown layout with the keys {', '.join(row)}; known layouts have: {known}")


def convert(layout: str, row: Row, text_column: str | None = None) -> Row:
    """The row in our own JSON form, not yet checked.

    Raises:
        UserError: a key of the layout is missing or of the wrong type.
    """
    if text_column is not None:
        return _text(row, text_column)
    if layout == TEXTS and {"query", "positives"} <= set(row):
        layout = "records"  # `drama convert` may have written both into one file
    record = LAYOUTS[layout][1](row)
    for key in KEPT if layout != TEXTS else ():
        if key not in record and isinstance(row.get(key), str):
            record[key] = row[key]
    return record


def without_nulls(value: Any) -> Any:
    """Arrow tables spell an absent field as null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _own(row: Row) -> Row:
    return row


def _tevatron(row: Row) -> Row:
    return {
        "query": _required(row, "query"),
        "query_id": _id(row, "query_id"),
        "positives": [_passage(doc) for doc in _list(row, "positive_passages")],
        "negatives": [_passage(doc) for doc in _list(row, "negative_passages")],
    }


def _id(row: Row, key: str) -> str:
    return "" if row.get(key) is None else str(row[key])


def _passage(passage: Any) -> Any:
    """A document, given as its text or as an object with title, text and some name of an id."""
    if isinstance(passage, str):
        return {"text": passage}
    if not isinstance(passage, dict):
        return passage
    passage = without_nulls(passage)
    document = {key: passage[key] for key in ("title", "text") if key in passage}
    for key in ("docid", "passage_id", "psg_id", "id"):
        if key in passage:
            document["id"] = str(passage[key])
            break
    return document


def _flag_embedding(row: Row) -> Row:
    record: Row = {"query": _required(row, "query")}
    if row.get("prompt"):
        record["prompt"] = row["prompt"]
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


def _columns(row: Row) -> Row:
    names = [key for key in row if re.fullmatch(r"negative(_\d+)?", key)]
    names.sort(key=lambda key: (len(key), key))  # negative, negative_1, ..., negative_10
    return {
        "query": _required(row, "anchor"),
        "positives": [{"text": _required(row, "positive")}],
        "negatives": [{"text": row[key]} for key in names],
    }


def _dpr(row: Row) -> Row:
    """Mined negatives, or the others where there are none."""
    negatives = _list(row, "hard_negative_ctxs") or _list(row, "negative_ctxs")
    return {
        "query": _required(row, "question"),
        "positives": [_passage(doc) for doc in _list(row, "positive_ctxs")],
        "negatives": [_passage(doc) for doc in negatives],
    }


def _inline(row: Row) -> Row:
    positive = _required(row, "pos_doc")
    return {
        "query": _required(row, "query"),
        "query_id": _id(row, "query_id"),
        "positives": [
            _passage(doc) for doc in (positive if isinstance(positive, list) else [positive])
        ],
        "negatives": [_passage(doc) for doc in _list(row, "neg_doc")],
    }


def _text(row: Row, column: str) -> Row:
    """Of the other columns (url, timestamp, ...) only these are a document's."""
    text: Row = {"text": _column(row, column)}
    for key in ("id", "_id", "docid"):
        if row.get(key) is not None and key != column:
            text["id"] = str(row[key])
            break
    if row.get("title") is not None and column != "title":
        text["title"] = row["title"]
    for key in ("source", "lang"):
        if isinstance(row.get(key), str) and key != column:
            text[key] = row[key]
    return text


def _column(row: Row, column: str) -> Any:
    if column not in row:
        raise UserError(
            f"no column '{column}' for the text{nearest(column, row)}; the row has: "
            f"{', '.join(row)}"
        )
    return row[column]


LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[Row], Row]]] = {
    "records": (("query", "positives"), _own),
    "Tevatron": (("query", "positive_passages"), _tevatron),
    "FlagEmbedding": (("query", "pos"), _flag_embedding),
    "sentence-transformers": (("anchor", "positive"), _columns),
    "DPR": (("question", "positive_ctxs"), _dpr),
    "NVIDIA inline": (("query", "pos_doc"), _inline),
    TEXTS: (("text",), lambda row: _text(row, "text")),  # the last one: pairs may have such a key
}


def _required(row: Row, key: str) -> Any:
    if key not in row:
        raise UserError(f"no '{key}'")
    return row[key]


def _list(row: Row, key: str) -> list[Any]:
    value = row.get(key, [])
    if not isinstance(value, list):
        raise UserError(f"{key} must be a list")
    return value
