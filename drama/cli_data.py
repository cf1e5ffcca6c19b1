"""The commands that write, show and check training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from drama.console import console
from drama.errors import UserError

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("sources", nargs=-1, required=True)
@click.option("--out", type=FOLDER, required=True, help="Folder for the shards.")
@click.option("--name", default="train", show_default=True, help="Shards are NAME-000000.tar ...")
@click.option(
    "--text",
    "text_column",
    metavar="COLUMN",
    help="Every row is a text without a query, which stands in COLUMN.",
)
@click.option("--shard-size", default="256MB", show_default=True, metavar="SIZE")
@click.option(
    "--workers", type=click.IntRange(1), help="Processes; default: one for each core you may use."
)
@click.option(
    "--tokenizer", metavar="MODEL", help="Store token ids too: training tokenises nothing."
)
@click.option("--query-prefix", default="Query: ", show_default=True, help="With --tokenizer.")
@click.option("--document-prefix", default="", help="With --tokenizer.")
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    default=8192,
    show_default=True,
    help="With --tokenizer: longer texts are cut.",
)
@click.option(
    "--decontaminate",
    multiple=True,
    metavar="BEIR_DIR",
    help="Drop records whose query, positive or text stands in this evaluation set; several times.",
)
@click.option(
    "--on-bad",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="A bad row ends the job, or is listed in OUT/bad.jsonl and counted.",
)
def shard(
    sources: Sequence[str],
    out: Path,
    shard_size: str,
    workers: int | None,
    on_bad: str,
    **options: Any,
) -> None:
    """Write training records, or texts without queries, as WebDataset shards.

    Each of SOURCES is [NAME[:WEIGHT]=]PATH. PATH is a file of records (our JSON lines, Tevatron,
    FlagEmbedding, sentence-transformers columns, DPR, NVIDIA inline; JSON lines, a JSON array or
    parquet; plain, .gz, .xz or .zst; here, or at s3://, gs://, hf://, https://), a BEIR folder, a
    folder of a Hugging Face dataset, or a dataset on the Hub, which is streamed:
    ORG/NAME[@REVISION][:CONFIG[:SPLIT]]. What it is is told from its content. WEIGHT is its
    share in a training mixture.

    Texts, for the training of language models, are rows with `text` and none of those layouts, the
    rows of any source with --text COLUMN (of a BEIR folder, its corpus), and plain text files
    (.txt, .txt.gz, .txt.xz, .txt.zst), whose documents are separated by blank lines.

    Stopped and started again with the same arguments, it goes on where it was; the shards' bytes do
    not depend on that, nor on --workers.

    \b
    drama shard medical.jsonl.gz msmarco:2=beir/msmarco --out shards/train
    drama shard qa=my-org/qa-pairs --tokenizer backbone --decontaminate beir/scifact --out shards/qa
    drama shard web=dump.parquet book.txt.gz --out shards/texts
    drama shard packages.jsonl --text description --out shards/packages
    """
    from drama.data.beir import is_beir, qrels_splits
    from drama.data.sharding import ShardingOptions, available_cores, shard_sources
    from drama.data.sources import Source

    given = click.get_current_context().get_parameter_source
    for key in ("query_prefix", "document_prefix", "max_tokens"):
        if options["tokenizer"] is None and given(key) is ParameterSource.COMMANDLINE:
            name = key.replace("_", "-")
            raise UserError(f"--{name} is for token ids; give --tokenizer too, or leave it out")
    parsed = [Source.parse(source) for source in sources]
    for source in parsed:
        if is_beir(source.path) and qrels_splits(source.path) == ["test"]:
            console.print(
                f"[yellow]warning:[/] {source.path} has no train split, so its test split is "
                "taken; what is trained on it cannot be judged by it",
                soft_wrap=True,
                highlight=False,
            )
    outcome = shard_sources(
        parsed,
        out,
        ShardingOptions(
            shard_bytes=parse_bytes(shard_size),
            skip_bad=on_bad == "skip",
            decontaminate=tuple(options.pop("decontaminate")),
            **options,
        ),
        workers=workers or available_cores(),
    )
    manifest = outcome.manifest
    counts = manifest.counts("source").items()
    parts = ", ".join(f"{source or '(none)'} {count:,}" for source, count in counts)
    _say(f"{out}: {manifest.num_records:,} records in {len(manifest.shards)} shards ({parts})")
    for reason, count in sorted(manifest.left_out.items()):
        _say(f"  left out, {reason}: {count:,}")
    if manifest.left_out:
        _say(f"  each one is listed in {out / 'bad.jsonl'}")
    twice = outcome.duplicates
    if twice.exact or twice.near:
        _say(
            f"  {manifest.own_texts} that come twice: {twice.exact:,} exactly, "
            f"{twice.near:,} nearly (all kept)"
        )
    for first, second in twice.examples[:3]:
        _say(f"    {_short(first)}  ~  {_short(second)}")


@click.command()
@click.argument("folder", metavar="SHARDS")
@click.option(
    "--examples", type=click.IntRange(0), default=3, show_default=True, help="Records to show."
)
def shards(folder: str, examples: int) -> None:
    """Show what a folder of shards holds: sources, languages, lengths, examples.

    SHARDS is a folder or its address (s3://, gs://, hf://, https://).
    """
    from drama.data.overview import overview

    for part in overview(folder, examples):
        console.print(part)


@click.command()
@click.argument("shards", type=FOLDER)
def verify(shards: Path) -> None:
    """Read every record of a shard folder and compare every checksum."""
    from drama.data.shards import verify as run

    _say(f"{shards}: {run(shards).num_records:,} records, all sound")


@click.command()
@click.argument("folders", type=FOLDER, nargs=-1, required=True, metavar="SHARDS...")
@click.option("--out", type=FOLDER, required=True, help="Folder for the shards.")
@click.option("--name", default="train", show_default=True, help="Shards are NAME-000000.tar ...")
def merge(folders: Sequence[Path], out: Path, name: str) -> None:
    """Copy several folders of shards into one.

    A recipe takes several folders as well; merging is for moving and publishing them.
    """
    from drama.data.shards import merge as run

    manifest = run(folders, out, name)
    _say(f"{out}: {manifest.num_records:,} records in {len(manifest.shards)} shards")


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="SHARDS...")
@click.option("--out", type=FOLDER, required=True, help="FILE.jsonl, .jsonl.gz, .xz or .zst.")
def convert(folders: Sequence[str], out: Path) -> None:
    """Turn shards back into JSON lines."""
    from drama.data.shards import to_jsonl

    _say(f"{out}: {to_jsonl(folders, out):,} records")


def parse_bytes(text: str) -> int:
    """A size such as 256MB in bytes.

    Raises:
        UserError: no number with a unit.
    """
    units = {"KB": 2**10, "MB": 2**20, "GB": 2**30, "B": 1}
    upper = text.upper().strip()
    for unit, factor in units.items():
        number = upper.removesuffix(unit)
        if number != upper and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return max(1, int(float(number) * factor))
    raise UserError(f"size '{text}': write a number with KB, MB or GB, for example 256MB")


def _short(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


COMMANDS = (shard, shards, verify, merge, convert)
