"""Steps without a finite loss or gradient: nothing of them stays, all ranks agree, three end it."""

import json
from pathlib import Path

import pytest

from drama.testing import run_deepspeed

WORKER = Path(__file__).parent / "workers" / "bad_steps.py"
MATRIX = [
    f"{stage}:{precision}:{reduction}"
    for stage in range(4)
    for precision in ("fp32", "bf16")
    for reduction in ("step", "chunk")
    if not (stage == 0 and (precision == "bf16" or reduction == "step"))
]


@pytest.mark.parametrize(
    "cases", [["2:bf16:step", "1:bf16:chunk"], pytest.param(MATRIX, marks=pytest.mark.slow)]
)
def test_a_bad_step_leaves_no_residue(tmp_path, cases):
    """[good, bad, good] gives the weights of a run that left the second one out by hand."""
    done = run_deepspeed(WORKER, str(tmp_path), *cases)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 4 * len(cases)
    for name, case in found.items():
        assert case["weights"] > 10, name
        assert all(case[key] for key in ("same", "norms", "rates")), (name, case)
        assert case["bad norm"] in ("nan", "inf"), (name, case)
