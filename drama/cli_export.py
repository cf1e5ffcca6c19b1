"""The command that writes a model folder for other libraries: `drama export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from drama.console import console

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("source", type=FOLDER, metavar="RUN|CHECKPOINT")
@click.option("--out", type=FOLDER, required=True, help="Folder to write.")
@click.option("--best", is_flag=True, help="RUN/best, which the run's own evaluation chose.")
@click.option(
    "--architecture",
    type=click.Choice(["eurobert", "llama", "qwen2", "qwen3"]),
    help="Default by the mask.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option("--dim", type=int, help="Cut the vectors to this width for every consumer.")
@click.option("--onnx", is_flag=True, help="Also onnx/model.onnx, checked with onnxruntime.")
@click.option("--onnx-int8", is_flag=True, help="Also onnx/model_quint8.onnx, with 8-bit weights.")
@click.option("--evaluation", type=FOLDER, help="An evaluation.json to put into the model card.")
@click.option("--check", is_flag=True, help="Compare embeddings with other libraries'.")
def export(
    source: Path, out: Path, best: bool, dtype: str, onnx: bool, onnx_int8: bool, check: bool,
    evaluation: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Write a model folder for transformers and sentence-transformers, no remote code.

    A run that is not finished gives its newest sound checkpoint. A model folder, such as a
    backbone or another export, is taken as well.

    \b
    drama export runs/english-0.1b --out retriever --check
    drama export runs/english-0.1b --dim 256 --dtype bfloat16 --out retriever-256
    drama export runs/english-0.1b/checkpoints/step-2000 --onnx-int8 --out retriever
    """
    import torch

    from drama.export_source import export_source

    export_source(
        source,
        out,
        best=best,
        evaluation=evaluation,
        dtype=getattr(torch, dtype),
        onnx="int8" if onnx_int8 else "float32" if onnx else None,
        **options,
    )
    console.print(f"{out}: written", markup=False, soft_wrap=True)
    if check:
        from drama.equality import compare, table

        found = compare(out)
        console.print(table(found))


COMMANDS = (export,)
