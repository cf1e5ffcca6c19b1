"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from drama.errors import UserError

HASHING_THREADS = 8  # files at a time: a disk gives more than one thread can hash


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it over `path`.

    On any error the temporary file is removed and what stood at `path` stays. So is what processes
    of this machine that were killed have left beside it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # with the machine's name: on a shared disk another one may be writing the same file right now
    machine = re.sub(r"\W", "_", os.uname().nodename)
    prefix = f".{target.name}.partial-{machine}-"
    for partial in target.parent.glob(f"{glob.escape(prefix)}*"):
        if _is_left(partial):
            partial.unlink(missing_ok=True)
    temporary = target.with_name(f"{prefix}{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`.

    The old folder is moved aside before and removed after the rename. An error leaves the old one
    in its place; a process that is killed between the two renames leaves it aside, and `recovered`,
    which the next call begins with, puts it back.

    Raises:
        UserError: a place that takes no folders, as /proc.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    recovered(target)
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir()
    except FileNotFoundError:
        raise UserError(f"{target}: no folder can be made in {target.parent}") from None
    try:
        yield temporary
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recovered(path: str | Path) -> None:
    """Clear up after processes of this machine that were killed in `replacing_folder`: put the old
    folder back where there is neither, and remove what is left beside it."""
    target = Path(path)
    for old in target.parent.glob(f".{target.name}.old-*"):
        if _is_left(old):
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(old, target)
    for partial in target.parent.glob(f".{target.name}.partial-*"):
        if _is_left(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _is_left(path: Path) -> bool:
    """Whether the process that a name ends in is over, or is this one, which begins anew."""
    number = path.name.rpartition("-")[2]
    if not number.isdigit() or int(number) == os.getpid():
        return number.isdigit()
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's; no process number
        return False
    return False


@contextmanager
def locked(path: str | Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, which is made where there is none, against other processes.

    Where the file system knows no locks, as Lustre mounted without them, nothing is held.

    Args:
        wait_s: how long to wait for a process that holds it.

    Raises:
        UserError: another process holds it.
    """
    path = Path(path)
    end = time.monotonic() + wait_s
    with path.open("a") as file:
        while not _locks(file):
            if time.monotonic() >= end:
                raise UserError(f"{path.parent}: another job is writing there; wait for its end")
            time.sleep(0.2)
        yield


def _locks(file: IO[str]) -> bool:
    try:
        # not flock, whose lock forked workers hold on to when the job was killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True


def stamp(path: str | Path) -> list[Any]:
    """Changes when a file or folder on this disk does; an address is taken for unchanged."""
    place = Path(path)
    if not place.exists():
        return []
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def sha256_of(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file's bytes, in hexadecimal."""

    def one(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(one, paths))
