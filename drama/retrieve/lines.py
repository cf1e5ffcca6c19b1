"""Text files read by the number of the line, without holding them in memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drama.errors import UserError
from drama.files import replacing


class Lines(Sequence[str]):
    """The lines of `NAME.txt`, found by `NAME.txt.offsets` (int64 byte positions, one more than
    lines). Both files are mapped.

    Raises:
        UserError: a file is missing, or the two do not belong together.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._offsets_N = np.memmap(_offsets_path(path), "<i8", "r")
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); build the index again") from None
        if self._offsets_N[-1] != len(self._bytes):
            raise UserError(f"{path} and its offsets do not fit; build the index again")
        self._path = path

    def __len__(self) -> int:
        return len(self._offsets_N) - 1

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        start, end = self._offsets_N[number], self._offsets_N[number + 1]
        return self._bytes[int(start) : int(end) - 1].decode()

    def __iter__(self) -> Iterator[str]:
        with self._path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line.removesuffix("\n")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines and their offsets, one line in memory at a time. No line holds a line feed."""
    with replacing(_offsets_path(path)) as offsets, replacing(path) as temporary:
        position = 0
        with temporary.open("wb") as text, offsets.open("wb") as index:
            index.write(position.to_bytes(8, "little"))
            for line in lines:
                position += text.write(f"{line}\n".encode())
                index.write(position.to_bytes(8, "little"))


def move_lines(path: Path, folder: Path) -> None:
    """Move both files into a folder of the same disk."""
    for file in (path, _offsets_path(path)):
        os.replace(file, folder / file.name)


def _offsets_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.offsets")
