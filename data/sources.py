"""Training data where it lies: files, folders, addresses, and Hugging Face datasets.

    [NAME[:WEIGHT]=]PATH

PATH is a file of JSON lines, a JSON array, a parquet file or (by its name, .txt) plain text (local
or s3://, gs://, hf://, https://; plain, gzip, xz or zstd), a BEIR folder (corpus.jsonl,
queries.jsonl, qrels/train.tsv or the only split), a folder of a Hugging Face dataset, or a dataset
on the Hub, ORG/NAME[@REVISION][:CONFIG[:SPLIT]]. What it is is told from its content; the layouts
of a row are those of `drama.data.layouts`. With a text column every row is a text, and a BEIR
folder gives its corpus.
"""

from __future__ import annotations

import dataclasses
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from drama.data.beir import (
    corpus_file,
    is_beir,
    qrels_splits,
    read_corpus,
    read_qrels,
    read_queries,
)
from drama.data.layouts import TEXTS, Row, convert, layout_of, without_nulls
from drama.data.lines import (
    UTF8_BOM,
    is_url,
    open_bytes,
    open_raw,
    parse_object,
    read_array,
    read_raw_lines,
)
from drama.data.plain import decode_plain, is_plain_text, read_plain
from drama.data.records import Record
from drama.errors import UserError

FILE_SUFFIX = r"(\.jsonl?|\.parquet|\.txt)?(\.gz|\.xz|\.zst)?$"
SPEC = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(:(?P<weight>[0-9.eE+-]+))?=(?P<path>.+)")
HUB_NAME = re.compile(
    r"(hf://datasets/)?(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?"
    r"(:(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?"
)
PARQUET_MAGIC = b"PAR1"
PARQUET_ROWS = 256
PLAIN = "plain text"  # a layout that has no keys

Raw = bytes | Row  # a line or a plain document as it stands in its file, or a parsed row


@dataclass(frozen=True)
class Source:
    """One named source. `weight` is its share in a mixture, None where none was given."""

    path: str
    name: str
    weight: float | None = None
    named: bool = False  # the user gave the name: it stands before the records' own

    @classmethod
    def parse(cls, spec: str | Path) -> Source:
        """Read `[NAME[:WEIGHT]=]PATH`.

        Raises:
            UserError: no such path, or a weight that is no positive number.
        """
        text = str(spec)
        match = None if Path(text).exists() or is_url(text.split("=")[0]) else SPEC.fullmatch(text)
        path = match["path"] if match else text
        if not (Path(path).exists() or is_url(path) or HUB_NAME.fullmatch(path)):
            raise UserError(f"{path} does not exist")
        weight = None
        if match and match["weight"]:
            try:
                weight = float(match["weight"])
            except ValueError:
                weight = -1.0
            if not 0 < weight < float("inf"):
                raise UserError(f"{text}: the weight must be a positive number")
        stem = Path(path).resolve().name if Path(path).is_dir() else path.rstrip("/").split("/")[-1]
        name = match["name"] if match else re.sub(FILE_SUFFIX, "", stem)
        return cls(path, name, weight, named=match is not None)

    def named_in(self, record: Record) -> Record:
        """The record with the name of its source: the one that was given, else its own."""
        name = self.name if self.named else record.source or self.name
        return record if record.source == name else dataclasses.replace(record, source=name)


class Rows:
    """The rows of a source, unparsed where that is left to workers.

    `layout` is known once the first sound row was read. Iterating yields ("FILE:LINE", row).
    text_column: every row is a text, which stands in this column.

    Raises:
        UserError: no rows, not one of a known layout, or a file that breaks off.
    """

    def __init__(self, source: Source, text_column: str | None = None) -> None:
        self.source, self.text_column = source, text_column
        self.layout = ""
        self._fault = ""
        self._raw: IO[bytes] | None = None
        self._bytes = 0

    @property
    def share_read(self) -> float | None:
        """How much of a local file was read, 0 to 1."""
        if self._raw is None or not self._bytes:
            return None
        return 1.0 if self._raw.closed else self._raw.tell() / self._bytes

    def __iter__(self) -> Iterator[tuple[str, Raw]]:
        empty = True
        for where, row in self._rows():
            empty = False
            if not self.layout:
                try:
                    parsed = row if isinstance(row, dict) else parse_object(row)
                    self.layout = layout_of(parsed, self.text_column)
                except UserError as error:  # to_record says it again, unless bad rows are skipped
                    self._fault = self._fault or f"{where}: {error}"
            yield where, row
        if not self.layout or (self.layout == PLAIN and empty):
            raise UserError(self._fault or f"{self.source.path} holds no records")

    def _rows(self) -> Iterator[tuple[str, Raw]]:
        path = Path(self.source.path)
        if path.is_dir():
            if not is_beir(path):
                return _dataset_rows(path)
            return self._file_rows(str(corpus_file(path))) if self.text_column else _beir_rows(path)
        if not path.exists() and HUB_NAME.fullmatch(self.source.path):
            return _streamed(self.source.path)
        return self._file_rows(self.source.path)

    def _file_rows(self, path: str) -> Iterator[tuple[str, Raw]]:
        self._raw = open_raw(path)
        self._bytes = 0 if is_url(path) else Path(path).stat().st_size
        if is_plain_text(path):
            self.layout = PLAIN
            return ((f"{path}:{n}", document) for n, document in read_plain(path, self._raw))
        start = self._raw.read(len(PARQUET_MAGIC))
        self._raw.seek(0)
        if start == PARQUET_MAGIC:
            return _parquet_rows(path, self._raw)
        try:
            first = open_bytes(path).read(4096) if start else b""
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise UserError(f"{path}: the compressed file is cut or damaged: {error}") from None
        if first.removeprefix(UTF8_BOM).lstrip()[:1] == b"[":
            return _array_rows(path, open_bytes(path, self._raw))
        return ((f"{path}:{n}", line) for n, line in read_raw_lines(path, self._raw))


