"""A corpus on disk: documents in the order of their sources, read in a stream or by number.

    documents.jsonl  one document a line: {"id", "title"?, "text", "source"?, "lang"?}
    offsets.bin      N + 1 little-endian uint64: where each line begins, and the end of the last
    contents.bin     N little-endian uint64: `content_id` of each document, equal for equal texts
    corpus.json      what it was made from; written last, so a folder that has it is whole

Nothing but the numbers of the documents is held in memory: 16 bytes a document, mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np

from drama.console import console, progress
from drama.data.beir import is_beir
from drama.data.lines import parse_json
from drama.data.manifest import is_ours
from drama.data.records import Document, Record, content_id
from drama.data.sources import Rows, Source, to_record
from drama.data.stream import ShardSet
from drama.errors import UserError
from drama.files import replacing_folder, stamp
from drama.retrieve.vectors import read_json

FORMAT = 1
DOCUMENTS, OFFSETS, CONTENTS = "documents.jsonl", "offsets.bin", "contents.bin"
ABOUT = "corpus.json"
EMPTY = "empty text"  # the reason that `Record.from_json` gives
SHOW_EVERY = 2048


@dataclass(frozen=True, slots=True)
class CorpusDocument:
    """A document, its number in the corpus, its language and source ("" where not known)."""

    number: int
    document: Document
    lang: str
    source: str


@dataclass(frozen=True)
class Draw:
    """So many documents, at random and without repeats; which depends on the seed and on how many
    there are."""

    number: int
    seed: int = 0

    def check(self, total: int, where: str) -> None:
        """Refuse to draw more than there are.

        Raises:
            UserError: with how many there are.
        """
        if self.number > total:
            raise UserError(
                f"{where}: {self.number:,} documents are to be drawn, but there are {total:,}; "
                f"draw {total:,} at most"
            )

    def of(self, total: int) -> Iterator[bool]:
        """Whether each of so many is drawn, in a stream: Knuth, "The Art of Computer Programming",
        volume 2, section 3.4.2, algorithm S."""
        draw, missing = random.Random(self.seed), self.number
        for left in range(total, 0, -1):
            taken = draw.random() * left < missing
            missing -= taken
            yield taken


@dataclass(frozen=True)
class Survey:
    """How many documents some sources hold, and a few of them, drawn at random."""

    total: int
    sample: list[Document] = field(default_factory=list)


class Corpus:
    """A whole corpus folder, opened for reading; may be shared by threads.

    contents: for each document the 64-bit hash of its normalised text, uint64.
    left_out: rows of the sources that are no documents here, by reason.
    sha256: of documents.jsonl.

    Raises:
        UserError: the folder holds no whole corpus.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        about = read_json(self.folder / ABOUT)
        if about.get("format") != FORMAT:
            raise UserError(f"{self.folder}: a corpus of another version; remove that folder")
        self.inputs: str = about["inputs_sha256"]
        self.left_out: dict[str, int] = about["left_out"]
        self.sha256: str = about["sha256"]
        self._offsets = np.memmap(self.folder / OFFSETS, "<u8", "r")
        self.contents = np.memmap(self.folder / CONTENTS, "<u8", "r")
        self._file = (self.folder / DOCUMENTS).open("rb")

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, number: int) -> CorpusDocument:
        """The document with this number.

        Raises:
            IndexError: it is not in [0, len).
        """
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        start, end = self._offsets[number : number + 2].tolist()
        return _parsed(number, os.pread(self._file.fileno(), end - start, start))

    def read(self, start: int = 0) -> Iterator[CorpusDocument]:
        """The documents from a number on, in order."""
        with (self.folder / DOCUMENTS).open("rb") as file:
            file.seek(int(self._offsets[start]))
            for number, line in enumerate(file, start):
                yield _parsed(number, line)

    def batches(self, size: int, start: int = 0) -> Iterator[list[CorpusDocument]]:
        """The same in lists of `size`; the last one may be shorter."""
        documents = self.read(start)
        while batch := list(islice(documents, size)):
            yield batch


def inputs_sha256(
    sources: Sequence[Source], text_column: str | None = None, draw: Draw | None = None
) -> str:
    """Changes with what is read from these sources, as far as files on this disk tell."""
    parts: list[Any] = [[asdict(source), text_column, stamp(source.path)] for source in sources]
    parts += [asdict(draw)] if draw else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def survey(
    sources: Sequence[Source], text_column: str | None = None, *, sample: int = 0, seed: int = 0
) -> Survey:
    """Read sources through without keeping them. sample: documents to draw, fewer where there are.

    Raises:
        UserError: as `write_corpus`.
    """
    draw, total, kept = random.Random(seed), 0, list[Document]()
    with progress() as bar:
        task = bar.add_task("counting", total=None, note="")
        for record, _ in _documents(sources, text_column, Counter()):
            # reservoir sampling, algorithm R (Vitter 1985)
            place = total if total < sample else draw.randrange(total + 1) if sample else 0
            if place < sample:
                kept[place : place + 1] = record.positives
            total += 1
            if total % SHOW_EVERY == 0:
                bar.update(task, completed=total, note=record.source)
        bar.update(task, completed=total, total=total)
    if not total:
        raise _no_documents(sources)
    return Survey(total, kept)


