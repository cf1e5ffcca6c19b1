"""Test sets as upstream releases them, rewritten to BEIR's layout.

* `miracl/miracl` and `miracl/miracl-corpus` (Zhang et al. 2023): topics are `id TAB text`, qrels
  are TREC's four columns, passages are lines of {docid, title, text} in several files.
* `Shitao/MLDR` (Chen et al. 2024, arXiv 2402.03216): documents are lines of {docid, text}; a
  split's lines are {query_id, query, positive_passages: [{docid, text}], ...}.
* `BeIR/NAME` and `BeIR/NAME-qrels`: parquet tables of {_id, title, text}; qrels as BEIR's.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drama.console import console
from drama.data.lines import PACKED_SUFFIXES, read_lines, read_objects
from drama.errors import UserError
from drama.files import replacing_folder, stamp
from drama.retrieve.datasets import Layout, packed

Row = dict[str, str]
Judgement = tuple[str, str, str]  # query, document, grade
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Parts:
    """A set: the files it is read from, and their content, read as it is asked for."""

    files: list[Path]
    documents: Iterable[Row]
    queries: Iterable[Row]
    judgements: Iterable[Judgement]


def rewrite(layout: Layout, folder: Path, split: str, target: Path) -> Path:
    """Write the set at `folder` into the BEIR folder `target`, unless it is there already.

    Raises:
        UserError: missing files, or a line that is not of the layout.
    """
    parts = _READERS[layout](folder, split)
    stamps = [stamp(path) for path in parts.files]
    inputs = json.dumps([FORMAT_VERSION, layout, split, stamps])
    mark = target / "source.json"
    if mark.is_file() and mark.read_text(encoding="utf-8") == inputs:
        return target
    console.print(f"{folder}: rewriting {split} to BEIR's layout", soft_wrap=True, markup=False)
    with replacing_folder(target) as temporary:
        _write_jsonl(temporary / "corpus.jsonl.gz", parts.documents)
        _write_jsonl(temporary / "queries.jsonl.gz", parts.queries)
        (temporary / "qrels").mkdir()
        with (temporary / "qrels" / f"{split}.tsv").open("w", encoding="utf-8") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            file.writelines("\t".join(judgement) + "\n" for judgement in parts.judgements)
        (temporary / mark.name).write_text(inputs, encoding="utf-8")
    return target


def _miracl(folder: Path, split: str) -> Parts:
    topics = _only(folder / "topics", f"*-{split}.tsv")
    qrels = _only(folder / "qrels", f"*-{split}.tsv")
    own = folder.name.replace("miracl-v", "miracl-corpus-v")
    homes = [folder / "corpus", folder.parent / own, folder.parent / "miracl-corpus" / own,
             folder.parent.parent / "miracl-corpus" / own]  # fmt: skip
    files = next((found for home in homes if (found := _passages(home))), [])
    if not files:
        raise UserError(
            f"{folder} has topics and qrels but no passages; put {own}/docs-*.jsonl.gz beside it"
        )
    return Parts([*files, topics, qrels], _documents(files), _topics(topics), _trec_qrels(qrels))


def _mldr(folder: Path, split: str) -> Parts:
    corpus, asked = packed(folder, "corpus.jsonl"), packed(folder, f"{split}.jsonl")
    assert corpus is not None
    if asked is None:
        raise UserError(f"{folder} has no split '{split}': {split}.jsonl.gz is missing")
    files = [corpus, asked]
    return Parts(files, _documents([corpus]), _mldr_queries(asked), _mldr_qrels(asked))


def _parquet(folder: Path, split: str) -> Parts:
    qrels = packed(folder / "qrels", f"{split}.tsv")
    if qrels is None:
        raise UserError(f"{folder} has no qrels/{split}.tsv; the hub has it in NAME-qrels")
    files = [folder / "corpus", folder / "queries", qrels]
    return Parts(files, _rows(files[0]), _rows(files[1]), _beir_qrels(qrels))


_READERS: dict[Layout, Callable[[Path, str], Parts]] = {
    "miracl": _miracl, "mldr": _mldr, "parquet": _parquet,
}  # fmt: skip


def _passages(folder: Path) -> list[Path]:
    """The files of a corpus, docs-2 before docs-10."""
    files = [path for suffix in PACKED_SUFFIXES for path in folder.glob(f"*.jsonl{suffix}")]
    return sorted(files, key=lambda path: (len(path.name), path.name))


def _documents(files: Iterable[Path]) -> Iterator[Row]:
    for file in files:
        for where, value in read_objects(file):
            document = {"_id": _text(value, "docid", where), "text": _text(value, "text", where)}
            if value.get("title") is not None:
                document["title"] = _text(value, "title", where)
            yield document


def _topics(path: Path) -> Iterator[Row]:
    for number, line in read_lines(path):
        id_, tab, text = line.partition("\t")
        if not tab:
            raise UserError(f"{path}:{number}: no tab; a line is 'query id, tab, query'")
        yield {"_id": id_, "text": text}


def _trec_qrels(path: Path) -> Iterator[Judgement]:
    for number, line in read_lines(path):
        columns = line.split()
        if len(columns) != 4:
            raise UserError(
                f"{path}:{number}: {len(columns)} columns, expected query, Q0, document, grade"
            )
        yield columns[0], columns[2], columns[3]


def _mldr_queries(path: Path) -> Iterator[Row]:
    for where, value in read_objects(path):
        yield {"_id": _text(value, "query_id", where), "text": _text(value, "query", where)}


def _mldr_qrels(path: Path) -> Iterator[Judgement]:
    for where, value in read_objects(path):
        query_id, passages = _text(value, "query_id", where), value.get("positive_passages")
        if not isinstance(passages, list) or not all(isinstance(p, dict) for p in passages):
            raise UserError(f"{where}: the line has no list 'positive_passages'")
        for passage in passages:
            yield query_id, _text(passage, "docid", where), "1"


def _beir_qrels(path: Path) -> Iterator[Judgement]:
    for number, line in read_lines(path):
        columns = line.split("\t")
        if len(columns) != 3:
            raise UserError(f"{path}:{number}: {len(columns)} columns, expected three with tabs")
        if number > 1 or columns[2].lstrip("-").isdigit():  # no header
            yield columns[0], columns[1], columns[2]


def _rows(folder: Path) -> Iterator[Row]:
    import pyarrow.parquet

    for path in sorted(folder.glob("*.parquet")):
        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches()
            for batch in batches:
                for row in batch.to_pylist():
                    yield {key: _text(row, key, str(path)) for key in ("_id", "title", "text")
                           if row.get(key) is not None}  # fmt: skip
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} cannot be read: {error}") from None


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(path for end in PACKED_SUFFIXES for path in folder.glob(pattern + end))
    if len(found) != 1:
        there = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
        raise UserError(f"{folder} has {len(found)} files {pattern}, expected one; it has {there}")
    return found[0]


def _text(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise UserError(f"{where}: the line has no string '{key}'")
    return text


def _write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Packed fast, and without the time, so that equal content is equal bytes."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 1, raw, mtime=0) as packer,
        io.TextIOWrapper(packer, encoding="utf-8") as file,
    ):
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
