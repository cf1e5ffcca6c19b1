"""What a user did wrong, said in one line.

Every check of user input raises `UserError`; the command line and the launchers turn it into that
line on stderr and exit code 2. A fault of ours is any other exception and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# faults of a disk or of its rights that no check can foresee
_THE_USERS = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and how to mend it.

    reason: a few words, the same for all faults of a kind, for those who count them.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or "wrong key or type"


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the choice closest to `word`, or ""."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


@contextmanager
def exit_on_user_error(program: str) -> Iterator[None]:
    """Print a `UserError`, or a fault of the disk, as one line on stderr and exit with code 2.

    Ranks other than the first hold their line back for a moment: the launcher ends them when the
    first one exits, so a fault that all of them see is said once.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _THE_USERS:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
