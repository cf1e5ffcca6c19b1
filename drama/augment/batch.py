"""Requests and answers as files, for machines where no server runs.

The form is OpenAI's, which `vllm run-batch` reads and writes: one JSON object a line, `custom_id`
is the request's key in the cache.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from drama.augment.cache import Cache
from drama.augment.chat import PATH, REFUSALS, Answer, Refusal, detail
from drama.data.lines import read_raw_lines
from drama.files import replacing

KEY = re.compile(r"[0-9a-f]{64}")
COMMIT_EVERY = 1000  # lines


class BatchFile:
    """Writes the requests of a job, each once. A context manager: the file appears whole at its
    end; not at all after an error or without requests."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.num_requests = 0
        self._stack = ExitStack()
        self._file: Any = None
        # "" is a file of SQLite's own, in memory while it is small: there may be millions of keys
        self._keys = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._keys.execute("CREATE TABLE keys (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._keys.execute("BEGIN")

    def add(self, key: str, body: Mapping[str, Any]) -> None:
        added = self._keys.execute("INSERT OR IGNORE INTO keys VALUES (?)", [bytes.fromhex(key)])
        if not added.rowcount:
            return
        if self._file is None:
            temporary = self._stack.enter_context(replacing(self.path))
            self._file = self._stack.enter_context(temporary.open("w", encoding="ascii"))
        line = {"custom_id": key, "method": "POST", "url": f"/v1{PATH}", "body": body}
        self._file.write(json.dumps(line) + "\n")
        self.num_requests += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._keys.close()
        self._stack.__exit__(kind, error, traceback)


@dataclass
class Results:
    """What a results file held. `bad` counts the lines without an answer by reason, among them the
    refused requests, which are kept as such."""

    answers: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""  # where the first one is, and what is wrong with it


def read_results(path: str | Path, cache: Cache) -> Results:
    """Take the answers of a batch run into the cache. A file that is read twice changes nothing.

    Refused requests are kept too, so that a job without a server comes to its end. A line that is
    bad for another reason is left out: its request goes into the next batch file.

    Raises:
        UserError: the file cannot be read, or the cache not be written.
    """
    results = Results()
    outcomes = _outcomes(path)
    while part := list(islice(outcomes, COMMIT_EVERY)):
        with cache.together():
            for number, outcome in part:
                _take(outcome, cache, results, f"{path}:{number}")
    return results


@dataclass(frozen=True)
class _Outcome:
    """What one line says; `key` is empty where there is nothing to be kept."""

    said: Answer | Refusal
    key: str = ""
    model: str = ""


def _take(outcome: _Outcome, cache: Cache, results: Results, where: str) -> None:
    said = outcome.said
    if isinstance(said, Answer):
        cache.put(outcome.key, said, outcome.model)
        results.answers += 1
        results.prompt_tokens += said.prompt_tokens
        results.completion_tokens += said.completion_tokens
        return
    results.bad[said.reason] += 1
    results.first_bad = results.first_bad or f"{where}: {said.reason}: {said.detail}".rstrip(": ")
    if outcome.key:
        cache.refuse(outcome.key, said, outcome.model)
        results.refused += 1


def _outcomes(path: str | Path) -> Iterator[tuple[int, _Outcome]]:
    for number, line in read_raw_lines(path):
        if line.strip():
            yield number, _outcome(line)


def _outcome(line: bytes) -> _Outcome:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return _Outcome(Refusal("not JSON"))
    if not isinstance(row, dict):
        return _Outcome(Refusal("not a JSON object"))
    key = row.get("custom_id")
    if not isinstance(key, str) or not KEY.fullmatch(key):
        return _Outcome(Refusal("custom_id is not one of ours", detail(key)))
    response = row.get("response")
    if not isinstance(response, dict):
        return _Outcome(Refusal("no response", detail(row.get("error"))))
    status, body, error = response.get("status_code"), response.get("body"), row.get("error")
    if status != 200:
        refusal = Refusal(f"HTTP {status}", detail(error or body))
        # a mere string is vLLM's word for any fault of its own, with the same status
        theirs = status in REFUSALS and not isinstance(error, str)
        return _Outcome(refusal, key if theirs else "")
    try:
        answer = Answer.parse(body)
    except ValueError as fault:
        return _Outcome(Refusal("no answer in it", str(fault)))
    return _Outcome(answer, key, str((body or {}).get("model") or ""))