def to_record(layout: str, row: Raw, source: Source, text_column: str | None = None) -> Record:
    """The checked record of a row of `Rows`.

    Raises:
        UserError: what is wrong with the row; the caller knows where it stands.
    """
    if layout == PLAIN and isinstance(row, bytes):
        layout, value, text_column = TEXTS, {"text": decode_plain(row)}, None
    else:
        value = row if isinstance(row, dict) else parse_object(row)
    try:
        layout = layout or layout_of(value, text_column)
        record = Record.from_json(convert(layout, value, text_column))
    except RecursionError:
        raise UserError("a value is nested too deeply", "invalid JSON") from None
    return source.named_in(record)


def read_source(path: str | Path, name: str | None = None) -> Iterator[Record]:
    """Yield the records of one source, with `source` set to `name`.

    `name` defaults to the file's stem or the folder's name; a record of our own form that
    already names its source keeps it unless `name` is given.

    Raises:
        UserError: names file, line and fault.
    """
    source = Source.parse(path)
    if name:
        source = dataclasses.replace(source, name=name, named=True)
    rows = Rows(source)
    for where, row in rows:
        try:
            record = to_record(rows.layout, row, source)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        yield record


def _array_rows(path: str, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    number = -1
    try:
        for number, item in enumerate(read_array(file)):
            yield f"{path}: item {number}", without_nulls(item)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cut or damaged after item {number}: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: after item {number}: {error}") from None


def _parquet_rows(path: str, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(file).iter_batches(PARQUET_ROWS):
            for row in batch.to_pylist():
                yield f"{path}: row {number}", without_nulls(row)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged parquet after row {number}: {error}") from None


def _dataset_rows(path: Path) -> Iterator[tuple[str, Row]]:
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        if any(path.rglob("*.parquet")) or any(path.rglob("*.jsonl*")):
            yield from _streamed(str(path))
            return
        raise UserError(
            f"{path} is neither a BEIR folder (corpus.jsonl, queries.jsonl, qrels/) nor a "
            "Hugging Face dataset (save_to_disk, or parquet and jsonl files)"
        )
    from datasets import Dataset, DatasetDict, load_from_disk  # slow to import

    try:
        loaded: Dataset | DatasetDict = load_from_disk(str(path))
    except Exception as error:  # pyarrow and json errors of many kinds: the folder is damaged
        raise UserError(f"{path}: the dataset does not load: {error}") from None
    if isinstance(loaded, DatasetDict):
        loaded = loaded[_one_split(path, list(loaded))]
    for number, row in enumerate(loaded):
        yield f"{path}: row {number}", without_nulls(row)


def _streamed(name: str) -> Iterator[tuple[str, Row]]:
    """A dataset on the Hub, or a local folder laid out like one, without a copy of it."""
    from datasets import load_dataset

    number, path, options = 0, name, {}
    match = None if Path(name).exists() else HUB_NAME.fullmatch(name)
    if match:
        path = match["name"]
        options = {"name": match["config"], "revision": match["revision"]}
    try:
        splits: Any = load_dataset(path, streaming=True, **options)
        split = match["split"] if match and match["split"] else _one_split(name, list(splits))
        for row in splits[split]:
            yield f"{name}: row {number}", without_nulls(row)
            number += 1
    except UserError:
        raise
    except Exception as error:  # network, hub, pyarrow and json errors of many kinds
        fault = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: the dataset does not load (row {number}); it is neither a path here nor one "
            f"that the Hub gives: {fault}"
        ) from None


def _one_split(path: str | Path, splits: list[str]) -> str:
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise UserError(f"{path} has no split 'train'; it has: {', '.join(splits) or 'none'}")


def _beir_rows(folder: Path) -> Iterator[tuple[str, Row]]:
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
            yield f"{folder}: query '{query_id}'", record.to_json()
