"""Sources into shards: in parallel, in flat memory, and so that a stopped job goes on.

The main process reads rows and writes tars; workers parse, check, tokenise and fingerprint. Results
are taken in the order of the rows, so the bytes do not depend on the number of workers. From time
to time the job brings everything to the disk and notes where it stands in `.OUT.partial`; started
again with the same arguments, it goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from drama.console import console, progress
from drama.data.contamination import EvaluationSets
from drama.data.duplicates import Duplicates, OwnTexts, count_duplicates, fingerprint, place
from drama.data.manifest import Manifest, TokenSettings
from drama.data.records import Record
from drama.data.sources import Raw, Rows, Source, to_record
from drama.data.tokens import TokenRecord
from drama.data.writer import (
    EncodedRecord,
    FolderWriter,
    check_name,
    check_target,
    cut_back,
    write_manifest,
)
from drama.errors import UserError
from drama.files import locked, recovered, replacing, stamp
from drama.tokenizer import TextEncoder, load_tokenizer, tokenizer_sha256

CHUNK_ROWS = 256
CHUNK_BYTES = 4 * 2**20
WAITING = 4  # chunks a worker
JOURNAL, BAD, QUERIES, LOCK = "journal.json", "bad.jsonl", "queries.bin", ".lock"
JOURNAL_EVERY_S = 20.0
FORMAT = 1  # of the journal and of what a chunk becomes


@dataclass(frozen=True)
class ShardingOptions:
    """What the bytes of a folder depend on, besides its sources.

    tokenizer: a model folder; its token ids are stored, texts cut at `max_tokens`.
    skip_bad: leave bad rows out, count them, and list them in bad.jsonl.
    text_column: every row is a text without a query, which stands in this column.
    """

    name: str = "train"
    shard_bytes: int = 256 * 2**20
    tokenizer: str | None = None
    query_prefix: str = "Query: "
    document_prefix: str = ""
    max_tokens: int = 8192
    decontaminate: tuple[str, ...] = ()
    skip_bad: bool = False
    text_column: str | None = None


@dataclass
class Outcome:
    """What came of a job: the manifest, what was left out, and queries that come twice."""

    manifest: Manifest
    duplicates: Duplicates
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Chunk:
    """Consecutive rows of one source. `first` is the number of the first one among all rows."""

    source: int
    layout: str
    first: int
    rows: list[tuple[str, Raw]]


@dataclass(frozen=True)
class _LeftOut:
    """A row that was not written: `in NAME` for contamination, else why it is bad."""

    reason: str
    where: str
    error: str = ""


@dataclass(frozen=True)
class _Written:
    record: EncodedRecord
    query: bytes


def available_cores() -> int:
    """Of this machine those that the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def shard_sources(
    sources: Sequence[Source], out: str | Path, options: ShardingOptions, *, workers: int = 1
) -> Outcome:
    """Write the records of all sources, in their order, as a folder of shards.

    The folder appears whole or not at all; an older folder of shards at `out` is replaced.

    Raises:
        UserError: a bad row (its file and line) unless `skip_bad`, a source that breaks off, no
            records, or `out` is taken.
    """
    out = Path(out).resolve()
    check_target(out)
    check_name(options.name)
    _check_names(sources)
    work = _Work.of(sources, options)
    recovered(out)
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial / LOCK):
        try:
            with closing(_Job(partial, work)) as job:
                with progress() as bar:
                    job.run(bar, workers)
                outcome = job.finish()
        except BaseException:
            if not (partial / JOURNAL).exists():  # nothing to go on from
                shutil.rmtree(partial)
            raise
        _take_place(partial, out)
    return outcome


