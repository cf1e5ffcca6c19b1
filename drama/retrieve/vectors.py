"""A folder of document vectors.

    vectors.npy    [N, D] float32 or float16, rows of norm 1, in corpus order
    ids.txt        N document ids, one a line
    manifest.json  where they come from; written last, so a folder that has it is whole

N documents, D width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drama.errors import UserError
from drama.files import replacing

FORMAT_VERSION = 1
BLOCK = 65_536  # rows read at a time


@dataclass(frozen=True)
class VectorsManifest:
    """Everything that the vectors are a function of.

    Two equal manifests mean equal vectors, to the bit, on one machine.
    """

    model: str
    model_sha256: str
    corpus: str
    corpus_sha256: str
    rows: int
    kind: str
    max_tokens: int
    dim: int
    dtype: str  # of vectors.npy
    compute_dtype: str  # of the model while it encoded
    window: int  # documents that were sorted by length together
    token_budget: int
    format_version: int = FORMAT_VERSION

    def differences(self, other: VectorsManifest) -> str:
        """ "name: mine, not theirs" for every field in which two manifests differ."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        pairs = [f"{name} {mine[name]}, not {theirs[name]}" for name in mine
                 if mine[name] != theirs[name]]  # fmt: skip
        return "; ".join(pairs)

    def write(self, path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def from_json(cls, value: Any, where: str) -> VectorsManifest:
        """Build one from parsed JSON.

        Raises:
            UserError: another format version, or fields that are missing, unknown or mistyped.
        """
        if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
            found = value.get("format_version") if isinstance(value, dict) else None
            raise UserError(
                f"{where}: format version {found}, this version of drama reads {FORMAT_VERSION}; "
                "encode again with --overwrite"
            )
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        wrong = sorted(fields.keys() ^ value.keys()) or [
            name for name, kind in fields.items() if type(value[name]).__name__ != kind
        ]
        if wrong:
            raise UserError(f"{where}: '{wrong[0]}' is missing, unknown or of the wrong type")
        return cls(**value)


@dataclass(frozen=True)
class Vectors:
    """Vectors opened for reading; `vectors_ND` is mapped from the file, not held in memory."""

    folder: Path
    vectors_ND: np.ndarray
    ids: Sequence[str]
    manifest: VectorsManifest

    def blocks(
        self, dim: int | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[np.ndarray]:
        """Yield float32 blocks [<= 65,536, dim] of rows `start` to `stop`, cut to the first `dim`
        columns, of norm 1."""
        stop = len(self.vectors_ND) if stop is None else stop
        for first in range(start, stop, BLOCK):
            yield self._cut(self.vectors_ND[first : min(first + BLOCK, stop)], dim)

    def take(self, rows_M: np.ndarray, dim: int | None = None) -> np.ndarray:
        """The rows of these numbers, [M, dim], as `blocks` gives them."""
        return self._cut(self.vectors_ND[rows_M], dim)

    def _cut(self, block: np.ndarray, dim: int | None) -> np.ndarray:
        block = np.asarray(block[:, :dim], np.float32)
        if dim is not None and dim < self.manifest.dim:
            block = cut(block, dim)
        return np.ascontiguousarray(block)


def cut(vectors_BD: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` numbers of vectors [B, D], scaled to norm 1: [B, dim]."""
    cut_Bd = vectors_BD[:, :dim]
    unit_Bd: np.ndarray = cut_Bd / np.maximum(np.linalg.norm(cut_Bd, axis=1, keepdims=True), 1e-12)
    return unit_Bd


def read_vectors(folder: str | Path, *, values: bool = True) -> Vectors:
    """Open a vectors folder and check all of it.

    values: read them all, to see that they are finite.

    Raises:
        UserError: half-written, another format version, array and manifest or ids that disagree,
            or a value that is not finite.
    """
    folder = Path(folder)
    vectors_ND, manifest = open_vectors(folder)
    ids = read_ids(folder / "ids.txt", manifest.rows)
    vectors = Vectors(folder, vectors_ND, ids, manifest)
    for number, block in enumerate(vectors.blocks() if values else ()):
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            id_ = ids[number * BLOCK + int(np.argmin(finite))]
            raise UserError(
                f"{folder}/vectors.npy: the vector of document '{id_}' is not finite; encode again "
                "with --overwrite"
            )
    return vectors


def open_vectors(folder: Path) -> tuple[np.ndarray, VectorsManifest]:
    """Map a folder's vectors [N, D], without reading them.

    Raises:
        UserError: half-written, another format version, or array and manifest that disagree.
    """
    manifest = read_manifest(folder)
    return check_array(folder, manifest), manifest


def check_array(folder: Path, manifest: VectorsManifest) -> np.memmap[Any, Any]:
    """Map a folder's vectors [N, D], without reading them.

    Raises:
        UserError: unreadable, cut off, or of another shape or type than the manifest says.
    """
    path = folder / "vectors.npy"
    try:
        vectors_ND: np.memmap[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); encode again with --overwrite") from None
    expected = (manifest.rows, manifest.dim)
    if vectors_ND.shape != expected or vectors_ND.dtype.name != manifest.dtype:
        raise UserError(
            f"{path} holds {vectors_ND.dtype.name} of shape {vectors_ND.shape}, the manifest says "
            f"{manifest.dtype} of shape {expected}; encode again with --overwrite"
        )
    return vectors_ND


def read_manifest(folder: Path) -> VectorsManifest:
    """Read a vectors folder's manifest.

    Raises:
        UserError: none there, or none of this format version.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        half = (folder / "progress.json").is_file()
        raise UserError(
            f"{folder} is half-written: start the same encoding again and it goes on"
            if half
            else f"{folder} is no vectors folder (manifest.json is missing)"
        )
    return VectorsManifest.from_json(read_json(path), str(path))


def write_ids(path: Path, ids: Sequence[str]) -> None:
    """Write document ids, one a line."""
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{id_}\n" for id_ in ids), encoding="utf-8")


def read_ids(path: Path, rows: int) -> list[str]:
    """Read `rows` document ids, one a line.

    Raises:
        UserError: the file is missing or holds another number of ids.
    """
    try:
        ids = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); encode again with --overwrite") from None
    if len(ids) != rows:
        raise UserError(
            f"{path} holds {len(ids)} ids for {rows} vectors; encode again with --overwrite"
        )
    return ids


def read_json(path: Path) -> Any:
    """Parse a small JSON file.

    Raises:
        UserError: missing or not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
