"""Lines and JSON objects out of plain, gzip or xz files, with the place of every fault."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from drama.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
XZ_MAGIC = b"\xfd7zXZ\x00"
UTF8_BOM = b"\xef\xbb\xbf"


def open_bytes(path: str | Path) -> IO[bytes]:
    """Open a file for reading and unpack it if its first bytes are those of gzip or xz.

    Raises:
        UserError: the file is missing, a folder, or not readable.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(len(XZ_MAGIC))
        if magic.startswith(GZIP_MAGIC):
            return cast(IO[bytes], gzip.open(path, "rb"))
        if magic.startswith(XZ_MAGIC):
            return cast(IO[bytes], lzma.open(path, "rb"))
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end); a byte order mark is dropped.

    Raises:
        UserError: unreadable file, broken compression, invalid UTF-8 (with the line).
    """
    number = 0
    with open_bytes(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(UTF8_BOM)
                try:
                    yield number, line.decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: invalid UTF-8 at byte {error.start} of the line"
                    ) from None
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise UserError(
                f"{path}: the compressed file is cut or damaged after line {number}: {error}"
            ) from None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        UserError: "invalid JSON: ..." for whatever the parser rejects, deep nesting included.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError("invalid JSON: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"invalid JSON: {error}") from None


def read_objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE:LINE", JSON object) for each line of a .jsonl file.

    Raises:
        UserError: names file, line and fault; a blank line or `{}` is an empty record.
    """
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if not line.strip():
            raise UserError(f"{where}: empty record (a blank line); remove the line")
        try:
            value = parse_json(line)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: a line must hold one JSON object")
        if not value:
            raise UserError(f"{where}: empty record")
        yield where, value
