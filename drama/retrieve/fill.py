"""Fill a vectors folder window by window, on any number of ranks; a killed run goes on.

While it is not whole, the folder holds beside vectors.npy and ids.txt

    progress.json  the manifest of the vectors to come
    done.bin       one byte a window, 1 once its vectors are on the disk

Ranks take the next window whenever they are free. A window's vectors depend on that window alone,
so neither the ranks nor a kill shows in the result, and a kill loses the windows at work. Rows and
bytes are written, never through a map: two nodes that map one page of a shared disk would undo
each other, and a full disk under a map is a signal instead of an error.

N documents, D width.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from drama.console import console, progress
from drama.errors import UserError
from drama.files import locked, replacing
from drama.retrieve.vectors import (
    VectorsManifest,
    check_array,
    open_vectors,
    read_ids,
    read_json,
    read_manifest,
    read_vectors,
    write_ids,
)

if TYPE_CHECKING:
    from drama.distributed import Ranks  # DeepSpeed is slow to import

IDS = "ids.txt"
LOCK = ".lock"
_WHILE_HALF = ("progress.json", "done.bin")


@dataclass(frozen=True)
class Window:
    """Documents that are embedded together: what the model takes of each, and its id."""

    number: int
    items: Sequence[Any]
    ids: Sequence[Any]


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Keep other jobs out of a folder, from before `begin_vectors` until `fill_vectors` is done.

    Raises:
        UserError: another job writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with locked(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def needs_filling(folder: Path) -> bool:
    """Whether `fill_vectors` is going to write there: vectors, or the end of a job that was killed
    when they were whole."""
    whole = (folder / "manifest.json").is_file()
    return not whole or any((folder / name).exists() for name in (*_WHILE_HALF, LOCK))


def begin_vectors(
    folder: Path,
    manifest: VectorsManifest,
    ids: Sequence[str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Lay out a folder for `fill_vectors`, or check that the one that is there can be gone on with.

    Args:
        manifest: what the vectors are a function of; its `window` documents make a window.
        ids: of the documents, for ids.txt; None writes none.
        overwrite: replace vectors of other inputs, and damaged ones, instead of refusing.

    Raises:
        UserError: the folder holds other vectors or damaged ones, or too little disk.
    """
    try:
        if _is_there(folder, manifest, ids is not None):
            if overwrite and ids is not None and (folder / "manifest.json").is_file():
                read_vectors(folder)  # to replace them where one is not finite
            return
    except UserError:
        if not overwrite:
            raise
    _check_disk(folder, manifest)
    for name in ("manifest.json", "progress.json"):
        (folder / name).unlink(missing_ok=True)
    _lay_out(folder, manifest, ids)


def fill_vectors(
    folder: Path,
    windows: Callable[[Iterable[int]], Iterator[Window]],
    embed: Callable[[Sequence[Any]], np.ndarray],
    *,
    unit: str,
    ranks: Ranks | None = None,
) -> None:
    """Embed what is left of a folder that `begin_vectors` has laid out; every rank calls it.

    Args:
        windows: yields the windows of these numbers, which ascend.
        embed: the vectors of a window's items.
        unit: what the length of an item counts.

    Raises:
        UserError: vectors with NaN.
    """
    if (folder / "manifest.json").is_file():
        console.print(f"{folder}: the vectors are there already", markup=False, soft_wrap=True)
        _clear(folder)
        return
    manifest = _inputs(folder)
    _work(folder, manifest, windows, embed, unit, ranks)

    def close() -> None:
        manifest.write(folder / "manifest.json")
        _clear(folder)

    if ranks is None:
        close()
    else:
        ranks.on_main(close)


def _clear(folder: Path) -> None:
    """Remove what a whole folder has no more use for; a job may be killed before it has done so."""
    for name in _WHILE_HALF:
        (folder / name).unlink(missing_ok=True)


def inputs_of(folder: Path) -> VectorsManifest:
    """The manifest of a folder that `begin_vectors` has laid out, filled or not.

    Raises:
        UserError: no such folder.
    """
    return read_manifest(folder) if (folder / "manifest.json").is_file() else _inputs(folder)


