"""The job that all kinds of augmentation share: results in order become a file of records.

    with Job(out, "crops", about) as job:
        if job.report is None:                      # else it was done before
            steps = ...                             # from document number job.start on
            job.run(steps, total)

A step is what came of some consecutive documents. Kinds whose answers arrive out of order put them
in order before they yield a step; a step's results must depend on its documents and on `about`
alone. Every few seconds the job brings its file to the disk and notes its position in
`.OUT.partial`; started again with the same arguments it goes on there, to the same bytes. OUT
appears whole; OUT.report.json beside it says what it holds, and OUT.report.html shows it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from drama.augment.chat import Usage
from drama.augment.page import write_page
from drama.augment.reports import report_paths
from drama.augment.tally import Tally
from drama.console import console, progress
from drama.data.duplicates import FINGERPRINT, count_duplicates, fingerprint, place
from drama.data.lines import parse_json
from drama.data.records import Record
from drama.data.shards import check_file, packed
from drama.data.writer import cut_back
from drama.errors import UserError
from drama.files import locked, replacing

FORMAT = 2  # of the journal and of what a step becomes
JOURNAL_EVERY_S = 5.0
SAY_EVERY_S = 60.0  # where no bar is drawn, as in a log
EXAMPLES, EXAMPLE_CHARS = 10, 300
SHOWN_CHARS = 60  # of a value that differs
RECORDS, QUERIES, JOURNAL, LOCK = "records.jsonl", "queries.bin", "journal.json", ".lock"


@dataclass(frozen=True, slots=True)
class Kept:
    """A record to be written.

    own_rank: where the teacher ranks the document that the query was made from, 0 for deeper than
        it looked; None where there is none. left_out: documents that did not become negatives.
    labels: what else is counted of it, by name; the values of a name are a small fixed set, for the
        counters are held in memory and in the journal.
    """

    record: Record
    own_rank: int | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document of which nothing came. reason: the same words for all faults of a kind."""

    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """What came of the documents before number `end` and after the last step's, in order.

    counts: what was asked of a language model for them, and what else its kind counts.
    """

    end: int
    results: Sequence[Kept | Dropped]
    counts: Mapping[str, int] = field(default_factory=dict)


