"""Turn a corpus into vectors on many GPUs, or on several ranks of a CPU.

    deepspeed launchers/encode.py CORPUS --model MODEL --out VECTORS               # all GPUs here
    deepspeed --hostfile hosts launchers/encode.py CORPUS --model MODEL --out VECTORS  # a cluster
    torchrun --nproc_per_node 8 launchers/encode.py CORPUS --model MODEL --out VECTORS
    deepspeed --num_gpus 2 launchers/encode.py CORPUS --model MODEL --out VECTORS  # two CPU ranks

Arguments and result are those of `drama encode`, which is one process: the vectors do not depend
on the ranks. Nodes need one disk for VECTORS. Started again, on as many ranks or others, it goes on
where it was stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from drama.cli_encode import encode
from drama.console import console, help_text, quiet_libraries
from drama.errors import exit_on_user_error


@click.command(
    help=help_text(__doc__),
    params=list(encode.params),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--local_rank", type=int, default=0, hidden=True, help="passed by the launcher")
def main(corpus: Path, model: Path, out: Path, local_rank: int, **options: Any) -> None:
    """Encode with all ranks."""
    with exit_on_user_error("encode"):
        quiet_libraries()
        from drama.distributed import Ranks
        from drama.retrieve.encode import encode_corpus

        with Ranks.start() as ranks:
            vectors = encode_corpus(corpus, model, out, ranks=ranks, **options)
        rows, width = vectors.vectors_ND.shape
        console.print(f"{out}: {rows:,} vectors of width {width:,}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
