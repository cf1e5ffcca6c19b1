"""What every test finds: quiet libraries, a skip for what needs a GPU."""

from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml

from drama.console import quiet_libraries
from drama.data.sources import read_source
from drama.data.writer import write_shards
from drama.testing import run_deepspeed, tiny_llama

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "launchers" / "train.py"
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"
STEPS = 9

quiet_libraries()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a tiny model, real shards, a recipe, and the run that was never stopped."""
    folder = tmp_path_factory.mktemp("world")
    tiny_llama(folder / "backbone")
    write_shards(islice(read_source(PAIRS), 160), folder / "shards")
    recipe = {
        "name": "tiny",
        "output": str(folder / "whole"),
        "model": {"path": str(folder / "backbone")},
        "data": {
            "shards": [str(folder / "shards")],
            "hard_negatives": 2,
            "max_query_tokens": 40,
            "max_document_tokens": 90,
            "lanes": 8,
        },
        "loss": {"temperature": 0.1, "matryoshka_dims": [32, 64]},
        "train": {
            "batch_size": 32,
            "steps": STEPS,
            "lr": 3e-3,
            "token_budget": 1024,
            "precision": "fp32",
            "save_every": 4,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = run_deepspeed(TRAIN, "--recipe", str(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder
