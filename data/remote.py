"""Shards that lie elsewhere: byte ranges through fsspec, kept in a bounded folder on this disk.

A file is fetched in pieces of 1 MiB, about a block of the data order, so that the first batch does
not wait for whole shards. Pieces are files, shared by all processes of the machine: written under
a temporary name and renamed, removed oldest first when the folder grows beyond its bound.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from drama.errors import UserError

T = TypeVar("T")
PIECE = 2**20
TRIES = 6
FIRST_PAUSE_S = 0.25  # doubles with every try
READ_TIMEOUT_S = 20.0
THREADS = 8
OPEN_PIECES = 256  # descriptors a process
UNFINISHED_S = 3600.0  # an older file under a temporary name is one that a kill has left
FINAL = (FileNotFoundError, PermissionError, ImportError, NotImplementedError)  # not tried again


def default_folder() -> Path:
    """Where pieces go if nothing else is said."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "drama" / "shards"


class PieceCache:
    """Pieces of remote files on this disk, at most about `max_bytes` of them.

    May be shared by threads; after a fork each process opens its own connections.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int = 16 * 2**30) -> None:
        self.folder = Path(folder) if folder else default_folder()
        self.max_bytes = max_bytes
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._flying: dict[Path, Future[None]] = {}
        self._opened: OrderedDict[Path, _Piece] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._waiter: ThreadPoolExecutor | None = None
        self._waiting: Future[None] | None = None
        self._written = self.max_bytes  # so that the first piece makes it look
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def whole(self, address: str) -> bytes:
        """A small file, fetched anew.

        Raises:
            UserError: the address does not answer.
        """
        return persistently(address, lambda: _file_system(address)[0].cat_file(_path(address)))

    def read(self, address: str, key: str, size: int, piece: int, start: int, end: int) -> bytes:
        """Bytes [start, end) of piece number `piece` of a file of `size` bytes.

        `key` names the file's contents.

        Raises:
            UserError: the address does not answer, or not with what it should.
        """
        path = self._piece_path(key, piece)
        for _ in range(TRIES):
            kept = self._kept(path)
            if kept is None:
                self._fetch(address, path, piece * PIECE, min(size, (piece + 1) * PIECE)).result()
                kept = self._kept(path)
            if kept is not None:  # else another process has removed it meanwhile
                return os.pread(kept.descriptor, end - start, start)
        raise UserError(
            f"{self.folder}: pieces vanish as soon as they are written; raise data.cache_gb"
        )

    def prefetch(self, address: str, key: str, size: int, piece: int) -> None:
        """Start to fetch a piece that is not here; a fault shows when it is read."""
        path = self._piece_path(key, piece)
        if not path.exists():
            self._fetch(address, path, piece * PIECE, min(size, (piece + 1) * PIECE))

    def background(self, work: Callable[[], None]) -> None:
        """Run something that may wait for pieces, one at a time; its faults are dropped. What has
        not begun when the next one comes is too late to be of use."""
        with self._own_lock():
            self._waiter = self._waiter or ThreadPoolExecutor(1, "drama-prefetch")
            if self._waiting is not None:
                self._waiting.cancel()
            self._waiting = self._waiter.submit(work)

    def forget(self, key: str, piece: int) -> None:
        """Remove a piece; it will be fetched again."""
        path = self._piece_path(key, piece)
        with self._own_lock():
            self._opened.pop(path, None)
            path.unlink(missing_ok=True)

    def _piece_path(self, key: str, piece: int) -> Path:
        return self.folder / key[:2] / key[2:24] / f"{piece:08d}"

    def _own_lock(self) -> threading.Lock:
        if self._pid != os.getpid():  # forked: nobody here holds the parent's lock or threads
            self._reset()
        return self._lock

    def _kept(self, path: Path) -> _Piece | None:
        with self._own_lock():
            kept = self._opened.get(path)
            if kept is None:
                try:
                    kept = _Piece(path)
                except (FileNotFoundError, NotADirectoryError):
                    return None
                except OSError as error:
                    raise UserError(f"cannot read {path}: {error.strerror}") from None
                self._opened[path] = kept
                while len(self._opened) > OPEN_PIECES:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(path)
            return kept

    def _fetch(self, address: str, path: Path, start: int, end: int) -> Future[None]:
        with self._own_lock():
            flying = self._flying.get(path)
            if flying is None:
                self._pool = self._pool or ThreadPoolExecutor(THREADS, "drama-fetch")
                flying = self._pool.submit(self._fetch_now, address, path, start, end)
                self._flying[path] = flying
                flying.add_done_callback(lambda _: self._flying.pop(path, None))
            return flying

    def _fetch_now(self, address: str, path: Path, start: int, end: int) -> None:
        if path.exists():  # it came since the caller looked
            return
        content = persistently(address, lambda: _range(address, start, end))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(content)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep {path}: {error.strerror}") from None
        self._written += len(content)
        if self._written >= self.max_bytes // 128:
            self._written = 0
            self._remove_oldest()

    def _remove_oldest(self) -> None:
        """Make room for as much as may come until this is called again."""
        found = []
        for path in self.folder.glob("*/*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.name[0] != "." or time.time() - status.st_mtime > UNFINISHED_S:
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes - self.max_bytes // 8:
                break
            path.unlink(missing_ok=True)
            total -= size


class _Piece:
    """An open piece; closed when the last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)
        os.utime(self.descriptor)  # its age is the time since it was last opened

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class RemoteFile:
    """A file elsewhere, read by place through a cache.

    key: a hash of its contents, so that a file that was replaced is not taken for the old one.
    """

    def __init__(self, address: str, size: int, key: str, cache: PieceCache) -> None:
        self.address, self.size, self.cache = address, size, cache
        self.key = hashlib.sha256(f"{address} {key}".encode()).hexdigest()

    def pread(self, start: int, end: int) -> bytes:
        """Bytes [start, end); fewer where the file ends."""
        end = min(end, self.size)
        if end <= start:
            return b""
        parts = []
        for piece in range(start // PIECE, (end - 1) // PIECE + 1):
            first = piece * PIECE
            part = max(start - first, 0), min(end - first, PIECE)
            parts.append(self.cache.read(self.address, self.key, self.size, piece, *part))
        return b"".join(parts)

    def prefetch(self, start: int, end: int) -> None:
        """Start to fetch the pieces of [start, end)."""
        for piece in range(start // PIECE, (min(end, self.size) - 1) // PIECE + 1):
            self.cache.prefetch(self.address, self.key, self.size, piece)

    def forget(self, start: int, end: int) -> bool:
        """Drop the pieces of [start, end); reading fetches them again."""
        for piece in range(start // PIECE, (min(end, self.size) - 1) // PIECE + 1):
            self.cache.forget(self.key, piece)
        return True


def _path(address: str) -> str:
    return str(_file_system(address)[1])


def _file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address (it keeps one a thread), and the path in it."""
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    protocol = address.split("://")[0]
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=READ_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
        # a range of a packed answer would not be a range of the file
        headers = {"Accept-Encoding": "identity"}
        options = {"client_kwargs": {"timeout": timeout, "headers": headers}}
    elif protocol in ("s3", "s3a"):
        options = {
            "config_kwargs": {
                "read_timeout": READ_TIMEOUT_S,
                "connect_timeout": READ_TIMEOUT_S,
                "retries": {"max_attempts": 1},  # trying again is done here, for every protocol
            }
        }
    file_system, path = url_to_fs(address, **options)
    return file_system, path


def _range(address: str, start: int, end: int) -> bytes:
    file_system, path = _file_system(address)
    content: bytes = file_system.cat_file(path, start=start, end=end)
    if len(content) > end - start:  # a server without ranges sends the whole file
        content = content[start:end]
    if len(content) != end - start:
        raise EOFError(f"{len(content)} of {end - start} bytes came")
    return content


def persistently(address: str, fetch: Callable[[], T], tries: int | None = None) -> T:
    """Call again after a pause while the network or the server is at fault.

    Raises:
        UserError: the last fault.
    """
    pause, last, tries = FIRST_PAUSE_S, "", tries or TRIES
    for number in range(tries):
        try:
            return fetch()
        except FINAL as error:
            raise UserError(f"{address} cannot be read: {_said(error)}") from None
        except (Exception, asyncio.CancelledError) as error:  # every library has its own
            last = _said(error)
        if number < tries - 1:
            time.sleep(pause)
        pause *= 2
    raise UserError(f"{address} cannot be read, {tries} tries: {last}")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:200]}".strip()
