"""Commands that turn texts into vectors: `drama encode`, `drama needle`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path)
PRECISION = click.Choice(["fp32", "bf16", "fp16"])


@click.command()
@click.argument("corpus", type=FOLDER)
@click.option("--model", type=FOLDER, required=True)
@click.option("--out", type=FOLDER, required=True, help="Folder for the vectors.")
@click.option("--dim", type=click.IntRange(1), help="Cut vectors to this width (Matryoshka).")
@click.option("--max-tokens", type=click.IntRange(2), help="Cut texts here; default the model's.")
@click.option(
    "--precision", type=PRECISION, help="To compute in. Default: fp32; our models on a GPU, bf16."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="To store in.",
)
@click.option(
    "--token-budget",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    help="Tokens a forward pass.",
)
@click.option(
    "--window",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Documents sorted by length, and recorded as done, together.",
)
@click.option("--overwrite", is_flag=True, help="Replace other vectors, or damaged ones.")
def encode(corpus: Path, model: Path, out: Path, **options: Any) -> None:
    """Turn a corpus into vectors. Started again, it goes on where it was stopped.

    CORPUS is a BEIR folder or a .jsonl file of {_id, title, text}, plain, .gz or .xz. The model is
    a retriever of ours or any folder that sentence-transformers loads.

    \b
    drama encode data/demo/scifact --model runs/demo/model --out vectors
    drama encode corpus.jsonl.gz --model ./retriever --dim 256 --dtype float16 --out vectors

    On several GPUs: deepspeed launchers/encode.py, with the same arguments and the same result.
    """
    from drama.retrieve.encode import encode_corpus

    encode_corpus(corpus, model, out, **options)


COMMANDS = (encode,)
