"""Commands that turn texts into vectors: `drama encode`, `drama needle`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from drama.console import console
from drama.errors import UserError

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

    vectors = encode_corpus(corpus, model, out, **options)
    rows, dim = vectors.manifest.rows, vectors.manifest.dim
    console.print(
        f"{out}: {rows:,} vectors of width {dim:,}; next: drama index {out} --out INDEX",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _lengths(context: click.Context, option: click.Parameter, value: str | None) -> list[int]:
    """256,1k,32k to numbers; k is 1,024."""
    lengths = []
    for word in (value or "").split(","):
        number, unit = word.strip().lower().removesuffix("k"), word.strip().lower().endswith("k")
        if value is not None and not number.isdigit():
            raise UserError(f"--lengths: '{word}' is no length; write 256,1k,32k")
        lengths += [int(number) * (1024 if unit else 1)] if number else []
    return lengths


@click.command()
@click.option("--model", type=FOLDER, required=True)
@click.option(
    "--text",
    "texts",
    type=FOLDER,
    multiple=True,
    required=True,
    help="Any text or records; give it several times.",
)
@click.option(
    "--kind",
    type=click.Choice(["needle", "passkey"]),
    default="needle",
    show_default=True,
    help="A fact or a number to find.",
)
@click.option(
    "--lengths",
    callback=_lengths,
    metavar="256,1k,...",
    help="Tokens. Default: 256, doubled as far as the model's limit or 32k.",
)
@click.option(
    "--depths",
    default="0,25,50,75,100",
    show_default=True,
    metavar="PERCENT,...",
    help="Where the needle is.",
)
@click.option(
    "--documents",
    "num_documents",
    type=click.IntRange(2),
    default=20,
    show_default=True,
    help="Texts, and queries, of each length and depth.",
)
@click.option("--max-tokens", type=click.IntRange(2), help="Cut texts here; default the model's.")
@click.option("--precision", type=PRECISION, help="To compute in; as for drama encode.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", type=FOLDER, help="Keep figures, table and heat map here.")
def needle(model: Path, texts: Sequence[Path], depths: str, **options: Any) -> None:
    """Test long context: find one sentence in texts of 256 to 32k tokens.

    Texts of a length and depth are equal but for the sentence, so a model that does not see it
    finds the right one by chance. Started again with --out, it goes on where it was stopped.

    \b
    drama needle --model ./retriever --text data/demo/calibration.txt.gz --out needle
    drama needle --model ./retriever --text book.txt --kind passkey --lengths 1k,8k,32k
    """
    from drama.retrieve.needle import find_needles

    words = depths.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise UserError(f"--depths: '{depths}' must be numbers from 0 to 100, with commas between")
    results = find_needles(model, texts, depths=[int(word) for word in words], **options)
    console.print(results.table())
    accuracy, mrr = results.chance
    console.print(f"accuracy@1 by depth; by chance {accuracy:.3f}, MRR {mrr:.3f}", highlight=False)


COMMANDS = (encode, needle)
