"""Encode all texts of some shards with a teacher, each once, into a folder of `teacher.py`.

A killed run goes on where it stood: finished blocks lie in OUT/blocks until the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from drama.console import console, progress
from drama.data.records import content_id, document_hash64, query_hash64
from drama.data.stream import ShardSet, open_pairs
from drama.errors import UserError
from drama.files import replacing
from drama.hf import model_sha256
from drama.retrieve.models import Encode, open_model
from drama.teacher import TeacherVectors
from drama.tokenizer import Kind

BLOCK = 4096  # texts that are encoded, and recorded as done, together


def write_teacher_vectors(
    shards: Sequence[str | Path], model: str | Path, out: str | Path
) -> TeacherVectors:
    """Encode every query and document of some shards with a teacher, each text once.

    Args:
        model: a folder that we load, or any that sentence-transformers loads.

    Raises:
        UserError: bad shards, no such model, or `out` holds another teacher's vectors.
    """
    folder, records = Path(out), open_pairs(shards)
    about = {
        "model": str(model),
        "model_sha256": model_sha256(model),
        "shards": records.sha256,
    }
    if _same(folder / "manifest.json", about, folder):
        console.print(f"{folder}: all vectors are there already", markup=False)
        return TeacherVectors(folder)
    blocks = folder / "blocks"
    blocks.mkdir(parents=True, exist_ok=True)
    if not _same(blocks / "about.json", about, folder):
        with replacing(blocks / "about.json") as temporary:
            temporary.write_text(json.dumps(about), encoding="utf-8")
    encode, total, parts = open_model(model).encode, len(records), []
    with progress() as bar:
        task = bar.add_task("teach", total=total, note="")
        for number, (done, texts) in enumerate(_blocks(records)):
            path = blocks / f"{number:06d}.npz"
            if not path.is_file():
                ids, vectors = _encoded(texts, encode)
                with replacing(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, ids=ids, vectors=vectors)
            parts.append(path)
            bar.update(task, completed=done, note=f"{number + 1:,} blocks")
    _join(parts, folder)
    with replacing(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(about, indent=1), encoding="utf-8")
    shutil.rmtree(blocks)
    return TeacherVectors(folder)


def _blocks(records: ShardSet) -> Iterator[tuple[int, dict[int, tuple[Kind, str]]]]:
    """Records read so far, and the next texts that were not met before, by id."""
    seen: set[int] = set()
    texts: dict[int, tuple[Kind, str]] = {}
    for index in range(len(records)):
        record = records.read(index)
        found: dict[int, tuple[Kind, str]] = {query_hash64(record.query): ("query", record.query)}
        for document in (*record.positives, *record.negatives):
            key = document_hash64(content_id(document.title, document.text))
            found[key] = ("document", document.full_text)
        for key, text in found.items():
            if key not in seen:
                seen.add(key)
                texts[key] = text
        if len(texts) >= BLOCK:
            yield index + 1, texts
            texts = {}
    if texts:
        yield len(records), texts


def _encoded(texts: dict[int, tuple[Kind, str]], encode: Encode) -> tuple[np.ndarray, np.ndarray]:
    kinds: tuple[Kind, ...] = ("query", "document")
    ids, rows = [], []
    for kind in kinds:
        chosen = [(key, text) for key, (of, text) in texts.items() if of == kind]
        if chosen:
            ids += [key for key, _ in chosen]
            rows.append(encode([text for _, text in chosen], kind).astype(np.float16))
    return np.array(ids, np.int64), np.concatenate(rows)


def _join(parts: Sequence[Path], folder: Path) -> None:
    """One sorted table of all blocks; one block in memory at a time."""
    ids = np.concatenate([np.load(path)["ids"] for path in parts])
    place = np.empty(len(ids), np.int64)
    order = np.argsort(ids)
    place[order] = np.arange(len(ids))
    width = np.load(parts[0])["vectors"].shape[1]
    with replacing(folder / "vectors.npy") as temporary:
        shape = (len(ids), width)
        vectors = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        first = 0
        for path in parts:
            block = np.load(path)["vectors"]
            vectors[place[first : first + len(block)]] = block
            first += len(block)
        vectors.flush()
        del vectors
    with replacing(folder / "ids.npy") as temporary, temporary.open("wb") as file:
        np.save(file, ids[order])


def _same(path: Path, about: Mapping[str, object], folder: Path) -> bool:
    """Whether the file is there and says the same.

    Raises:
        UserError: it says something else.
    """
    if not path.is_file():
        return False
    known = json.loads(path.read_text(encoding="utf-8"))
    for name, value in about.items():
        if known.get(name) != value:
            raise UserError(
                f"{folder} holds vectors of another {name}; give another --out, or remove it"
            )
    return True