def write_corpus(
    sources: Sequence[Source],
    folder: str | Path,
    *,
    text_column: str | None = None,
    draw: Draw | None = None,
) -> Corpus:
    """Read sources into a corpus folder, or open the one that was made from them before.

    Each source is what `drama shard` reads as texts, a BEIR folder (its corpus), or a folder of
    shards. Records with queries give their documents, each text once. Empty documents are left out
    and counted. The folder appears whole; a killed call starts again.

    Args:
        text_column: the text of every row stands in this column.
        draw: take these documents only; the sources are read twice.

    Raises:
        UserError: a row that is no document (its file and line), no documents at all, fewer than
            are to be drawn, or a folder that holds the corpus of other sources.
    """
    folder = Path(folder)
    inputs = inputs_sha256(sources, text_column, draw)
    if (folder / ABOUT).is_file():
        corpus = Corpus(folder)
        if corpus.inputs != inputs:
            raise UserError(
                f"{folder} holds the corpus of other sources, or of the same before they changed; "
                "give another --work, or remove that folder"
            )
        return corpus
    with replacing_folder(folder) as target:
        _write(sources, target, text_column, inputs, draw)
    return Corpus(folder)


def read_records(
    source: Source, text_column: str | None = None, skip: int = 0
) -> Iterator[tuple[str, Record | UserError]]:
    """The records of a source or of a folder of shards after the first `skip` rows, each with its
    place; an unsound row as its error."""
    if is_ours(Path(source.path)):
        shards = ShardSet([source.path])
        for index in range(skip, len(shards)):
            yield f"{source.path}: record {index}", source.named_in(shards.read(index))
        return
    rows = Rows(source, text_column)
    for where, row in islice(rows, skip, None):
        try:
            record: Record | UserError = to_record(rows.layout, row, source, text_column)
        except UserError as error:
            record = error
        yield where, record


def _write(
    sources: Sequence[Source],
    folder: Path,
    text_column: str | None,
    inputs: str,
    draw: Draw | None,
) -> None:
    left_out: Counter[str] = Counter()
    documents = _documents(sources, text_column, left_out)
    if draw is not None:
        total = survey(sources, text_column).total
        draw.check(total, _paths(sources))
        documents = compress(documents, draw.of(total))
    digest, end, count = hashlib.sha256(), 0, 0
    with (
        (folder / DOCUMENTS).open("wb") as lines,
        (folder / OFFSETS).open("wb") as offsets,
        (folder / CONTENTS).open("wb") as contents,
        progress() as bar,
    ):
        task = bar.add_task("corpus", total=None, note="")
        offsets.write(end.to_bytes(8, "little"))
        for record, content in documents:
            line = json.dumps(record.to_json(), ensure_ascii=False).encode() + b"\n"
            lines.write(line)
            digest.update(line)
            end += len(line)
            offsets.write(end.to_bytes(8, "little"))
            contents.write(content.to_bytes(8, "little"))
            count += 1
            if count % SHOW_EVERY == 0:
                bar.update(task, completed=count, note=record.source)
        bar.update(task, completed=count, total=count)
        for file in (lines, offsets, contents):
            file.flush()
            os.fsync(file.fileno())
    if not count:
        raise _no_documents(sources)
    for reason, number in left_out.items():
        console.print(
            f"corpus: {number:,} rows left out, {reason}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    about = {
        "format": FORMAT,
        "documents": count,
        "left_out": left_out,
        "sha256": digest.hexdigest(),
        "sources": [source.path for source in sources],
        "inputs_sha256": inputs,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")


def _paths(sources: Sequence[Source]) -> str:
    return ", ".join(source.path for source in sources)


def _no_documents(sources: Sequence[Source]) -> UserError:
    return UserError(f"{_paths(sources)}: no documents to read, or empty ones only")


def _documents(
    sources: Sequence[Source], text_column: str | None, left_out: Counter[str]
) -> Iterator[tuple[Record, int]]:
    """Every document as a record without a query, and its content."""
    met: set[int] = set()  # of documents out of records, where many share one
    for source in sources:
        of_beir = "text" if is_beir(source.path) else None  # else its judged pairs would be read
        for where, record in read_records(source, text_column or of_beir):
            if isinstance(record, UserError):
                if record.reason != EMPTY:
                    raise UserError(f"{where}: {record}", record.reason)
                left_out[EMPTY] += 1
                continue
            if record.is_text:
                yield record, content_number(record.positives[0])
                continue
            for document in (*record.positives, *record.negatives):
                content = content_number(document)
                if content not in met:
                    met.add(content)
                    yield Record("", (document,), source=record.source, lang=record.lang), content


def content_number(document: Document) -> int:
    """`content_id` as an integer: what `Corpus.contents` holds."""
    return int(content_id(document.title, document.text), 16)


def _parsed(number: int, line: bytes) -> CorpusDocument:
    record = Record.trusted(parse_json(line))
    return CorpusDocument(number, record.positives[0], record.lang, record.source)