class _Work:
    """What a worker knows: turns a chunk into what is written."""

    def __init__(
        self, sources: Sequence[Source], options: ShardingOptions, sets: EvaluationSets
    ) -> None:
        self.sources, self.options, self.sets = tuple(sources), options, sets
        self.encoder: TextEncoder | None = None
        self.tokens: TokenSettings | None = None
        if options.tokenizer is not None:
            tokenizer = load_tokenizer(options.tokenizer)
            self.encoder = TextEncoder(tokenizer, options.query_prefix, options.document_prefix)
            self.tokens = TokenSettings(
                tokenizer_sha256(tokenizer),
                options.query_prefix,
                options.document_prefix,
                options.max_tokens,
            )
        self.fingerprint = self._fingerprint()

    @classmethod
    def of(cls, sources: Sequence[Source], options: ShardingOptions) -> _Work:
        return cls(sources, options, EvaluationSets(options.decontaminate))

    def _fingerprint(self) -> str:
        """Changes with whatever the bytes depend on, the sources as they are now."""
        options = asdict(self.options)
        del options["skip_bad"]  # a job that a bad row has stopped may go on and skip it
        parts: list[Any] = [FORMAT, options, self.tokens and asdict(self.tokens)]
        for source in self.sources:
            parts += [asdict(source), stamp(source.path)]
        parts += [stamp(folder) for folder in self.options.decontaminate]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __call__(self, chunk: _Chunk) -> list[_Written | _LeftOut]:
        found: list[_LeftOut | tuple[int, Record]] = []
        for number, (where, row) in enumerate(chunk.rows, chunk.first):
            try:
                source = self.sources[chunk.source]
                record = to_record(chunk.layout, row, source, self.options.text_column)
            except UserError as error:
                if not self.options.skip_bad:
                    raise UserError(f"{where}: {error}", error.reason) from None
                found.append(_LeftOut(error.reason, where, str(error)))
                continue
            name = self.sets.found(record) if self.sets.names else None
            found.append(_LeftOut(f"in {name}", where) if name else (number, record))
        tokens = iter(self._tokens([item[1] for item in found if isinstance(item, tuple)]))
        return [
            item
            if isinstance(item, _LeftOut)
            else _Written(EncodedRecord.of(item[1], item[0], next(tokens)), fingerprint(item[1]))
            for item in found
        ]

    def _tokens(self, records: Sequence[Record]) -> list[TokenRecord | None]:
        if self.encoder is None or not records:
            return [None] * len(records)
        limit = self.options.max_tokens
        queries = iter(self.encoder.queries([r for r in records if not r.is_text], limit)[0])
        texts = [d.full_text for r in records for d in (*r.positives, *r.negatives)]
        documents = iter(self.encoder(texts, "document", limit)[0])
        return [
            TokenRecord.of(
                record,
                [
                    [] if record.is_text else next(queries),
                    *islice(documents, len(record.positives) + len(record.negatives)),
                ],
            )
            for record in records
        ]


