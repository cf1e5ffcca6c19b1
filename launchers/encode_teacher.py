"""Encode the corpus of an augmentation with its teacher, on many GPUs or on several ranks of a CPU.

    deepspeed launchers/encode_teacher.py web=dump.parquet --teacher ./teacher --work work/web
    torchrun --nproc_per_node 8 launchers/encode_teacher.py SOURCES --teacher T --work WORK
    deepspeed --num_gpus 2 launchers/encode_teacher.py SOURCES --teacher T --work WORK  # on a CPU

The vectors are those of `drama augment crops` and the others, which find them with the same
sources, --teacher and --work. Nodes need one disk for WORK. Started again, on as many ranks or
others, it goes on where it was stopped.
"""

from __future__ import annotations

from pathlib import Path

import click

from drama.console import console, help_text, quiet_libraries
from drama.errors import exit_on_user_error


@click.command(help=help_text(__doc__), context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("sources", nargs=-1, required=True)
@click.option("--teacher", required=True, metavar="MODEL", help="As of `drama augment crops`.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="The same.")
@click.option("--text", "text_column", metavar="COLUMN", help="The same.")
@click.option("--local_rank", type=int, default=0, hidden=True, help="passed by the launcher")
def main(
    sources: tuple[str, ...], teacher: str, work: Path, text_column: str | None, local_rank: int
) -> None:
    """Encode with all ranks."""
    with exit_on_user_error("encode_teacher"):
        quiet_libraries()
        from drama.augment.teacher import Retrieval
        from drama.data.sources import Source
        from drama.distributed import Ranks

        parsed = tuple(Source.parse(source) for source in sources)
        with Ranks.start() as ranks:
            corpus, found = Retrieval(parsed, teacher, work, text_column).open(ranks)
        console.print(
            f"{work}: {len(corpus):,} documents, vectors of width {found.manifest.dim:,}",
            markup=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