class Job:
    """One file of records that is being written; see the top of the file.

    Args:
        out: FILE.jsonl, or .jsonl.gz, .jsonl.xz, .jsonl.zst.
        kind: what is being made, for the progress bar and the report.
        about: whatever the bytes depend on, as plain values by name.

    report: of a job that was done before with the same arguments, else None until `run` ends.
    start: number of the first document that is not done yet.

    Raises:
        UserError: `out` is of other arguments, half-written with others, being written by another
            job, or no such file name.
    """

    def __init__(self, out: str | Path, kind: str, about: Mapping[str, Any]) -> None:
        self.out, self.kind = Path(out), kind
        self.report_path, self.page_path = report_paths(self.out)
        check_file(self.out)
        # as it comes back from a file, so that both can be compared
        self.about = json.loads(json.dumps({"kind": kind, "format": FORMAT, **about}))
        self.folder = self.out.with_name(f".{self.out.name}.partial")
        self.report: dict[str, Any] | None = None
        self.start = 0
        self.tally = Tally()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        journal = _read(self.folder / JOURNAL)
        if self.out.exists():
            report = _read(self.report_path)
            if report.get("about") == self.about:
                console.print(
                    f"{self.out} is there already", markup=False, highlight=False, soft_wrap=True
                )
                self.report = report
                if not self.page_path.exists():  # of an output that is older than the page
                    self._draw(report)
                shutil.rmtree(self.folder, ignore_errors=True)  # of a kill at the very end
                return self
            differences = _differences(report.get("about", {}), self.about)
            raise UserError(
                f"{self.out} exists, made otherwise ({differences}); give another --out or remove "
                "it"
            )
        if journal and journal.get("about") != self.about:
            raise UserError(
                f"{self.out} is half-written with other arguments "
                f"({_differences(journal.get('about', {}), self.about)}); give those, another "
                f"--out, or remove {self.folder}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open.enter_context(locked(self.folder / LOCK))
        if not self._resumed(journal):
            for name in (RECORDS, QUERIES):
                (self.folder / name).write_bytes(b"")
        elif self.start:
            console.print(
                f"{self.out}: going on after {self.start:,}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        self._records = self._open.enter_context((self.folder / RECORDS).open("ab"))
        self._queries = self._open.enter_context((self.folder / QUERIES).open("ab"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self.report is None and not (self.folder / JOURNAL).exists():
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing to go on from
        self._open.close()

    def run(
        self, steps: Iterable[Step], total: int | None, usage: Usage | None = None
    ) -> dict[str, Any]:
        """Write the results of all steps; put file and report in their places; return the report.

        total: the number at which the last step ends, for the progress bar.
        usage: of the language model in this run, to be shown and reported.

        Raises:
            UserError: not one record was kept; or from the steps, once the position was noted.
        """
        first, began = self.start, time.monotonic()
        noted = said = began

        def line() -> str:
            rate = (self.start - first) / max(time.monotonic() - began, 1e-9)
            text = f"{rate:,.3g}/s  {self.tally.line()}"
            return f"{text}\n{usage.line()}" if usage else text

        with progress() as bar:
            task = bar.add_task(self.kind, total=total, completed=first, note=_Live(line))
            try:
                for step in steps:
                    for result in step.results:
                        self._take(result)
                    self.tally.counts["llm"].update(step.counts)
                    self.start = step.end
                    if not console.is_terminal and time.monotonic() - said > SAY_EVERY_S:
                        told = f"{self.start:,} of {total:,}" if total else f"{self.start:,}"
                        console.print(f"{self.kind}: {told}, {line()}", markup=False)
                        said = time.monotonic()
                    if time.monotonic() - noted > JOURNAL_EVERY_S:
                        self._note()
                        noted = time.monotonic()
                    bar.update(task, completed=self.start)
            except UserError:  # a budget that is spent, a server that is gone: work to go on from
                if self.start > first:
                    self._note()
                raise
            bar.update(task, completed=self.start, total=self.start)
        if not self.tally.records:
            reasons = ", ".join(f"{r} {n:,}" for r, n in self.tally.dropped.most_common())
            raise UserError(f"{self.out}: no records to write ({reasons or 'nothing was read'})")
        self._note()
        self.report = self._finished(usage)
        return self.report

    def _take(self, result: Kept | Dropped) -> None:
        if isinstance(result, Dropped):
            self.tally.dropped[result.reason] += 1
            return
        value, at = result.record.to_json(), self._records.tell()
        self._records.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        # the place of a record is where its line begins, in two halves
        self._queries.write(place(fingerprint(result.record), at >> 32, at & 0xFFFFFFFF))
        self.tally.add(result.record, result.own_rank, result.left_out, result.labels)

    def _note(self) -> None:
        for file in (self._records, self._queries):
            file.flush()
            os.fsync(file.fileno())
        state = {
            "about": self.about,
            "start": self.start,
            "records_bytes": self._records.tell(),
            "queries_bytes": self._queries.tell(),
            "tally": self.tally.to_json(),
        }
        with replacing(self.folder / JOURNAL) as temporary:
            temporary.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")

    def _resumed(self, journal: dict[str, Any]) -> bool:
        """Take up the journal's position, if the files hold what it says."""
        try:
            cut_back(self.folder / RECORDS, journal["records_bytes"])
            cut_back(self.folder / QUERIES, journal["queries_bytes"])
            self.tally, self.start = Tally.from_json(journal["tally"]), journal["start"]
        except (OSError, KeyError, TypeError):
            return False
        return True

    def _finished(self, usage: Usage | None) -> dict[str, Any]:
        """Report and page come first: where OUT is, it is whole and has both."""
        with (self.folder / RECORDS).open("rb") as lines:

            def record_at(shard: int, row: int) -> dict[str, Any]:
                lines.seek((shard << 32) + row)
                value: dict[str, Any] = parse_json(lines.readline())
                return value

            twice = count_duplicates(
                self.folder / QUERIES, lambda shard, row: str(record_at(shard, row)["query"])
            )
            report = {
                "kind": self.kind,
                **self.tally.summary(),
                "read": self.start,
                "duplicate_queries": {
                    "exact": twice.exact,
                    "near": twice.near,
                    "examples": twice.examples,
                },
                **({"llm_this_run": asdict(usage)} if usage else {}),
                "about": self.about,
                "examples": [_brief(record_at(*at)) for at in _sample(self.folder / QUERIES)],
            }
        with replacing(self.report_path) as temporary:
            text = json.dumps(report, indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        self._draw(report)
        self._take_place()
        shutil.rmtree(self.folder)
        return report

    def _draw(self, report: Mapping[str, Any]) -> None:
        write_page([(self.out.name, report)], self.page_path, self.out.name)

    def _take_place(self) -> None:
        whole = self.folder / RECORDS
        if self.out.suffix != ".jsonl":
            with (
                whole.open("rb") as source,
                replacing(self.folder / "packed") as temporary,
                packed(temporary, self.out.suffix) as target,
            ):
                shutil.copyfileobj(source, target, 2**20)
            whole = self.folder / "packed"
        os.replace(whole, self.out)


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a job has come: whether it is done, records kept, and what was asked of a language
    model for them (`calls`, `prompt tokens`, `completion tokens`)."""

    is_done: bool
    records: int
    llm: Mapping[str, int]

    @classmethod
    def of(cls, out: Path) -> Standing:
        """What the files beside an output say, as they are."""
        if out.exists():
            told = _read(report_paths(out)[0])
            return cls(True, told.get("records", 0), told.get("llm", {}))
        tally = _read(out.with_name(f".{out.name}.partial") / JOURNAL).get("tally", {})
        return cls(False, tally.get("records", 0), tally.get("counts", {}).get("llm", {}))


class _Live:
    """A note that is written anew whenever the bar is drawn, for steps may be minutes apart."""

    def __init__(self, line: Callable[[], str]) -> None:
        self._line = line

    def __str__(self) -> str:
        return self._line()


def _sample(path: Path) -> list[tuple[int, int]]:
    """Places of a few records, at random and always the same, in order."""
    entries = np.memmap(path, FINGERPRINT, "r")
    numbers = random.Random(0).sample(range(len(entries)), min(EXAMPLES, len(entries)))
    return [(int(entries[n]["shard"]), int(entries[n]["row"])) for n in sorted(numbers)]


def _brief(record: dict[str, Any]) -> dict[str, Any]:
    """A record for people: the first document of each kind, and not all of a long text."""
    brief = {"query": record["query"]}
    for key in ("positives", "negatives"):
        for document in record[key][:1]:
            text = " ".join(f"{document.get('title', '')} {document['text']}".split())
            short = text if len(text) <= EXAMPLE_CHARS else text[:EXAMPLE_CHARS] + " …"
            brief[key.removesuffix("s")] = short
    return brief


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """ "seed 1, not 2" for all names whose values differ."""
    if not before:
        return "it has no report of this program"
    parts = []
    for name in {**before, **now}:
        values = [str(about.get(name)) for about in (before, now)]
        if values[0] != values[1]:
            shown = max(map(len, values)) <= SHOWN_CHARS  # a hash says nothing to people
            parts.append(f"{name} {values[0]}, not {values[1]}" if shown else f"another {name}")
    return "; ".join(parts)
