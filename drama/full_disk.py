"""A disk that is full while a run writes: noted, not raised, where other ranks wait."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# of torch.save and safetensors, which have words only
_WORDS = re.compile(
    r"PytorchStreamWriter|inline_container|file write|No space left|Disk quota|File too large"
)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, a quota or a limit on files is full."""
    if isinstance(error, OSError):
        return error.errno in _ERRNOS
    return bool(_WORDS.search(str(error)))


class FullDisk:
    """What one attempt to write met; any other error passes through."""

    def __init__(self) -> None:
        self.found = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Leave the block where the disk is full."""
        try:
            yield
        except Exception as error:
            if not is_full(error):
                raise
            self.found = True

    def noting(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """`write`, which returns without a word where the disk is full."""

        def attempt(*arguments: Any, **options: Any) -> None:
            with self.noted():
                write(*arguments, **options)

        return attempt

    def check_room(self, folder: Path, num_bytes: int) -> None:
        """Count a disk as full that has not so many bytes left."""
        usage = shutil.disk_usage(folder)
        self.found |= usage.total > 0 and usage.free < num_bytes  # some mounts say 0 of 0

    def anywhere(self, engine: Any) -> bool:
        """Whether any rank has met it; a collective."""
        if dist.is_initialized():
            found = torch.tensor(float(self.found), device=engine.device)
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
            self.found = bool(found.item())
        return self.found