class _Job:
    """The main process's side: reads rows in order, writes results in order, keeps the journal."""

    def __init__(self, folder: Path, work: _Work) -> None:
        self.folder, self.work = folder, work
        self.left_out: Counter[str] = Counter()
        self.skipped = 0  # of those left out, the bad rows
        self.source = self.row = self.rows_in_all = 0  # the next row to be read
        self.share_read: float | None = None
        options = work.options
        self.writer = FolderWriter(folder, options.name, options.shard_bytes, work.tokens)
        if self._resumed():
            console.print(f"going on after row {self.rows_in_all:,}")
        else:
            if (folder / JOURNAL).exists():
                console.print(f"{folder} is of another job or other files; starting anew")
            for path in folder.iterdir():
                if path.name != LOCK:
                    path.unlink()
            self.writer = FolderWriter(folder, options.name, options.shard_bytes, work.tokens)
        self.bad = (folder / BAD).open("ab")
        self.queries = (folder / QUERIES).open("ab")
        self._noted = time.monotonic()

    def run(self, bar: Any, workers: int) -> None:
        title = f"shard {self.work.options.name}"
        task = bar.add_task(title, total=1000, note="")
        for chunk, results in self._results(workers):
            for result in results:
                self._take(result)
            last = chunk.first + len(chunk.rows)
            if chunk.source != self.source:
                self.source, self.row = chunk.source, 0
            self.row += len(chunk.rows)
            self.rows_in_all = last
            if time.monotonic() - self._noted > JOURNAL_EVERY_S:
                self._note()
            name = self.work.sources[chunk.source].name
            left_out = f", {self.left_out.total():,} left out" if self.left_out else ""
            note = f"{name}: {self.writer.num_records:,} records{left_out}"
            done = (chunk.source + (self.share_read or 0.0)) / len(self.work.sources)
            bar.update(task, completed=int(1000 * done), note=note)
        bar.update(task, completed=1000)

    def finish(self) -> Outcome:
        """Close the shards, look for queries that come twice, write the manifest.

        The search is long for a large corpus: a job that is killed in it goes on with its end.

        Raises:
            UserError: not one record was written.
        """
        if self.writer.num_records:
            self._note()
        manifest = self.writer.finish(left_out=dict(sorted(self.left_out.items())))
        written = manifest.counts("source")  # a source may have lost all its records
        weights = {s.name: s.weight for s in self.work.sources if s.weight and s.name in written}
        manifest = dataclasses.replace(manifest, weights=weights)
        self.close()
        duplicates = count_duplicates(self.folder / QUERIES, OwnTexts(self.folder, manifest))
        counts = {"exact": duplicates.exact, "near": duplicates.near}
        manifest = dataclasses.replace(manifest, duplicate_queries=counts)
        kept = {LOCK} | ({BAD} if self.left_out else set())
        for shard in manifest.shards:
            kept |= {shard.file, shard.idx_file}
        for path in self.folder.iterdir():  # the journal, and what a kill has left half written
            if path.name not in kept:
                path.unlink()
        write_manifest(self.folder, manifest)
        return Outcome(manifest, duplicates, self.left_out)

    def close(self) -> None:
        """Close the files; what was written stays for another job to go on from."""
        for file in (self.bad, self.queries):
            file.close()
        self.writer.abandon()

    def _take(self, result: _Written | _LeftOut) -> None:
        if isinstance(result, _LeftOut):
            self.left_out[result.reason] += 1
            self.skipped += bool(result.error)
            line = {"where": result.where, "reason": result.reason, "error": result.error}
            text = json.dumps(line, ensure_ascii=False)
            self.bad.write(text.encode(errors="backslashreplace") + b"\n")
        else:
            self.queries.write(place(result.query, *self.writer.add(result.record)))

    def _results(self, workers: int) -> Iterator[tuple[_Chunk, list[_Written | _LeftOut]]]:
        """In the order of the chunks, a bounded number of them on the way."""
        chunks = self._chunks()
        if workers <= 1:
            for chunk in chunks:
                yield chunk, self.work(chunk)
            return
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(
            workers, context, initializer=_start_worker, initargs=(self.work,)
        ) as pool:
            flying: deque[tuple[_Chunk, Future[list[_Written | _LeftOut]]]] = deque()
            try:
                for chunk in chunks:
                    flying.append((chunk, pool.submit(_in_worker, chunk)))
                    if len(flying) >= WAITING * workers:
                        done, future = flying.popleft()
                        yield done, future.result()
                for done, future in flying:
                    yield done, future.result()
            except BrokenProcessPool:
                raise UserError(
                    "a worker was ended from outside, perhaps for want of memory; take fewer "
                    "--workers; the job goes on where it was when you start it again"
                ) from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _chunks(self) -> Iterator[_Chunk]:
        skip, first = self.row, self.rows_in_all
        for number in range(self.source, len(self.work.sources)):
            rows = Rows(self.work.sources[number], self.work.options.text_column)
            part: list[tuple[str, Raw]] = []
            size = 0
            for where, row in islice(rows, skip, None):
                part.append((where, row))
                size += _size(row)
                if len(part) == CHUNK_ROWS or size >= CHUNK_BYTES:
                    self.share_read = rows.share_read
                    yield _Chunk(number, rows.layout, first, part)
                    first, part, size = first + len(part), [], 0
            if part:
                yield _Chunk(number, rows.layout, first, part)
                first += len(part)
            skip = 0

    def _note(self) -> None:
        for file in (self.bad, self.queries):
            file.flush()
            os.fsync(file.fileno())
        state = {
            "fingerprint": self.work.fingerprint,
            "source": self.source,
            "row": self.row,
            "rows_in_all": self.rows_in_all,
            "left_out": self.left_out,
            "skipped": self.skipped,
            "bad_bytes": self.bad.tell(),
            "queries_bytes": self.queries.tell(),
            "writer": self.writer.position(),
        }
        with replacing(self.folder / JOURNAL) as temporary:
            temporary.write_text(json.dumps(state), encoding="utf-8")
        self._noted = time.monotonic()

    def _resumed(self) -> bool:
        """Take up the journal's position, if there is one of this very job."""
        try:
            state = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
            if state["fingerprint"] != self.work.fingerprint:
                return False
            if state["skipped"] and not self.work.options.skip_bad:
                return False
            for name in (BAD, QUERIES):
                cut_back(self.folder / name, state[f"{name.split('.')[0]}_bytes"])
            self.writer.resume(state["writer"])
        except (OSError, ValueError, KeyError, TypeError):
            self.writer.abandon()
            return False
        self.source, self.row = state["source"], state["row"]
        self.rows_in_all = state["rows_in_all"]
        self.left_out, self.skipped = Counter(state["left_out"]), state["skipped"]
        return True


_work: _Work | None = None  # of a worker process


def _start_worker(work: _Work) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A job that was killed leaves workers that wait for ever; let them end with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _in_worker(chunk: _Chunk) -> list[_Written | _LeftOut]:
    assert _work is not None
    return _work(chunk)


def _check_names(sources: Sequence[Source]) -> None:
    paths: dict[str, str] = {}
    for source in sources:
        if source.name in paths:
            raise UserError(
                f"{paths[source.name]} and {source.path} are both called '{source.name}'; name "
                "them: NAME=PATH"
            )
        paths[source.name] = source.path


def _size(row: Any) -> int:
    """About how many bytes a row, parsed or not, takes."""
    if isinstance(row, str | bytes):
        return len(row)
    if isinstance(row, dict):
        row = list(row.values())
    return 8 + sum(map(_size, row)) if isinstance(row, list) else 8


def _take_place(partial: Path, out: Path) -> None:
    """Put the whole folder where it belongs; a fault leaves the old one or the new one."""
    (partial / LOCK).unlink()
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(partial, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
