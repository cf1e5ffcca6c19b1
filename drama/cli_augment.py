"""The commands that make training data out of raw text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from drama.augment.windows import MINING, PAPER, Windows, parse_ranks, spell_ranks
from drama.console import console

FILE = click.Path(path_type=Path)
Command = Callable[..., Any]


def retrieval_options(command: Command) -> Command:
    """The options of every command that searches a corpus; `retrieval` takes them."""
    for option in reversed(
        (
            click.option(
                "--teacher",
                metavar="MODEL",
                required=True,
                help="A retriever of ours, or any folder that sentence-transformers loads.",
            ),
            click.option(
                "--work",
                type=FILE,
                help="Folder for the corpus and its vectors, to be shared by the commands that use "
                "the same; default: OUT with .work at its end. It stays.",
            ),
            click.option(
                "--text",
                "text_column",
                metavar="COLUMN",
                help="The corpus' text stands in this column.",
            ),
            click.option(
                "--search",
                type=click.Choice(["flat", "hnsw"]),
                default="flat",
                show_default=True,
                help="flat is exact; hnsw is for corpora of millions on a CPU.",
            ),
        )
    ):
        command = option(command)
    return command


def window_options(windows: Windows, own: bool = True) -> Callable[[Command], Command]:
    """The options of every command that cuts a ranking, with these defaults; `cut` takes them.

    own: whether queries are made from documents of the corpus.
    """

    def add(command: Command) -> Command:
        share = windows.share
        options = [
            click.option(
                "--depth",
                type=click.IntRange(1),
                default=windows.depth,
                show_default=True,
                help="Documents to retrieve.",
            ),
            click.option(
                "--negatives",
                default=spell_ranks(windows.negatives),
                show_default=True,
                metavar="RANKS",
                help="Ranks that become hard negatives.",
            ),
            click.option(
                "--positive-aware",
                "share",
                type=click.FloatRange(0, 1),
                default=share or 0.0,
                show_default=f"{share:g}" if share else "off",
                help="Drop negatives that score above this share of the positive's; 0 drops none.",
            ),
        ]
        if windows.positives is not None:
            options.append(
                click.option(
                    "--positives",
                    default=spell_ranks(windows.positives),
                    show_default=True,
                    metavar="RANKS",
                    help="Ranks that become positives.",
                )
            )
        if windows.positives is not None and own:
            options.append(
                click.option(
                    "--own",
                    type=click.Choice(["ranked", "out"]),
                    default=windows.own,
                    show_default=True,
                    help="The query's own document: a positive where its rank is one, or never.",
                )
            )
        for option in reversed(options):
            command = option(command)
        return command

    return add


def cut(options: dict[str, Any]) -> Windows:
    """Take the options of `window_options` out of all of a command's.

    Raises:
        UserError: ranks that cannot be.
    """
    positives = options.pop("positives", None)
    return dataclasses.replace(
        PAPER,
        depth=options.pop("depth"),
        positives=None if positives is None else parse_ranks(positives),
        negatives=parse_ranks(options.pop("negatives")),
        share=options.pop("share") or None,
        own=options.pop("own", PAPER.own),
    )


def retrieval(corpus: Sequence[str], out: Path, options: dict[str, Any]) -> Any:
    """Take the options of `retrieval_options` out of all of a command's.

    Raises:
        UserError: a source that is none.
    """
    from drama.augment.teacher import Retrieval
    from drama.data.sources import Source

    work = options.pop("work") or beside(out, "work")
    return Retrieval(
        tuple(Source.parse(source) for source in corpus),
        options.pop("teacher"),
        work,
        options.pop("text_column"),
        options.pop("search"),
    )


def beside(out: Path, suffix: str) -> Path:
    """`crops.work` for `crops.jsonl.gz`."""
    return out.with_name(f"{out.name.partition('.jsonl')[0]}.{suffix}")


@click.group()
def augment() -> None:
    """Make training records out of raw text.

    Each kind writes one file of records, which `drama shard` takes, and a report beside it. Stopped
    and started again with the same arguments, each goes on where it was, to the same bytes.

    crops needs a teacher alone; the others ask a language model, at any server with OpenAI's
    /chat/completions. No answer is paid twice.

    \b
    drama augment crops web.jsonl.gz --teacher ./teacher --work work/web --out crops.jsonl.gz
    vllm serve Qwen/Qwen3-8B --enable-prefix-caching &
    drama augment queries web.jsonl.gz --teacher ./teacher --work work/web \\
        --model Qwen/Qwen3-8B --out queries.jsonl.gz
    drama shard crops.jsonl.gz queries.jsonl.gz --out shards/train
    """


@augment.command()
@click.argument("sources", nargs=-1, required=True)
@click.option("--out", type=FILE, required=True, help="FILE.jsonl, .jsonl.gz, .xz or .zst.")
@retrieval_options
@window_options(PAPER)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--chars",
    default="20-300",
    show_default=True,
    metavar="LEAST-MOST",
    help="Length of a query; Chinese, Japanese and Korean characters count as three.",
)
def crops(sources: Sequence[str], out: Path, seed: int, chars: str, **options: Any) -> None:
    """One random sentence of each document is a query; a teacher finds its documents.

    SOURCES are the corpus: whatever `drama shard` reads as texts, [NAME=]PATH (JSON lines with
    `text`, plain .txt, parquet, a Hugging Face dataset), a BEIR folder, or a folder of shards. The
    teacher encodes it once, retrieves --depth documents for each query, and their ranks make
    positives and hard negatives. The defaults are the DRAMA paper's. No LLM is needed.

    \b
    drama augment crops web=dump.parquet wiki=wiki.jsonl --teacher ./teacher --out crops.jsonl.gz
    drama augment crops beir/scifact --teacher ./all-MiniLM-L6-v2 --positive-aware 0.95 \\
        --own out --out crops.jsonl
    """
    from drama.augment.crops import CropOptions, make_crops

    least, most = parse_ranks(chars)
    crop_options = CropOptions(cut(options), seed, least, most)
    say_report(out, make_crops(retrieval(sources, out, options), out, crop_options), "documents")


@click.command()
@click.argument("records", nargs=-1, required=True)
@click.option(
    "--corpus",
    multiple=True,
    metavar="SOURCE",
    help="What is searched; several times. Default: the documents of the records themselves, of a "
    "BEIR folder its corpus.",
)
@click.option("--out", type=FILE, required=True, help="FILE.jsonl, .jsonl.gz, .xz or .zst.")
@retrieval_options
@window_options(MINING)
def mine(records: Sequence[str], corpus: Sequence[str], out: Path, **options: Any) -> None:
    """Give pairs hard negatives that a teacher finds.

    RECORDS are [NAME=]PATH of any layout that `drama shard` reads, or folders of shards. For each
    query --depth documents are retrieved; the positives and their copies go, then the --negatives
    ranks of what is left stay, without those that score like a positive. They take the place of
    the negatives that a record had. The teacher's scores of all documents are written too.

    \b
    drama mine qa.jsonl --teacher ./teacher --out mined.jsonl
    drama mine shards/qa --corpus wiki.jsonl --teacher ./teacher --negatives 10-40 \\
        --positive-aware 0.9 --out mined.jsonl.gz
    """
    from drama.augment.mine import mine as run
    from drama.data.sources import Source

    windows = cut(options)
    searched = retrieval(corpus or records, out, options)
    sources = [Source.parse(source) for source in records]
    say_report(out, run(sources, searched, out, windows), "records")


@augment.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--out", type=FILE, required=True, help="PAGE.html; PAGE.json is written too.")
def report(files: Sequence[Path], out: Path) -> None:
    """Put the reports of several jobs on one page.

    FILES are the outputs of `drama augment` and `drama mine`, or their report.json. The page has a
    table of all, then for each what was kept and dropped, lengths, languages, tasks, how often the
    source is found by its own query, copies, and ten examples. It loads nothing from anywhere.

    \b
    drama augment report crops.jsonl.gz queries.jsonl.gz rerank.jsonl.gz --out work/augment.html
    """
    from drama.augment.page import write_run

    _say(f"{write_run(files, out)}: open it in a browser; {out.with_suffix('.json')} has the same")


def say_report(out: Path, report: dict[str, Any], read: str) -> None:
    """The main figures of a job's report. read: what it went through."""
    _say(f"{out}: {report['records']:,} records of {report['read']:,} {read}")
    for reason, count in report["dropped"].items():
        _say(f"  dropped, {reason}: {count:,}")
    for reason, count in report["negatives_left_out"].items():
        _say(f"  left out of the negatives, {reason}: {count:,}")
    if bare := report["negatives"].get("0", 0):
        _say(f"  records without a negative: {bare:,}")
    if own := report["self_retrieval"]:
        _say(
            f"  the query's own document is first for {own['first']:.1%}, found for "
            f"{own['found']:.1%}"
        )
    twice = report["duplicate_queries"]
    if twice["exact"] or twice["near"]:
        _say(f"  queries that come twice: {twice['exact']:,} exactly, {twice['near']:,} nearly")
    if llm := report.get("llm"):
        counts = ", ".join(f"{name} {count:,}" for name, count in llm.items())
        _say(f"  language model: {counts}")
    if paid := report.get("llm_this_run"):
        _say(
            f"  of these in this run: {paid['sent']:,} calls sent, {paid['cached']:,} cached, "
            f"tokens paid {paid['prompt_tokens']:,} + {paid['completion_tokens']:,}"
        )
    page, plain = (beside(out, f"report.{suffix}").name for suffix in ("html", "json"))
    _say(f"  more, with examples: {page} beside it; {plain} has the same numbers")
    _say(f"next: drama shard {out} --out SHARDS")


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


COMMANDS = (augment, mine)
