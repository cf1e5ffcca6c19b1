"""The documents to be searched: a BEIR folder or one .jsonl file of {_id, title, text}."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from drama.data.beir import read_corpus
from drama.data.lines import PACKED_SUFFIXES, parse_object, read_objects, read_raw_lines
from drama.data.records import Document
from drama.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """A corpus that was read through once: its file, that file's sha256, its ids in order."""

    path: Path
    sha256: str
    ids: list[str]

    @classmethod
    def scan(cls, path: str | Path) -> Corpus:
        """Read the whole corpus and keep the ids.

        Raises:
            UserError: no corpus there, a line that is no document, an id that came before or
                holds a line break, or no documents at all.
        """
        file = corpus_file(path)
        ids = [document.id for document in read_documents(file)]
        if not ids:
            raise UserError(f"{file} holds no documents")
        for id_ in ids:
            if id_.splitlines() != [id_]:
                raise UserError(f"{file}: the document id {id_!r} holds a line break")
        with file.open("rb") as raw:
            return cls(file, hashlib.file_digest(raw, "sha256").hexdigest(), ids)


def corpus_file(path: str | Path) -> Path:
    """The absolute path of the corpus file that a BEIR folder or a file path stands for.

    Raises:
        UserError: neither.
    """
    path = Path(path).resolve()
    if path.is_file():
        return path
    candidates = (path / f"corpus.jsonl{suffix}" for suffix in PACKED_SUFFIXES)
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise UserError(
            f"{path} is no corpus; give a BEIR folder (with corpus.jsonl) or a .jsonl file "
            "(.gz and .xz are read too)"
        )
    return file


def read_documents(file: Path) -> Iterator[Document]:
    """Yield the documents of a corpus file in file order; `title` may be missing.

    Raises:
        UserError: a line that is no document, or an id that came before.
    """
    if file.name in {f"corpus.jsonl{suffix}" for suffix in PACKED_SUFFIXES}:
        yield from read_corpus(file.parent)
        return
    seen: set[str] = set()
    for where, value in read_objects(file):
        for key in ("_id", "text"):
            if not isinstance(value.get(key), str):
                raise UserError(f"{where}: the line has no string '{key}'")
        id_, title = value["_id"], value.get("title") or ""
        if not isinstance(title, str):
            raise UserError(f"{where}: the title is not a string")
        if id_ in seen:
            raise UserError(f"{where}: document '{id_}' stands in the corpus twice")
        seen.add(id_)
        yield Document(text=value["text"], title=title, id=id_)


def read_windows(
    file: Path, size: int, numbers: Iterable[int]
) -> Iterator[tuple[int, list[Document]]]:
    """Yield the windows of `size` documents that have these numbers, which ascend.

    The corpus was read through before (`Corpus.scan`): lines of other windows are not looked at.

    Raises:
        UserError: the file has changed since.
    """
    lines = read_raw_lines(file)
    for number in numbers:
        documents: list[Document] = []
        for count, line in lines:
            if count <= number * size:
                continue
            try:
                value = parse_object(line)
                title = value.get("title") or ""
                documents.append(Document(text=value["text"], title=title, id=value["_id"]))
            except (UserError, KeyError):
                raise UserError(f"{file}:{count}: the corpus has changed; encode again") from None
            if len(documents) == size:
                break
        yield number, documents
