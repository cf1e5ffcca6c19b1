"""Encode a corpus into a vectors folder; a killed run goes on where it stood.

Documents are taken in windows of a few thousand; inside a window they are sorted by length and
packed. A window's vectors depend on that window alone, so a run that was killed and started again
gives the same bits as an undisturbed one, and loses at most one window.

N documents, D width.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from drama.console import console, progress
from drama.encoder import Encoder
from drama.errors import UserError
from drama.files import replacing
from drama.hf import model_sha256
from drama.retrieve.corpus import Corpus, read_documents
from drama.retrieve.vectors import (
    Vectors,
    VectorsManifest,
    read_json,
    read_manifest,
    read_vectors,
    write_ids,
)
from drama.tokenizer import Kind

Storage = Literal["float32", "float16"]
T = TypeVar("T", bound=Sized)


def encode_corpus(
    corpus_path: str | Path,
    model_path: str | Path,
    out: str | Path,
    *,
    kind: Kind = "document",
    max_tokens: int | None = None,
    dim: int | None = None,
    dtype: Storage = "float32",
    token_budget: int = 8192,
    window: int = 2048,
    overwrite: bool = False,
) -> Vectors:
    """Encode every document of a corpus into the folder `out` (see `vectors.py` for its files).

    Args:
        corpus_path: a BEIR folder, or a .jsonl file of {_id, title, text}; .gz and .xz too.
        kind: which of the model's prefixes is put in front.
        max_tokens: where texts are cut; default the model's.
        dim: width of the vectors, at most the model's; default all of it.
        dtype: of the stored vectors; float16 halves the folder.
        token_budget: tokens a forward pass.
        window: documents sorted by length together and recorded as done together.
        overwrite: replace vectors of other inputs that `out` holds, instead of refusing.

    Raises:
        UserError: an empty or faulty corpus, a bad model folder, `dim` wider than the model, `out`
            holding other vectors, too little disk, or a model that gives vectors with NaN.
    """
    if dtype not in ("float32", "float16"):
        raise UserError(f"dtype {dtype} is not a storage type; float32 and float16 are")
    for name, value in (("token_budget", token_budget), ("window", window)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    corpus = Corpus.scan(corpus_path)
    encoder = load_encoder(model_path)
    dim = check_dim(dim, encoder, model_path)
    manifest = VectorsManifest(
        model=str(Path(model_path).resolve()),
        model_sha256=model_sha256(model_path),
        corpus=str(corpus.path),
        corpus_sha256=corpus.sha256,
        rows=len(corpus.ids),
        kind=kind,
        max_tokens=_check_max_tokens(max_tokens, encoder, model_path),
        dim=dim,
        dtype=dtype,
        compute_dtype=str(next(encoder.parameters()).dtype).removeprefix("torch."),
        window=window,
        token_budget=token_budget,
    )
    fill_vectors(
        Path(out),
        manifest,
        lambda num_done: _token_rows(manifest, corpus, encoder, num_done),
        lambda rows: encoder.embed(rows, dim=dim, token_budget=token_budget),
        ids=corpus.ids,
        unit="tokens",
        overwrite=overwrite,
    )
    return read_vectors(out)


def fill_vectors(
    folder: Path,
    manifest: VectorsManifest,
    windows: Callable[[int], Iterator[list[T]]],
    embed: Callable[[list[T]], np.ndarray],
    *,
    ids: Sequence[str] | None = None,
    unit: str,
    overwrite: bool = False,
) -> None:
    """Write `vectors.npy` window by window, going on where a killed run stood.

    Args:
        manifest: what the vectors are a function of; its `window` documents make a window.
        windows: what is embedded of each window after so many of them.
        embed: the vectors of a window.
        ids: of the documents, for ids.txt; None writes none.
        unit: what the length of an embedded item counts.
        overwrite: replace vectors of other inputs that the folder holds, instead of refusing.

    Raises:
        UserError: the folder holds other vectors, too little disk, or vectors with NaN.
    """
    if _is_done(folder, manifest, overwrite):
        console.print(f"{folder}: {manifest.rows:,} vectors are there already", markup=False)
        return
    num_done = _windows_done(folder, manifest, overwrite)
    if num_done is None:
        num_done = _start(folder, manifest, ids)
    _encode_windows(folder, manifest, windows, embed, num_done, unit, ids)
    manifest.write(folder / "manifest.json")
    (folder / "progress.json").unlink()


def load_encoder(model_path: str | Path) -> Encoder:
    """Load a retriever for inference: bfloat16 on a GPU where there is one, else float32.

    Raises:
        UserError: not a retriever folder.
    """
    if torch.cuda.is_available():
        return Encoder.from_pretrained(model_path, dtype=torch.bfloat16, device="cuda")
    return Encoder.from_pretrained(model_path)


def check_dim(dim: int | None, encoder: Encoder, model_path: str | Path) -> int:
    """Return the width to use.

    Raises:
        UserError: below 1 or wider than the model.
    """
    if dim is not None and not 1 <= dim <= encoder.dim:
        trained = ", ".join(map(str, encoder.matryoshka_dims))
        raise UserError(
            f"dim {dim} does not fit {model_path}: 1 to {encoder.dim} do, trained were {trained}"
        )
    return dim or encoder.dim


def _check_max_tokens(max_tokens: int | None, encoder: Encoder, model_path: str | Path) -> int:
    limit = encoder.backbone.config.max_position_embeddings
    if max_tokens is not None and not 2 <= max_tokens <= limit:
        raise UserError(f"max_tokens {max_tokens} does not fit {model_path}: 2 to {limit} do")
    return max_tokens or encoder.max_tokens


def _is_done(folder: Path, manifest: VectorsManifest, overwrite: bool) -> bool:
    if not (folder / "manifest.json").is_file():
        return False
    try:
        found = read_manifest(folder)
    except UserError:
        if not overwrite:
            raise
    else:
        if found == manifest:
            return True
        if not overwrite:
            raise UserError(
                f"{folder} holds vectors of other inputs ({found.differences(manifest)}); "
                "choose another folder or remove this one"
            )
    (folder / "manifest.json").unlink()
    return False


def _windows_done(folder: Path, manifest: VectorsManifest, overwrite: bool) -> int | None:
    """How many windows a killed run has finished; None where nothing can be taken over."""
    path = folder / "progress.json"
    if not path.is_file():
        return None
    if overwrite and read_json(path).get("inputs") != dataclasses.asdict(manifest):
        return None
    state = read_json(path)
    found = VectorsManifest.from_json(state.get("inputs"), str(path))
    if found != manifest:
        raise UserError(
            f"{folder} is half-written with other inputs ({found.differences(manifest)}); "
            "choose another folder or remove this one"
        )
    num_done: int = state["windows_done"]
    console.print(
        f"{folder}: going on after {num_done * manifest.window:,} documents", markup=False
    )
    return num_done


def _start(folder: Path, manifest: VectorsManifest, ids: Sequence[str] | None) -> int:
    """Lay out the files of a new run; progress.json comes last, so it vouches for the others."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "progress.json").unlink(missing_ok=True)
    shape = (manifest.rows, manifest.dim)
    needed = manifest.rows * manifest.dim * np.dtype(manifest.dtype).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:  # a full disk under a mapped file is a signal, not an error
        raise UserError(
            f"{folder}: the vectors need {needed / 2**20:,.0f} MiB, "
            f"{free / 2**20:,.0f} MiB are free there"
        )
    if ids is not None:
        write_ids(folder / "ids.txt", ids)
    np.lib.format.open_memmap(
        folder / "vectors.npy", mode="w+", dtype=manifest.dtype, shape=shape
    ).flush()
    _record(folder, manifest, 0)
    return 0


