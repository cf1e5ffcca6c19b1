"""Tar members as WebDataset writes them, whose bytes depend on name and contents only."""

from __future__ import annotations

import tarfile

from drama.errors import UserError

TAR_BLOCK = 512
TAR_RECORD = 10240  # a tar file's length is a multiple of this
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)


def _template() -> bytes:
    info = tarfile.TarInfo("x")
    info.mode = 0o444
    head = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    head[:1] = b"\0"
    head[_SIZE], head[_CHECKSUM] = bytes(12), b" " * 8  # the checksum counts as spaces
    return bytes(head)


_TEMPLATE = _template()


def member_bytes(payload_bytes: int) -> int:
    """Bytes of a tar member: its header and its contents, padded to whole tar blocks."""
    return TAR_BLOCK + -(-payload_bytes // TAR_BLOCK) * TAR_BLOCK


def make_member(name: str, payload: bytes) -> bytes:
    """A read-only regular file of nobody, without a date (USTAR; tarfile takes 20 us for it)."""
    head = bytearray(_TEMPLATE)
    head[: len(name)] = name.encode("ascii")
    head[_SIZE] = b"%011o\0" % len(payload)
    head[_CHECKSUM] = b"%06o\0 " % sum(head)
    return b"".join((head, payload, bytes(-len(payload) % TAR_BLOCK)))


def end_of_tar(size: int) -> bytes:
    """What closes a tar of this many bytes."""
    end = 2 * TAR_BLOCK
    return bytes(end + -(size + end) % TAR_RECORD)


def payload_of(member: memoryview) -> memoryview:
    """The contents of a member whose bytes are those that `make_member` gave."""
    return member[TAR_BLOCK : TAR_BLOCK + int(bytes(member[124:135]), 8)]


def check_member(member: bytes, suffix: str) -> bytes:
    """The contents of a member, checked without trust in who wrote it.

    Raises:
        UserError: not a plain file `KEY.suffix`, or of another length than its header says.
    """
    try:
        info = tarfile.TarInfo.frombuf(member[:TAR_BLOCK], "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise UserError(f"broken tar header: {error}") from None
    if not info.isreg() or not info.name.endswith(suffix) or "/" in info.name:
        raise UserError(f"the tar member '{info.name}' is no plain {suffix} file")
    if member_bytes(info.size) != len(member):
        raise UserError(
            f"the tar member has {info.size} bytes, the index leaves {len(member) - TAR_BLOCK}"
        )
    return member[TAR_BLOCK : TAR_BLOCK + info.size]
