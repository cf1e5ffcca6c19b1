"""The benchmarks of recovery: their launchers on a tiny model, and that they compare equals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.sources import Source
from drama.testing import run_alone, tiny_llama

LAUNCHERS = Path(__file__).parents[2] / "launchers"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_texts(folder: Path, count: int, first: int = 0) -> Path:
    text = "\n\n".join(f"Paragraph {i}. " * (1 + i % 9) for i in range(first, first + count))
    folder.mkdir()
    (folder / "a.txt").write_text(text)
    shard_sources([Source.parse(folder / "a.txt")], folder / "shards", ShardingOptions())
    return folder / "shards"


def test_a_row_for_every_way_and_phase(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    shards = write_texts(tmp_path / "texts", 60)
    done = run_alone(
        LAUNCHERS / "bench_recovery.py", "--model", str(tmp_path / "model"), "--shards",
        str(shards), "--texts", "8", "--length", "64", "--seconds", "0",
        "--out", str(tmp_path / "out.csv"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "same loss" in done.stderr
    rows = read(tmp_path / "out.csv")
    ways = {row["x"] for row in rows}
    assert {row["x"] for row in rows if row["provider"] == "transformers"} == {
        "transformers, padded", "transformers, rows of equal length"
    }  # fmt: skip
    assert len(ways) == 6
    for way in ways:
        of_way = {(r["mode"], r["metric"]): float(r["median"]) for r in rows if r["x"] == way}
        assert {
            ("step", "tokens/s"),
            ("forward and backward", "MiB"),
            ("forward", "seconds"),
        } <= of_way.keys()
        assert min(of_way.values()) > 0
    facts = json.loads(rows[0]["config"])
    assert facts["texts"] == 8
    assert facts["slots"] >= facts["tokens"] > facts["longest"]


@pytest.mark.slow
def test_a_comparison_over_seeds(tmp_path: Path) -> None:
    """Two arms, two seeds; called again, it runs nothing anew."""
    tiny_llama(tmp_path / "parent")
    tiny_llama(tmp_path / "cut", seed=1, hidden_size=32, num_hidden_layers=2)
    recipe = {
        "name": "x",
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tmp_path / "cut"), "parent": str(tmp_path / "parent")},
        "data": {"shards": [str(write_texts(tmp_path / "a", 60))], "length": 64, "lanes": 4,
                 "workers": 0},
        "train": {"batch_texts": 4, "steps": 2, "token_budget": 256, "precision": "fp32",
                  "deepspeed": "zero0"},
        "eval": {"every": 1, "shards": [str(write_texts(tmp_path / "b", 9, 100))]},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = [
        "--recipe", str(tmp_path / "r.yaml"), "--seeds", "2", "--arm", "cross-entropy",
        "--arm", "cross-entropy + KL", "--out", str(tmp_path / "out.csv"),
        "--figure", str(tmp_path / "out.svg"),
    ]  # fmt: skip
    done = run_alone(LAUNCHERS / "compare_recovery.py", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read(tmp_path / "out.csv")
    assert [row["provider"] for row in rows] == ["cross-entropy"] * 3 + ["cross-entropy + KL"] * 3
    losses = [json.loads(row["config"])["losses"] for row in rows]
    assert losses[0] == losses[3], "both arms begin with the same model"
    assert losses[2] != losses[5]
    assert losses[2][0] != losses[2][1], "seeds draw other texts"
    assert "cross-entropy + KL" in (tmp_path / "out.svg").read_text()
    models = sorted((tmp_path / "runs").glob("*/model/model.safetensors"))
    before = [path.stat().st_mtime_ns for path in models]
    assert run_alone(LAUNCHERS / "compare_recovery.py", *command).returncode == 0
    assert [path.stat().st_mtime_ns for path in models] == before
    assert len(models) == 4
