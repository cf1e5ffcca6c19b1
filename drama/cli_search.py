"""The commands that build an index and search it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from drama.console import console
from drama.errors import UserError

if TYPE_CHECKING:
    from drama.retrieve.search import Hit

PATH = click.Path(path_type=Path)
TYPES = ("auto", "flat", "hnsw", "ivf", "int8", "pq", "rabitq", "binary")  # FAISS loads slowly
SHOWN, RANKED = 5, 100  # results of a query on the console and in a run file
INDENT = 5
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal would obey them


@click.command()
@click.argument("vectors", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder for the index.")
@click.option("--type", "kind", type=click.Choice(TYPES), default="auto", show_default=True)
@click.option(
    "--rows-per-file",
    type=click.IntRange(1),
    help="Documents in a file of the index, which is built in memory; default what 2 GiB hold.",
)
@click.option("--no-documents", is_flag=True, help="Keep no copy of titles and texts.")
def index(
    vectors: Path, out: Path, kind: str, rows_per_file: int | None, no_documents: bool
) -> None:
    """Build a FAISS index over the folder that `drama encode` wrote.

    \b
    drama index vectors --out index
    drama index vectors --out index --type rabitq

    \b
    auto    flat up to 200,000 documents, hnsw while its graph fits into half of the
            memory, else rabitq
    flat    compares every vector: exact
    hnsw    a graph over whole vectors: misses least of the fast ones, largest
    ivf     whole vectors in lists, of which some are read
    int8    8 bits a number, every document compared
    pq      a byte for four numbers, in lists
    rabitq  a bit a number, in lists: smallest of the fast ones
    binary  a bit a number, every document compared

    int8, pq, rabitq and binary find candidates, which are then scored with the whole vectors of
    VECTORS: keep that folder. Stopped and started again, a build goes on.
    """
    from drama.retrieve.index import build_index

    meta = build_index(vectors, out, kind, rows_per_file=rows_per_file, documents=not no_documents)
    console.print(
        f'{out}: {meta.type} index; try: drama search --index {out} "your question"',
        markup=False,
        soft_wrap=True,
    )


@click.command()
@click.argument("queries", nargs=-1)
@click.option("--index", "folder", type=PATH, required=True)
@click.option("-k", type=click.IntRange(1), help=f"Results; default {SHOWN}, {RANKED} with --run.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a query on stdout.")
@click.option("--queries", "file", type=PATH, help="Queries: .jsonl of {_id, text}, or .tsv.")
@click.option("--run", "out", type=PATH, help="With --queries: the TREC run file to write.")
@click.option(
    "--effort",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="How far an approximate index looks: 2 finds more in about twice the time.",
)
@click.option(
    "--rerank/--no-rerank",
    default=None,
    help="Score candidates with whole vectors; default where they are still there.",
)
@click.option("--model", type=PATH, help="The index's model, where it has moved.")
def search(
    queries: Sequence[str],
    folder: Path,
    k: int | None,
    as_json: bool,
    file: Path | None,
    out: Path | None,
    effort: float,
    rerank: bool | None,
    model: Path | None,
) -> None:
    """Search an index with text.

    \b
    drama search --index index "does vitamin d prevent colds?"
    drama search --index index                 # asks; Ctrl-D ends
    drama search --index index < questions.txt # one a line
    drama search --index index --queries beir/scifact/queries.jsonl --run out.trec
    """
    if (file is None) != (out is None):
        raise UserError("--queries FILE and --run OUT go together: a run file needs queries' ids")
    if file is not None and queries:
        raise UserError(f"queries come from {file} or from the command line, not from both")
    if isinstance(
        sys.stdin, io.TextIOWrapper
    ):  # what is no UTF-8 comes as far as the check of queries
        sys.stdin.reconfigure(errors="surrogateescape")
    prompt = file is None and not queries and sys.stdin.isatty()
    texts = list(queries)
    if file is None and not queries and not prompt:
        texts = [line.strip() for line in sys.stdin if line.strip()]
        if not texts:
            raise UserError("no query: give one as an argument or a line of standard input")

    from drama.retrieve.search import Searcher, check_queries, search_file

    check_queries(texts)
    searcher = Searcher(folder, model=model, rerank=rerank)
    if file is not None and out is not None:
        number = search_file(searcher, file, out, k or RANKED, effort)
        console.print(f"{out}: {number:,} queries", markup=False, soft_wrap=True)
        return
    show = _print_json if as_json else _print_hits
    if prompt:
        meta = searcher.index.meta
        console.print(
            f"{folder}: {meta.rows:,} documents, type {meta.type}; Ctrl-D ends",
            markup=False,
            soft_wrap=True,
        )
        for text in _asked(pure_stdout=as_json or not sys.stdout.isatty()):
            try:
                hits = searcher.search([text], k or SHOWN, effort)[0]
            except UserError as error:
                click.echo(f"drama: error: {error}", err=True)
            else:
                show(text, hits)
        return
    for text, hits in zip(texts, searcher.search(texts, k or SHOWN, effort), strict=True):
        show(text, hits)


COMMANDS = (index, search)


def _asked(pure_stdout: bool) -> Iterator[str]:
    """What is typed at the prompt, line by line, until the end of input.

    Args:
        pure_stdout: ask on stderr, which has no history, so stdout holds nothing but answers.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its arrow keys and its history
    while True:
        try:
            with contextlib.redirect_stdout(sys.stderr if pure_stdout else sys.stdout):
                text = input("search> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            return
        if text:
            yield text


def _print_json(query: str, hits: list[Hit]) -> None:
    value: dict[str, Any] = {"query": query, "hits": [hit.to_json() for hit in hits]}
    line = json.dumps(value, ensure_ascii=False)  # escapes the control characters of ASCII
    click.echo(CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", line))


def _print_hits(query: str, hits: list[Hit]) -> None:
    page = Console(highlight=False)
    page.print(Text(_shown(query), "bold"), soft_wrap=True)
    for rank, hit in enumerate(hits, 1):
        head = Text(f"{rank:>{INDENT - 2}}  {hit.score:.3f}  ")
        if hit.title:
            head += _marked(hit.title, hit.title_marks, "bold underline", "bold") + "  "
        page.print(head + Text(_shown(hit.id), "dim"), soft_wrap=True)
        if hit.snippet:
            body = _marked(hit.snippet, hit.marks, "bold", "")
            if page.is_terminal:
                page.print(Padding(body, (0, 0, 0, INDENT)))
            else:
                page.print(Text(" " * INDENT) + body, soft_wrap=True)


def _marked(text: str, spans: Sequence[tuple[int, int]], inside: str, outside: str) -> Text:
    marked = Text(_shown(text), outside)
    for start, end in spans:
        marked.stylize(inside, start, end)
    return marked


def _shown(text: str) -> str:
    return CONTROL.sub("\ufffd", text)
