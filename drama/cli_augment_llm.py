"""The commands that make training data with a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from drama.augment.windows import PAPER, RERANK
from drama.cli_augment import (
    FILE,
    Command,
    beside,
    cut,
    retrieval,
    retrieval_options,
    say_report,
    window_options,
)

OUT = click.option("--out", type=FILE, required=True, help="FILE.jsonl, .jsonl.gz, .xz or .zst.")


def llm_options(
    max_tokens: int, temperature: float, top_p: float = 1.0
) -> Callable[[Command], Command]:
    """The options of every command that asks a language model; `asking` takes them."""

    def add(command: Command) -> Command:
        for option in reversed(
            (
                click.option("--model", required=True, help="Its name at the server."),
                click.option(
                    "--base-url",
                    default="http://localhost:8000/v1",
                    show_default=True,
                    metavar="URL",
                    help="The server: vLLM, transformers serve, or a paid one.",
                ),
                click.option(
                    "--api-key-env",
                    default="OPENAI_API_KEY",
                    show_default=True,
                    metavar="NAME",
                    help="The environment variable that holds the key, if the server wants one.",
                ),
                click.option(
                    "--cache",
                    type=FILE,
                    help="The file with all answers; jobs may share it. Default: answers.sqlite in "
                    "WORK, or OUT with .answers.sqlite at its end.",
                ),
                click.option(
                    "--concurrency",
                    type=click.IntRange(1),
                    default=64,
                    show_default=True,
                    help="Requests in flight.",
                ),
                click.option(
                    "--max-tokens-total",
                    type=click.IntRange(0),
                    metavar="N",
                    help="End when this run has paid for N tokens; the next one goes on. 0: only "
                    "what the cache holds.",
                ),
                click.option(
                    "--max-tokens",
                    type=click.IntRange(1),
                    default=max_tokens,
                    show_default=True,
                    help="Of one answer; thoughts count.",
                ),
                click.option(
                    "--temperature",
                    type=click.FloatRange(0, 2),
                    default=temperature,
                    show_default=True,
                ),
                click.option(
                    "--top-p",
                    type=click.FloatRange(0, 1, min_open=True),
                    default=top_p,
                    show_default=True,
                ),
                click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
                click.option(
                    "--prompt", type=FILE, help="Your own prompt, YAML; see docs/augmentation.md."
                ),
                click.option(
                    "--extra",
                    default="{}",
                    metavar="JSON",
                    help="Fields for every request, such as "
                    '\'{"chat_template_kwargs": {"enable_thinking": false}}\'.',
                ),
                click.option(
                    "--offline-batch",
                    type=FILE,
                    metavar="FILE",
                    help="Send nothing: write what the cache lacks for `vllm run-batch`.",
                ),
                click.option(
                    "--batch-results",
                    type=FILE,
                    multiple=True,
                    metavar="FILE",
                    help="Read what a batch run has written into the cache first; several times.",
                ),
            )
        ):
            command = option(command)
        return command

    return add


def asking(out: Path, work: Path | None, options: dict[str, Any]) -> Any:
    """Take the options of `llm_options` out of all of a command's.

    work: the folder of corpus and vectors, if the command has one.

    Raises:
        UserError: an extra field that is none.
    """
    from drama.augment.asking import Asking, parse_extra
    from drama.augment.patience import Limits

    cache = work / "answers.sqlite" if work else beside(out, "answers.sqlite")
    return Asking(
        options.pop("model"),
        options.pop("base_url"),
        options.pop("cache") or cache,
        options.pop("max_tokens"),
        options.pop("temperature"),
        options.pop("top_p"),
        options.pop("seed"),
        options.pop("prompt"),
        parse_extra(options.pop("extra")),
        options.pop("api_key_env"),
        Limits(options.pop("concurrency"), max_tokens_total=options.pop("max_tokens_total")),
        options.pop("offline_batch"),
        options.pop("batch_results"),
    )


@click.command()
@click.argument("sources", nargs=-1, required=True)
@OUT
@retrieval_options
@llm_options(max_tokens=256, temperature=0.8, top_p=0.9)
@window_options(PAPER)
@click.option(
    "--document-chars",
    type=click.IntRange(50),
    default=2000,
    show_default=True,
    help="Of a document in the prompt.",
)
def queries(sources: Sequence[str], out: Path, document_chars: int, **options: Any) -> None:
    """A language model writes a query for each document; a teacher finds its documents.

    SOURCES are the corpus, as in `drama augment crops`. One call a document; answers that are of no
    use are dropped and counted. The defaults are the DRAMA paper's. --enable-prefix-caching spares
    vLLM the same beginning of every prompt.

    \b
    vllm serve Qwen/Qwen3-8B --enable-prefix-caching &
    drama augment queries web.jsonl.gz --teacher ./teacher --work work/web --model Qwen/Qwen3-8B \\
        --extra '{"chat_template_kwargs": {"enable_thinking": false}}' --out queries.jsonl.gz

    \b
    Where no server runs, in three steps:
    drama augment queries ... --offline-batch todo.jsonl
    vllm run-batch -i todo.jsonl -o answers.jsonl --model Qwen/Qwen3-8B
    drama augment queries ... --batch-results answers.jsonl
    """
    from drama.augment.queries import make_queries

    windows, searched = cut(options), retrieval(sources, out, options)
    model = asking(out, searched.work, options)
    say_report(out, make_queries(searched, out, model, windows, document_chars), "documents")


@click.command()
@click.argument("records", nargs=-1, required=True)
@click.option(
    "--corpus",
    multiple=True,
    metavar="SOURCE",
    help="What is searched; several times. Default: the documents of the records themselves, of a "
    "BEIR folder its corpus.",
)
@OUT
@retrieval_options
@llm_options(max_tokens=256, temperature=0.0)
@window_options(RERANK, own=False)
@click.option(
    "--window",
    type=click.IntRange(2),
    default=20,
    show_default=True,
    help="Passages of one call; a greater --depth goes through a sliding window.",
)
@click.option(
    "--step",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="How far the window moves.",
)
@click.option(
    "--passage-chars",
    type=click.IntRange(50),
    default=1200,
    show_default=True,
    help="Of a passage in the prompt.",
)
def rerank(
    records: Sequence[str],
    corpus: Sequence[str],
    out: Path,
    window: int,
    step: int,
    passage_chars: int,
    **options: Any,
) -> None:
    """A language model orders what a teacher finds; its first is the positive.

    Of RECORDS ([NAME=]PATH of any layout that `drama shard` reads, or folders of shards) the
    queries are taken, and their documents are replaced: --depth are retrieved, the model puts them
    in order, and the ranks of its order make positives and hard negatives. What an order lacks
    follows as the teacher had it. For pairs whose positives you trust, `drama mine` and `drama
    augment relabel` keep them.

    \b
    vllm serve meta-llama/Llama-3.3-70B-Instruct --tensor-parallel-size 4 &
    drama augment rerank queries.jsonl.gz --corpus web.jsonl.gz --teacher ./teacher \\
        --work work/web --model meta-llama/Llama-3.3-70B-Instruct --out rerank.jsonl.gz
    """
    from drama.augment.rerank import RerankOptions
    from drama.augment.rerank import rerank as run
    from drama.data.sources import Source

    rerank_options = RerankOptions(cut(options), window, step, passage_chars)
    searched = retrieval(corpus or records, out, options)
    model = asking(out, searched.work, options)
    sources = [Source.parse(source) for source in records]
    say_report(out, run(sources, searched, out, model, rerank_options), "records")


@click.command()
@OUT
@click.option(
    "--number", type=click.IntRange(1), required=True, help="Triplets to ask for; some are dropped."
)
@click.option(
    "--languages",
    default="en",
    show_default=True,
    metavar="CODES",
    help="Such as en,de,zh; one that stands twice is drawn twice as often.",
)
@click.option("--tasks-prompt", type=FILE, help="Your own prompt for the tasks.")
@llm_options(max_tokens=1536, temperature=1.0, top_p=0.95)
def triplets(
    out: Path, number: int, languages: str, tasks_prompt: Path | None, **options: Any
) -> None:
    """A language model writes queries, positives and hard negatives, without a corpus.

    It first lists 20 retrieval tasks in a field that is drawn, then writes an example of each, in a
    drawn language, length and difficulty. The paper found no gain in them beside the other kinds.
    With --offline-batch this takes two rounds: the lists, then the triplets.

    \b
    vllm serve Qwen/Qwen3-8B --enable-prefix-caching &
    drama augment triplets --number 100000 --languages en,de,zh --model Qwen/Qwen3-8B \\
        --extra '{"chat_template_kwargs": {"enable_thinking": false}}' --out triplets.jsonl.gz
    """
    from drama.augment.triplets import TripletOptions, make_triplets

    codes = tuple(code.strip() for code in languages.split(",") if code.strip())
    triplet_options = TripletOptions(number, codes, tasks_prompt)
    model = asking(out, None, options)
    say_report(out, make_triplets(out, model, triplet_options), "triplets")


@click.command()
@click.argument("records", nargs=-1, required=True)
@OUT
@click.option(
    "--found",
    type=click.Choice(["move", "drop"]),
    default="move",
    show_default=True,
    help="What becomes of a negative that is relevant: a positive, or nothing.",
)
@llm_options(max_tokens=256, temperature=0.0)
@click.option(
    "--passage-chars",
    type=click.IntRange(50),
    default=1200,
    show_default=True,
    help="Of a passage in the prompt.",
)
def relabel(
    records: Sequence[str], out: Path, found: Any, passage_chars: int, **options: Any
) -> None:
    """A language model judges hard negatives; those that are positives in truth go.

    RECORDS are [NAME=]PATH of any layout that `drama shard` reads, or folders of shards. One call
    takes up to 20 negatives, beside the query and its first positive. A negative without a
    judgement stays.

    \b
    vllm serve Qwen/Qwen3-8B --enable-prefix-caching &
    drama augment relabel mined.jsonl --model Qwen/Qwen3-8B \\
        --extra '{"chat_template_kwargs": {"enable_thinking": false}}' --out relabelled.jsonl
    """
    from drama.augment.relabel import relabel as run
    from drama.data.sources import Source

    model = asking(out, None, options)
    sources = [Source.parse(source) for source in records]
    say_report(out, run(sources, out, model, found, passage_chars), "records")


COMMANDS = (queries, rerank, triplets, relabel)
