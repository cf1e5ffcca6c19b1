"""Answers on disk: a job that was stopped goes on without paying twice.

One SQLite file, keyed by what an answer depends on (`Request.key`). Every answer is committed as it
arrives. The write-ahead log lets several jobs of one machine share a file; it needs a disk of that
machine, for its shared memory does not work over a network file system.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from drama.augment.chat import Answer, Refusal
from drama.errors import UserError

APPLICATION_ID = 0x6472616D  # "dram", in the file's header
SCHEMA_VERSION = 1
BUSY_S = 60.0
TABLES = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, estimated INTEGER NOT NULL,
    model TEXT NOT NULL, date TEXT NOT NULL
);
CREATE TABLE refusals (
    key TEXT PRIMARY KEY, reason TEXT NOT NULL, detail TEXT NOT NULL,
    model TEXT NOT NULL, date TEXT NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class Totals:
    """How many answers a cache holds, and the tokens that they took."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Cache:
    """The file; it is made if it is not there. One thread at a time.

    Raises (every method):
        UserError: damaged, of another program or version, held by another job, no room on the disk.
            The file is left as it is.
    """

    def __init__(self, path: str | Path, *, busy_s: float = BUSY_S) -> None:
        self.path = Path(path)
        self.busy_s = busy_s
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._said():
            self._file = sqlite3.connect(
                self.path, busy_s, isolation_level=None, check_same_thread=False
            )
        try:
            with self._said():
                self._prepare()
        except UserError:
            self._file.close()
            raise

    def get(self, key: str) -> Answer | None:
        columns = "text, prompt_tokens, completion_tokens, finish_reason, estimated"
        row = self._row(f"SELECT {columns} FROM answers WHERE key = ?", key)
        if row is None:
            return None
        text, sent, written, reason, estimated = row
        return Answer(text, sent, written, reason, cached=True, estimated=bool(estimated))

    def put(self, key: str, answer: Answer, model: str) -> None:
        """Keep an answer. The first one stays, so that all readers see the same."""
        counts = (answer.prompt_tokens, answer.completion_tokens, int(answer.estimated))
        row = (key, answer.text, answer.finish_reason, *counts, model, _now())
        with self._said():
            self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def refusal(self, key: str) -> Refusal | None:
        row = self._row("SELECT reason, detail FROM refusals WHERE key = ?", key)
        return Refusal(*row) if row else None

    def refuse(self, key: str, refusal: Refusal, model: str) -> None:
        """Keep that a batch run refused a request; a job with a server asks again."""
        row = (key, refusal.reason, refusal.detail, model, _now())
        with self._said():
            self._file.execute("INSERT OR REPLACE INTO refusals VALUES (?, ?, ?, ?, ?)", row)

    def __len__(self) -> int:
        row = self._row("SELECT count(*) FROM answers")
        assert row
        return int(row[0])

    def totals(self) -> Totals:
        """Of all answers; the file is read through for it."""
        sums = "total(prompt_tokens), total(completion_tokens)"
        row = self._row(f"SELECT count(*), {sums} FROM answers")
        assert row
        return Totals(*(int(value) for value in row))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Commit what is written inside at once, or none of it."""
        with self._said():
            self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
            with self._said():
                self._file.execute("COMMIT")
        finally:
            if self._file.in_transaction:
                self._file.rollback()

    def close(self) -> None:
        with self._said():
            self._file.close()

    def _row(self, query: str, *values: str) -> tuple[Any, ...] | None:
        with self._said():
            row: tuple[Any, ...] | None = self._file.execute(query, values).fetchone()
            return row

    def _prepare(self) -> None:
        # a kill loses nothing; a power cut at most the last moments, and never the file
        self._file.execute("PRAGMA synchronous = NORMAL")
        self._log_ahead()
        self._file.execute("BEGIN IMMEDIATE")  # another job may be making the tables
        try:
            ids = [self._number("application_id"), self._number("user_version")]
            empty = self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            if ids == [0, 0] and empty:
                for statement in TABLES.split(";"):
                    self._file.execute(statement)
                self._file.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._file.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif ids[0] != APPLICATION_ID:
                raise UserError(
                    f"{self.path}: a database of another program; give another path for the cache"
                )
            elif ids[1] != SCHEMA_VERSION:
                raise UserError(
                    f"{self.path}: the cache has schema version {ids[1]}; this program reads "
                    f"version {SCHEMA_VERSION}; give another path, or use the program that wrote it"
                )
            self._file.execute("COMMIT")
        finally:
            if self._file.in_transaction:
                self._file.rollback()

    def _log_ahead(self) -> None:
        """The one change for which SQLite does not wait for another job that makes it too."""
        last = time.monotonic() + self.busy_s
        while True:
            try:
                self._file.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > last:
                    raise
                time.sleep(0.01)

    def _number(self, name: str) -> int:
        return int(self._file.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: {self._fault(error)}") from None

    def _fault(self, error: sqlite3.Error) -> str:
        code = _code(error)
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or "UTF-8" in str(error):
            return (
                f"the cache is damaged ({error}); it was left as it is: save what can be read with "
                "sqlite3's .recover, or move it away and begin anew"
            )
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return f"another job has held the cache for {self.busy_s:g} s; wait for its end"
        if code == sqlite3.SQLITE_FULL:
            return "no room on the disk for the cache; make some and start the same command again"
        return f"the cache cannot be used ({error}); see to its rights, or give another path"


def _code(error: sqlite3.Error) -> int:
    """The primary result code; the low byte of an extended one."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
