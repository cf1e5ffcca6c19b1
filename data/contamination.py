"""Keep evaluation out of training: records whose query, positive or text stands in a test set.

Texts are compared as their words only (NFKC, case folded, punctuation and spaces left out).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from drama.data.beir import qrels_splits, read_corpus, read_qrels, read_queries
from drama.data.records import Document, Record
from drama.errors import UserError

_WORD = re.compile(r"\w+")
_NONE = b""


def words_key(text: str) -> bytes:
    """64 bits of the words of a text, empty for a text without any."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return blake2b(" ".join(words).encode(), digest_size=8).digest() if words else _NONE


def _document_keys(document: Document) -> set[bytes]:
    """One set gives the title apart, another one within the text."""
    return {words_key(document.text), words_key(document.full_text)} - {_NONE}


class EvaluationSets:
    """The queries of some BEIR folders and the documents that answer them.

    Of each folder, every split but `train` counts (all of them where there is only that one), and
    of the corpus the documents that are judged relevant: a large corpus is no test set.

    Raises:
        UserError: a folder that is no BEIR folder or is given twice, or nothing judged.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self.names: list[str] = []
        self._queries: dict[bytes, str] = {}
        self._documents: dict[bytes, str] = {}
        for folder, name in _named(folders).items():
            self.names.append(name)
            self._add(folder, name)

    def found(self, record: Record) -> str | None:
        """The name of the set that the record's query or a positive stands in; of a text, whether
        the set holds it as a document or as a query."""
        key = words_key(record.query)
        if key in self._queries:
            return self._queries[key]
        for document in record.positives:
            for key in _document_keys(document):
                if key in self._documents:
                    return self._documents[key]
                if record.is_text and key in self._queries:
                    return self._queries[key]
        return None

    def _add(self, folder: Path, name: str) -> None:
        splits = qrels_splits(folder)
        if not splits:
            raise UserError(f"{folder} is no BEIR folder: it has no qrels/SPLIT.tsv")
        texts, relevant = read_queries(folder), set()
        for split in [s for s in splits if s != "train"] or splits:
            for query_id, grades in read_qrels(folder, split).items():
                if query_id in texts:
                    self._queries.setdefault(words_key(texts[query_id]), name)
                relevant |= {document_id for document_id, grade in grades.items() if grade > 0}
        for document in read_corpus(folder):
            if document.id in relevant:
                for key in _document_keys(document):
                    self._documents.setdefault(key, name)
        self._queries.pop(_NONE, None)


def _named(folders: Sequence[str | Path]) -> dict[Path, str]:
    """A name for each folder: as many of the last parts of its path as tell it from the others,
    `scifact`, or `xquad/ar` and `handbook/ar`."""
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"{twice} is given twice to decontaminate by; name each set once")
    names = {}
    for path in paths:
        count = 1
        while sum(other.parts[-count:] == path.parts[-count:] for other in paths) > 1:
            count += 1
        names[path] = "/".join(path.parts[-count:])
    return names
