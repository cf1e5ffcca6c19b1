"""Every JSON of ds_configs/ trains, and all of them along the same curve."""

import json
from pathlib import Path

import numpy as np
import pytest

from drama.settings import DS_CONFIGS
from drama.testing import run_deepspeed

WORKER = Path(__file__).parent / "workers" / "ds_configs.py"
NAMES = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))


@pytest.fixture(scope="module")
def curves(world, tmp_path_factory) -> dict[str, list[dict]]:
    out = tmp_path_factory.mktemp("configs")
    done = run_deepspeed(WORKER, str(world / "recipe.yaml"), str(out), *NAMES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {
        name: [json.loads(x) for x in (out / name / "metrics.jsonl").read_text().splitlines()]
        for name in NAMES
    }


def test_all_five_are_there():
    assert NAMES == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_curve_is_that_of_zero0(curves, name):
    """fp32, 20 steps, two ranks."""
    ours, plain = ([line["loss"] for line in curves[n]] for n in (name, "zero0"))
    assert len(ours) == 20
    assert ours[-1] < 0.8 * ours[0]
    np.testing.assert_allclose(ours, plain, rtol=1e-4)
