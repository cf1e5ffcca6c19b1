"""The training sample: a query, its positives, its hard negatives. Or a text without a query.

JSON form (unknown keys are errors, so that a misspelt `negative` cannot vanish):

    {"query": str, "positives": [doc, ...], "negatives": [doc, ...],
     "query_id"?: str, "prompt"?: str, "source"?: str, "lang"?: str, "scores"?: {doc_id: float}}
    doc = {"id"?: str, "title"?: str, "text": str}

or, for the training of language models, a text:

    {"text": str, "id"?: str, "title"?: str, "source"?: str, "lang"?: str}
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from drama.errors import UserError, nearest

RECORD_KEYS = ("query", "positives", "negatives", "query_id", "prompt", "source", "lang", "scores")
DOCUMENT_KEYS = ("id", "title", "text")
TEXT_KEYS = (*DOCUMENT_KEYS, "source", "lang")
MAX_SCORE = 1e300
MAX_CHARS = 2**24  # of one text; more is a file that was taken for a text


def content_id(title: str, text: str) -> str:
    """The 64-bit id (16 hex digits) of a document's normalised text.

    Title and text are joined by a space, then NFKC, case folding and collapsed white space, so
    that copies which differ only in these get one id.
    """
    folded = unicodedata.normalize("NFKC", f"{title} {text}").casefold()
    return blake2b(" ".join(folded.split()).encode(), digest_size=8).hexdigest()


def document_hash64(document_id: str) -> int:
    """The document's id as a signed 64-bit integer, for comparing ids in an int64 tensor."""
    digest = blake2b(document_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def query_hash64(query: str) -> int:
    """A query's id as a signed 64-bit integer: not that of a document with the same text."""
    return document_hash64("query " + content_id("", query))


@dataclass(frozen=True, slots=True)
class Document:
    """One document. An empty `id` becomes `content_id(title, text)`."""

    text: str
    title: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", content_id(self.title, self.text))

    @property
    def full_text(self) -> str:
        """What is trained on, encoded and indexed: title, a space, text, as BEIR does."""
        return f"{self.title} {self.text}".strip()

    @classmethod
    def from_json(cls, value: Any, where: str = "document") -> Document:
        """Build one from a parsed JSON object. `where` names it in messages ("positives[0]").

        Raises:
            UserError: wrong type, unknown key, invalid text, or neither title nor text.
        """
        _check_keys(value, DOCUMENT_KEYS, where)
        if "text" not in value:
            raise UserError(f"{where} has no 'text'")
        text, title, id_ = (_text(value, key, f"{where}.") for key in ("text", "title", "id"))
        if not text.strip() and not title.strip():
            raise UserError(f"{where}.text is empty", "empty text")
        return cls(text=text, title=title, id=id_)

    def to_json(self) -> dict[str, str]:
        """The JSON object; `from_json` gives the same document back."""
        title = {"title": self.title} if self.title else {}
        return {"id": self.id, **title, "text": self.text}


@dataclass(frozen=True, slots=True)
class Record:
    """One training sample; a text is one with an empty query and its document as the only positive.

    `prompt` stands before the query in place of the model's query prefix. `scores` maps document
    ids to a teacher's relevance scores.
    """

    query: str
    positives: tuple[Document, ...]
    negatives: tuple[Document, ...] = ()
    query_id: str = ""
    prompt: str = ""
    source: str = ""
    lang: str = ""
    scores: dict[str, float] | None = None

    @property
    def is_text(self) -> bool:
        """Whether this is a text without a query."""
        return not self.query

    @property
    def own_text(self) -> str:
        """What tells the record from others: its query, or the text that it is."""
        return self.query or self.positives[0].full_text

    @classmethod
    def trusted(cls, value: dict[str, Any]) -> Record:
        """Build one from what `to_json` gave, unchecked: its bytes are known to be unchanged."""
        if "text" in value:
            document = Document(**{key: value.pop(key) for key in DOCUMENT_KEYS if key in value})
            return cls("", (document,), **value)
        value["positives"] = tuple([Document(**item) for item in value["positives"]])
        value["negatives"] = tuple([Document(**item) for item in value["negatives"]])
        return cls(**value)

    @classmethod
    def from_json(cls, value: Any) -> Record:
        """Build one from a parsed JSON object.

        Raises:
            UserError: names the key at fault and the fault; the caller adds file and line.
        """
        if isinstance(value, dict) and "text" in value and not {"query", "positives"} & set(value):
            _check_keys(value, TEXT_KEYS, "record")
            own = {key: value[key] for key in DOCUMENT_KEYS if key in value}
            document = Document.from_json(own, "record")
            return cls("", (document,), source=_text(value, "source"), lang=_text(value, "lang"))
        _check_keys(value, RECORD_KEYS, "record")
        for key in ("query", "positives"):
            if key not in value:
                raise UserError(
                    f"record has no '{key}'{nearest(key, value)}",
                    "no positives" if key == "positives" else "",
                )
        query = _text(value, "query")
        if not query.strip():
            raise UserError("query is empty", "empty text")
        positives = _documents(value, "positives")
        if not positives:
            raise UserError(
                "positives is empty: a record needs at least one positive", "no positives"
            )
        negatives = _documents(value, "negatives")
        return cls(
            query=query,
            positives=positives,
            negatives=negatives,
            query_id=_text(value, "query_id"),
            prompt=_text(value, "prompt"),
            source=_text(value, "source"),
            lang=_text(value, "lang"),
            scores=_scores(value["scores"], (*positives, *negatives))
            if "scores" in value
            else None,
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON object; `from_json` gives the same record back."""
        value: dict[str, Any]
        if self.is_text:
            (document,) = self.positives  # nothing else of a text would be written
            value = {**document.to_json()}
        else:
            value = {
                "query": self.query,
                "positives": [document.to_json() for document in self.positives],
                "negatives": [document.to_json() for document in self.negatives],
            }
        for key in ("query_id", "prompt", "source", "lang"):
            if text := getattr(self, key):
                value[key] = text
        if self.scores is not None:
            value["scores"] = self.scores
        return value


def _check_keys(value: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object, not {_type_name(value)}")
    if not value:
        raise UserError(f"empty {where}")
    for key in value:
        if key not in known:
            raise UserError(f"{where} has the unknown key '{key}'{nearest(key, known)}")


def _text(value: dict[str, Any], key: str, prefix: str = "") -> str:
    text = value.get(key, "")
    if not isinstance(text, str):
        raise UserError(f"{prefix}{key} must be a string, not {_type_name(text)}")
    if len(text) > MAX_CHARS:
        raise UserError(
            f"{prefix}{key} has {len(text):,} characters; {MAX_CHARS:,} is the most, cut it",
            "text too long",
        )
    if not text.isascii():
        # JSON can spell half a surrogate pair ("\ud800"), which no UTF-8 file can hold.
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{prefix}{key} holds an unpaired surrogate at character {error.start}",
                "invalid UTF-8",
            ) from None
    return text


def _documents(value: dict[str, Any], key: str) -> tuple[Document, ...]:
    items = value.get(key, [])
    if not isinstance(items, list):
        raise UserError(f"{key} must be a list of documents, not {_type_name(items)}")
    return tuple(Document.from_json(item, f"{key}[{i}]") for i, item in enumerate(items))


def _scores(value: Any, documents: Iterable[Document]) -> dict[str, float]:
    if not isinstance(value, dict):
        raise UserError(f"scores must be an object of numbers, not {_type_name(value)}")
    ids = {document.id for document in documents}
    for key, score in value.items():
        if key not in ids:
            raise UserError(f"scores names document '{key}', which the record does not hold")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise UserError(f"scores['{key}'] must be a number, not {_type_name(score)}")
        if not abs(score) <= MAX_SCORE:
            raise UserError(f"scores['{key}'] is {str(score)[:40]}, not a finite number")
    return {key: float(score) for key, score in value.items()}


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")
