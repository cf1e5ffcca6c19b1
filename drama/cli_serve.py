"""`drama serve`: a page for looking at a model."""

from __future__ import annotations

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)


@click.command()
@click.option("--model", type=FOLDER, help="Default: the one that the index was built with.")
@click.option("--index", type=FOLDER, help="To search in; without it texts can be compared.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: a free one."
)
@click.option("--dim", type=click.IntRange(1), help="Cut vectors to this width (Matryoshka).")
@click.option(
    "--max-texts", type=click.IntRange(1), default=64, show_default=True, help="Of one request."
)
@click.option(
    "--max-bytes",
    type=click.IntRange(1024),
    default=4 * 2**20,
    show_default=True,
    help="Of one request's body.",
)
@click.option("--open", "open_browser", is_flag=True, help="Show the page in your browser.")
def serve(
    model: Path | None,
    index: Path | None,
    host: str,
    port: int,
    dim: int | None,
    max_texts: int,
    max_bytes: int,
    open_browser: bool,
) -> None:
    """Look at a model: a page to search and to compare texts, and two endpoints.

    POST /v1/embeddings takes and gives what OpenAI's does, so its clients work; GET /search?q=...
    gives what drama search --json prints. It answers this machine alone unless --host says
    otherwise, one request at a time: production serving is vLLM's and TEI's job (docs/serving.md).

    \b
    drama serve --index index
    drama serve --model ./retriever --port 9000
    curl 'http://127.0.0.1:8765/search?q=vitamin+d&k=5'
    """
    from drama.serve.limits import Limits
    from drama.serve.run import serve as run

    limits = Limits(max_texts=max_texts, max_bytes=max_bytes)
    run(model, index, host=host, port=port, dim=dim, limits=limits, open_browser=open_browser)


COMMANDS = (serve,)