def _record(folder: Path, manifest: VectorsManifest, num_done: int) -> None:
    state = {"inputs": dataclasses.asdict(manifest), "windows_done": num_done}
    with replacing(folder / "progress.json") as temporary:
        temporary.write_text(json.dumps(state))


def _encode_windows(
    folder: Path,
    manifest: VectorsManifest,
    windows: Callable[[int], Iterator[list[T]]],
    embed: Callable[[list[T]], np.ndarray],
    num_done: int,
    unit: str,
    ids: Sequence[str] | None,
) -> None:
    try:
        vectors_ND = np.lib.format.open_memmap(folder / "vectors.npy", mode="r+")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be resumed ({error}); remove it") from None
    first = num_done * manifest.window
    begin, size = time.perf_counter(), 0
    with progress() as bar:
        task = bar.add_task("encode", total=manifest.rows, completed=first, note="")
        for rows in _ahead(windows(num_done)):
            block = embed(rows)
            start = num_done * manifest.window
            finite = np.isfinite(block).all(axis=1)
            if not finite.all():
                row = start + int(np.argmin(finite))
                id_ = ids[row] if ids is not None else row
                raise UserError(
                    f"{manifest.model} gives a vector with NaN for document '{id_}'; "
                    "the weights are broken"
                )
            vectors_ND[start : start + len(rows)] = block
            vectors_ND.flush()
            num_done += 1
            _record(folder, manifest, num_done)
            size += sum(map(len, rows))
            seconds = time.perf_counter() - begin
            rates = (start + len(rows) - first) / seconds, size / seconds
            note = f"{rates[0]:,.0f} docs/s  {rates[1]:,.0f} {unit}/s"
            bar.update(task, completed=start + len(rows), note=note)


def _token_rows(
    manifest: VectorsManifest, corpus: Corpus, encoder: Encoder, num_skipped: int
) -> Iterator[list[list[int]]]:
    """Yield the token rows of each window after the first `num_skipped`."""
    documents = islice(read_documents(corpus.path), num_skipped * manifest.window, None)
    kind: Kind = "query" if manifest.kind == "query" else "document"
    while texts := [document.full_text for document in islice(documents, manifest.window)]:
        yield encoder.tokenize(texts, kind, manifest.max_tokens)


def _ahead(windows: Iterator[list[T]]) -> Iterator[list[T]]:
    """Read and prepare the next window in a thread while the model works on this one."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, windows, None)
        while (rows := upcoming.result()) is not None:
            upcoming = pool.submit(next, windows, None)
            yield rows