def _work(
    folder: Path,
    manifest: VectorsManifest,
    windows: Callable[[Iterable[int]], Iterator[Window]],
    embed: Callable[[Sequence[Any]], np.ndarray],
    unit: str,
    ranks: Ranks | None,
) -> None:
    before = _finished(folder)
    ours = itertools.count() if ranks is None else ranks.deal()
    numbers = itertools.takewhile(lambda number: number < len(before), ours)
    left = (number for number in numbers if not before[number])
    rows_before = _rows(manifest, before)
    several = ranks is not None and ranks.world_size > 1
    begin, size = time.perf_counter(), 0
    with ExitStack() as stack:
        vectors = stack.enter_context((folder / "vectors.npy").open("r+b"))
        done = stack.enter_context((folder / "done.bin").open("r+b"))
        bar = stack.enter_context(progress())
        task = bar.add_task("encode", total=manifest.rows, completed=rows_before, note="")
        header = check_array(folder, manifest).offset
        width = manifest.dim * np.dtype(manifest.dtype).itemsize
        for window in _ahead(windows(left)):
            first = window.number * manifest.window
            if len(window.items) != min(manifest.window, manifest.rows - first):
                raise UserError(f"{manifest.corpus} has changed since it was read; encode again")
            block = embed(window.items)
            _check_finite(block, window, manifest)
            vectors.seek(header + first * width)
            vectors.write(block.astype(manifest.dtype).tobytes())
            _sync(vectors)
            done.seek(window.number)
            done.write(b"\x01")
            _sync(done)
            size += sum(map(len, window.items))
            rows, seconds = _rows(manifest, _finished(folder)), time.perf_counter() - begin
            note = f"{(rows - rows_before) / seconds:,.0f} docs/s  {size / seconds:,.0f} {unit}/s"
            bar.update(task, completed=rows, note=note + " a rank" * several)
        if ranks is not None:
            ranks.wait()
            bar.update(task, completed=manifest.rows)


def _is_there(folder: Path, manifest: VectorsManifest, has_ids: bool) -> bool:
    """Whether the folder holds these vectors, whole or in part."""
    if (folder / "manifest.json").is_file():
        found = read_manifest(folder)
        if found != manifest:
            raise UserError(
                f"{folder} holds vectors of other inputs ({found.differences(manifest)}); "
                "choose another folder, or --overwrite"
            )
        open_vectors(folder)
        if has_ids:
            read_ids(folder / IDS, manifest.rows)
        return True
    if not (folder / "progress.json").is_file():
        return False
    found = _inputs(folder)
    if found != manifest:
        raise UserError(
            f"{folder} is half-written with other inputs ({found.differences(manifest)}); "
            "choose another folder, or --overwrite"
        )
    check_array(folder, manifest)
    if has_ids:
        read_ids(folder / IDS, manifest.rows)
    finished = _finished(folder)
    if len(finished) != _num_windows(manifest):
        raise UserError(f"{folder}/done.bin is damaged; encode again with --overwrite")
    rows = _rows(manifest, finished)
    console.print(f"{folder}: going on after {rows:,} documents", markup=False, soft_wrap=True)
    return True


def _check_disk(folder: Path, manifest: VectorsManifest) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = manifest.rows * manifest.dim * np.dtype(manifest.dtype).itemsize
    free = shutil.disk_usage(folder).free
    if (old := folder / "vectors.npy").is_file():
        free += old.stat().st_blocks * 512  # it is overwritten; an unfilled one has holes
    if needed > free:
        raise UserError(
            f"{folder}: the vectors need {needed / 2**20:,.0f} MiB, "
            f"{free / 2**20:,.0f} MiB are free there"
        )


def _lay_out(folder: Path, manifest: VectorsManifest, ids: Sequence[str] | None) -> None:
    """Write the files of a new run; progress.json comes last, so it vouches for the others."""
    shape = (manifest.rows, manifest.dim)
    if ids is not None:
        write_ids(folder / IDS, ids)
    np.lib.format.open_memmap(
        folder / "vectors.npy", mode="w+", dtype=manifest.dtype, shape=shape
    ).flush()
    with replacing(folder / "done.bin") as temporary:
        temporary.write_bytes(bytes(_num_windows(manifest)))
    with replacing(folder / "progress.json") as temporary:
        temporary.write_text(json.dumps({"inputs": dataclasses.asdict(manifest)}))


def _inputs(folder: Path) -> VectorsManifest:
    path = folder / "progress.json"
    state = read_json(path)
    inputs = state.get("inputs") if isinstance(state, dict) else None
    return VectorsManifest.from_json(inputs, str(path))


def _finished(folder: Path) -> np.ndarray:
    """Whether each window's vectors are on the disk."""
    try:
        return np.fromfile(folder / "done.bin", np.uint8).astype(bool)
    except FileNotFoundError:
        raise UserError(f"{folder}/done.bin is missing; encode again with --overwrite") from None


def _num_windows(manifest: VectorsManifest) -> int:
    return -(-manifest.rows // manifest.window)


def _rows(manifest: VectorsManifest, finished: np.ndarray) -> int:
    """How many documents the finished windows hold; the last one may be shorter."""
    too_many = len(finished) * manifest.window - manifest.rows
    return int(finished.sum()) * manifest.window - too_many * int(finished[-1])


def _check_finite(block: np.ndarray, window: Window, manifest: VectorsManifest) -> None:
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{manifest.model} gives a vector with NaN for document "
            f"'{window.ids[int(np.argmin(finite))]}'; the weights are broken"
        )


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _ahead(windows: Iterator[Window]) -> Iterator[Window]:
    """Read and prepare the next window in a thread while the model works on this one."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, windows, None)
        while (window := upcoming.result()) is not None:
            upcoming = pool.submit(next, windows, None)
            yield window
