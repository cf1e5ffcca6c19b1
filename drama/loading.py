"""Batches read ahead by worker processes, and a list of the records that could not be read."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from drama.data.reading import BadRecord
from drama.data.stream import ShardSet
from drama.errors import UserError
from drama.files import replacing
from drama.full_disk import FullDisk
from drama.metrics import step_of_line
from drama.stopping import SIGNALS

T = TypeVar("T")


def load_ahead(batches: Dataset[T], steps: range, workers: int) -> Iterator[T]:
    """The batches of these steps, in order.

    Raises:
        UserError: from reading, when its batch is due.
    """
    loader: Any = DataLoader(
        _ErrorsAsValues(batches),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_start_worker,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _ErrorsAsValues(Dataset[T | UserError], Generic[T]):
    """Hands a bad record's error over as it is; DataLoader would wrap it in a traceback."""

    def __init__(self, batches: Dataset[T]) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> T | UserError:
        try:
            return self.batches[step]
        except UserError as error:
            return error


def _start_worker(worker: int) -> None:
    # the tokenizer's thread pool does not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    for number in SIGNALS:  # meant for the run, which still needs the batches of its last step
        signal.signal(number, signal.SIG_IGN)


def check_lanes_feed(lanes: int, world_size: int) -> None:
    """Refuse more ranks than lanes.

    Raises:
        UserError: with both numbers.
    """
    if world_size > lanes:
        raise UserError(
            f"data.lanes {lanes} feeds at most {lanes} ranks, here are {world_size}; raise "
            "data.lanes"
        )


def check_held_out(folders: Sequence[Path | str], trained: ShardSet) -> None:
    """Refuse held-out shards that are trained on, by content: a copy under another name is too.

    Raises:
        UserError: with the first such folder.
    """
    known = {shard.sha256 for shard in trained.shards}
    for folder in folders:
        if known & {shard.sha256 for shard in ShardSet([folder], trained.cache).shards}:
            raise UserError(f"eval.shards: {folder} is trained on; hold other shards out")


class BadRecords:
    """RUN/bad.jsonl: the records that batches lack; each rank writes whole lines."""

    def __init__(self, run: Path) -> None:
        self.path = run / "bad.jsonl"

    def forget(self, first_step: int) -> None:
        """Drop the lines of steps that are taken once more."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
            kept = [line + "\n" for line in lines if step_of_line(line) < first_step]
            with replacing(self.path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")

    def report(self, step: int, records: Sequence[BadRecord]) -> None:
        """Append what the batch of a step lacks; where the disk is full it is not listed."""
        for bad in records:
            line = {"step": step, "record": bad.index, "reason": bad.reason, "error": bad.message}
            text = json.dumps(line, ensure_ascii=False) + "\n"
            with FullDisk().noted(), self.path.open("ab") as file:
                file.write(text.encode(errors="backslashreplace"))
