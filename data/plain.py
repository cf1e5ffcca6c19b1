"""Plain text files: documents separated by blank lines, packed (.gz, .xz, .zst) or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from drama.data.lines import read_raw_lines
from drama.errors import UserError

LONGEST_DOCUMENT = 2**20  # bytes of one without blank lines; the next line begins another
_NAME = re.compile(r"\.txt(\.gz|\.xz|\.zst)?$")


def is_plain_text(path: str | Path) -> bool:
    """Whether a file's name says so: its content cannot, a text may begin with a brace."""
    return bool(_NAME.search(str(path)))


def read_plain(path: str | Path, raw: IO[bytes] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (number of its first line from 1, the document's lines), not yet decoded.

    Raises:
        UserError: unreadable file or broken compression.
    """
    lines: list[bytes] = []
    first = size = 0
    for number, line in read_raw_lines(path, raw):
        blank = _is_blank(line)
        if not blank:
            first = first if lines else number
            lines.append(line.rstrip(b"\r\n"))
            size += len(line)
        if lines and (blank or size > LONGEST_DOCUMENT):
            yield first, b"\n".join(lines)
            lines, size = [], 0
    if lines:
        yield first, b"\n".join(lines)


def decode_plain(document: bytes) -> str:
    """The document's text.

    Raises:
        UserError: invalid UTF-8.
    """
    try:
        return document.decode().strip()
    except UnicodeDecodeError as error:
        line = document.count(b"\n", 0, error.start) + 1
        raise UserError(f"invalid UTF-8 in line {line} of the document", "invalid UTF-8") from None


def _is_blank(line: bytes) -> bool:
    # not all white space is ASCII: the ideographic space, for one
    return not line.strip() or (not line.isascii() and not line.decode(errors="replace").strip())
