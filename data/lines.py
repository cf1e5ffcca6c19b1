"""Lines and JSON objects out of plain, gzip, xz or zstd files, with the place of every fault."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from drama.data.remote import persistently
from drama.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
XZ_MAGIC = b"\xfd7zXZ\x00"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
READ_CHARS, READ_BYTES = 2**16, 2**18
MAX_ITEM_CHARS = 2**26
_ARRAY = re.compile(r"[\s\ufeff]*\[")
_COMMA = re.compile(r"\s*,?\s*")
UTF8_BOM = b"\xef\xbb\xbf"
PACKED_SUFFIXES = ("", ".gz", ".xz", ".zst")


def is_url(path: str | Path) -> bool:
    """Whether the path is an address that fsspec opens: s3://, gs://, hf://, https://, ..."""
    return "://" in str(path)


def open_raw(path: str | Path) -> IO[bytes]:
    """Open a file or an address for reading, packed as it is.

    Raises:
        UserError: missing, a folder, or not readable.
    """
    try:
        if not is_url(path):
            return open(path, "rb")
        import fsspec

        file = persistently(str(path), lambda: fsspec.open(str(path), "rb").open())
        return cast(IO[bytes], io.BufferedReader(_FromAfar(str(path), file), READ_BYTES))
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise UserError(f"cannot read {path}: {reason}") from None


class _FromAfar(io.RawIOBase):
    """A file of fsspec. A fault of the network is tried again where the file has ranges; a stream
    that broke off would go on with its end, as if it were whole."""

    def __init__(self, address: str, file: Any) -> None:
        self._address, self._file = address, file
        self._tries = None if getattr(file, "cache", None) is not None else 1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        return persistently(self._address, lambda: int(self._file.seek(offset, whence)), 1)

    def readinto(self, buffer: Any) -> int:
        part = persistently(self._address, lambda: self._file.read(len(buffer)), self._tries)
        buffer[: len(part)] = part
        return len(part)


def open_bytes(path: str | Path, raw: IO[bytes] | None = None) -> IO[bytes]:
    """Open a file or address; unpack it if its first bytes are those of a packer.

    Args:
        raw: the file, if it is open already.

    Raises:
        UserError: the file is missing, a folder, or not readable.
    """
    raw = raw or open_raw(path)
    magic = raw.read(len(XZ_MAGIC))
    raw.seek(0)
    if magic.startswith(GZIP_MAGIC):
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if magic.startswith(XZ_MAGIC):
        return cast(IO[bytes], lzma.open(raw, "rb"))
    if magic.startswith(ZSTD_MAGIC):
        import pyarrow

        unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
        return cast(IO[bytes], io.BufferedReader(unpacked))
    return raw


def read_raw_lines(path: str | Path, raw: IO[bytes] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes of the line); a byte order mark is dropped.

    Raises:
        UserError: unreadable file or broken compression.
    """
    number = 0
    with open_bytes(path, raw) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line.removeprefix(UTF8_BOM) if number == 1 else line
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            fault = "reading stopped" if is_url(path) else "the compressed file is cut or damaged"
            raise UserError(f"{path}: {fault} after line {number}: {error}") from None


def decode_line(line: bytes) -> str:
    """The line's text without its end.

    Raises:
        UserError: invalid UTF-8.
    """
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"invalid UTF-8 at byte {error.start} of the line", "invalid UTF-8"
        ) from None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end); a byte order mark is dropped.

    Raises:
        UserError: unreadable file, broken compression, invalid UTF-8 (with the line).
    """
    for number, line in read_raw_lines(path):
        try:
            yield number, decode_line(line)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        UserError: "invalid JSON: ..." for whatever the parser rejects, deep nesting included.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError("invalid JSON: nested too deeply", "invalid JSON") from None
    except ValueError as error:
        raise UserError(f"invalid JSON: {error}", "invalid JSON") from None


def parse_object(line: bytes | str) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        UserError: invalid UTF-8 or JSON; a blank line or `{}` is an empty record.
    """
    text = line if isinstance(line, str) else decode_line(line)
    if not text.strip():
        raise UserError("empty record (a blank line); remove the line", "empty record")
    value = parse_json(text)
    if not isinstance(value, dict):
        raise UserError("a line must hold one JSON object", "invalid JSON")
    if not value:
        raise UserError("empty record", "empty record")
    return value


def read_objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE:LINE", JSON object) for each line of a .jsonl file.

    Raises:
        UserError: names file, line and fault; a blank line or `{}` is an empty record.
    """
    for number, line in read_raw_lines(path):
        where = f"{path}:{number}"
        try:
            value = parse_object(line)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        yield where, value


def read_array(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that is one JSON array of them, one in memory at a time.

    Raises:
        UserError: invalid JSON or UTF-8, or an item that is no object or has more than 64 MiB.
    """
    text, decode = codecs.getreader("utf-8")(file), json.JSONDecoder().raw_decode
    size = READ_CHARS
    try:
        buffer = text.read(size)
        start = _ARRAY.match(buffer)
        if start is None:
            raise UserError("no JSON array")
        at = start.end()
        while True:
            at = _COMMA.match(buffer, at).end()  # type: ignore[union-attr]
            if buffer[at : at + 1] == "]":
                rest = buffer[at + 1 :]
                while rest:
                    if rest.strip():
                        raise UserError("something follows the end of the JSON array")
                    rest = text.read(READ_CHARS)
                return
            try:
                item, at = decode(buffer, at)
            except json.JSONDecodeError as error:
                more = text.read(size) if len(buffer) - at < MAX_ITEM_CHARS else ""
                if not more:
                    raise UserError(f"invalid JSON: {error.msg}") from None
                buffer, at, size = buffer[at:] + more, 0, 2 * size
                continue
            if not isinstance(item, dict):
                raise UserError("an item must be a JSON object")
            size = READ_CHARS
            yield item
    except RecursionError:
        raise UserError("invalid JSON: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise UserError(f"invalid UTF-8: {error.reason}") from None
