"""Write an index folder from a vectors folder (see `index_search.py` for its files).

Vectors are read once, in blocks; one file of the index is in memory at a time. The work is done in
`.NAME.building` beside the folder: a build that was killed goes on with the first file that is not
whole. The finished folder takes the place of the old one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
from rich.progress import Progress, TaskID

from drama.console import console, progress
from drama.errors import UserError
from drama.files import locked, replacing, replacing_folder
from drama.memory import machine_bytes
from drama.retrieve.corpus import read_documents
from drama.retrieve.index_search import Index, IndexMeta, check_finite, is_index, trained_index
from drama.retrieve.index_types import bytes_per_vector, check_type, choose_type
from drama.retrieve.lines import Lines, move_lines, write_lines
from drama.retrieve.vectors import Vectors, open_vectors

__all__ = ["Index", "build_index", "is_index"]

FILE_BYTES = 2 * 2**30  # of an index file, about; building holds one in memory


def build_index(
    vectors_dir: str | Path,
    out: str | Path,
    type: str = "auto",
    *,
    rows_per_file: int | None = None,
    documents: bool = True,
) -> IndexMeta:
    """Index a vectors folder into the folder `out`, whole or not at all.

    Args:
        type: one of `index_types.TYPES`, or auto, which takes one by the number of documents and
            the memory of this machine, and says why.
        rows_per_file: documents in a file of the index; default as many as 2 GiB hold.
        documents: keep a copy of titles and texts, which a search shows.

    Raises:
        UserError: unknown type or too few documents for it, faulty vectors, a corpus that is gone
            or not the one of the vectors, or an `out` that holds something else.
    """
    out, source = Path(out).absolute(), Path(vectors_dir)
    if out.exists() and not is_index(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no index; choose another folder")
    if rows_per_file is not None and rows_per_file < 1:
        raise UserError(f"rows_per_file {rows_per_file} must be at least 1")
    vectors_ND, manifest = open_vectors(source)
    if type == "auto":
        type, why = choose_type(manifest.rows, manifest.dim, machine_bytes())
        _say(f"{out}: type {type}: {why}")
    check_type(type, manifest.rows, str(source))
    if documents:
        _check_corpus(Path(manifest.corpus), manifest.corpus_sha256)
    fitting = max(1, FILE_BYTES // bytes_per_vector(type, manifest.dim))
    meta = IndexMeta.of(
        source,
        manifest,
        type,
        rows_per_file=min(rows_per_file or fitting, manifest.rows),
        documents=documents,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.building")
    work.mkdir(exist_ok=True)
    with locked(work / ".lock"), _nothing_left_of_bad_input(work):
        _start(work, meta)
        if not (work / "ids.txt").is_file():
            write_lines(work / "ids.txt", _ids(source / "ids.txt", meta.rows))
        vectors = Vectors(source, vectors_ND, Lines(work / "ids.txt"), manifest)
        _write_files(work, meta, vectors)
        if documents and not (work / "documents.jsonl").is_file():
            write_lines(work / "documents.jsonl", _documents(Path(meta.corpus)))
        with replacing_folder(out) as folder:
            for name in (*meta.file_names(), "meta.json"):
                os.replace(work / name, folder / name)
            move_lines(work / "ids.txt", folder)
            if documents:
                move_lines(work / "documents.jsonl", folder)
        shutil.rmtree(work)
    return meta


@contextmanager
def _nothing_left_of_bad_input(work: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        shutil.rmtree(work)
        raise


def _start(work: Path, meta: IndexMeta) -> None:
    """Keep what a killed build of the same index has left, and nothing else."""
    path = work / "meta.json"
    try:
        left = json.loads(path.read_text(encoding="utf-8")) == dataclasses.asdict(meta)
    except (OSError, ValueError):
        left = False
    if not left:
        for file in work.iterdir():
            if file.name != ".lock":
                file.unlink()
        with replacing(path) as temporary:
            temporary.write_text(meta.to_json(), encoding="utf-8")
    elif done := sum((work / name).is_file() for name in meta.file_names()):
        _say(f"{work}: going on after {done} of {len(meta.file_names())} files")


def _write_files(work: Path, meta: IndexMeta, vectors: Vectors) -> None:
    with progress() as bar:
        task = bar.add_task("index", total=meta.rows, note="train")
        trained = work / "trained.faiss"
        if not trained.is_file():
            _write(trained, trained_index(vectors, meta))
        for number, name in enumerate(meta.file_names()):
            start = number * meta.rows_per_file
            stop = min(start + meta.rows_per_file, meta.rows)
            bar.update(task, completed=start, note=name)
            if not (work / name).is_file():
                index = faiss.read_index(str(trained))
                _fill(index, vectors, meta.dim, start, stop, bar, task)
                _write(work / name, index)
        bar.update(task, completed=meta.rows, note="")


def _fill(
    index: Any, vectors: Vectors, dim: int, start: int, stop: int, bar: Progress, task: TaskID
) -> None:
    for block_ND in vectors.blocks(dim, start, stop):
        check_finite(block_ND, range(start, start + len(block_ND)), vectors)
        index.add(block_ND)
        start += len(block_ND)
        bar.update(task, completed=start)


def _write(path: Path, index: Any) -> None:
    with replacing(path) as temporary:
        faiss.write_index(index, str(temporary))


def _check_corpus(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise UserError(
            f"the corpus {path} of the vectors is not there; with --no-documents the index is "
            "built without titles and texts"
        )
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise UserError(f"the corpus {path} has changed since it was encoded; encode again")


def _ids(path: Path, rows: int) -> Iterator[str]:
    found = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                found += 1
                yield line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if found != rows:
        raise UserError(f"{path} holds {found} ids for {rows} vectors; encode again")


def _documents(corpus: Path) -> Iterator[str]:
    for document in read_documents(corpus):
        yield json.dumps(document.to_json(), ensure_ascii=False)


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
