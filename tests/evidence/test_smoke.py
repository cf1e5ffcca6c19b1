"""The launcher at the smoke scale: every node is the real command on real files, made tiny."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drama.demo import ROOT
from drama.evidence.nodes import RECORD

LAUNCHER = [sys.executable, str(ROOT / "launchers" / "evidence.py"), "--scale", "smoke"]
PATIENCE = 900  # seconds, for a machine that is busy


def run(work: Path, *options: str, only: str = "batch") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCHER, "--only", only, "--work", str(work), *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def kill_in_the_second_training(work: Path) -> Path:
    """Start the launcher, kill it and all that it started; return the folder of that training."""
    process = subprocess.Popen(
        [*LAUNCHER, "--only", "batch", "--work", str(work)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        last = time.monotonic() + PATIENCE
        while time.monotonic() < last and process.poll() is None:
            begun = [path.parent for path in work.glob("retriever-*/run")]
            stopped = [path for path in begun if not (path / RECORD).exists()]
            if len(begun) == 2 and stopped:
                return stopped[0]
            time.sleep(0.05)
        pytest.fail("the second training never began")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ended(work: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in work.glob(f"*/{RECORD}")}


def figures(work: Path) -> list[dict[str, str]]:
    """The rows without how long it took."""
    with (work / "evidence.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "minutes"} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_an_experiment_that_is_killed_and_goes_on(tmp_path: Path) -> None:
    work = tmp_path / "work"
    ours = [ROOT / "docs" / "evidence.md", ROOT / "benchmarks" / "evidence.csv"]
    before = [path.read_bytes() if path.exists() else None for path in ours]

    stopped = kill_in_the_second_training(work)
    first = ended(work)
    assert stopped.name not in first
    assert len(figures(work)) == 1
    done = run(work)
    assert done.returncode == 0, done.stderr
    assert {name: ended(work)[name] for name in first} == first  # none of them ran again
    found = figures(work)
    assert [row["variant"] for row in found] == ["16", "16, margin 0.1", "32"]
    for row in found:
        assert (row["experiment"], row["metric"]) == ("batch", "nDCG@10 scifact")
        assert int(row["examples"]) == 64
        assert int(row["tokens"]) > 64
    values = [
        json.loads(path.read_text())["datasets"]["scifact"]["systems"]["model"]["metrics"]
        for path in work.glob("evaluation-*/evaluation/evaluation.json")
    ]
    assert sorted(f"{value['nDCG@10']:.5g}" for value in values) == sorted(
        row["value"] for row in found
    )
    page = (work / "evidence.md").read_text()
    assert f"| 32 | 1 | {float(found[2]['value']):.3f} | not run |" in page
    assert (work / "evidence" / "batch.svg").is_file()

    # the same again does nothing; the stopped training from its beginning gives the same
    all_of_it, rows = ended(work), (work / "evidence.csv").read_bytes()
    assert run(work).returncode == 0
    assert ended(work) == all_of_it
    assert (work / "evidence.csv").read_bytes() == rows
    for path in [stopped / RECORD, *work.glob(f"evaluation-*/{RECORD}")]:
        if stopped.name in path.read_text():
            shutil.rmtree(path.parent)
    assert len(ended(work)) == len(all_of_it) - 2
    assert run(work).returncode == 0
    assert ended(work).keys() == all_of_it.keys()
    assert figures(work) == found

    # a budget that nothing more fits into
    done = run(work, "--budget-hours", "0", only="batch,shape")
    assert done.returncode == 0
    assert "budget: shape/" in done.stderr
    assert figures(work) == found

    # a language model that is not there: told by its node, and by the exit code
    done = run(work, "--llm", str(tmp_path / "gone"))
    assert done.returncode == 2
    assert "ended with exit code 2: " in done.stderr
    assert str(tmp_path / "gone") in done.stderr
    assert "3 cells failed, batch/16/0 first" in done.stderr
    assert figures(work) == found
    assert [path.read_bytes() if path.exists() else None for path in ours] == before


@pytest.mark.slow
def test_drama_nano_from_its_texts_to_its_page(tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = run(work, "--nano", "3x64", only="nano")
    assert done.returncode == 0, done.stderr
    values = {(row["variant"], row["metric"]): float(row["value"]) for row in figures(work)}
    systems = {system for system, _ in values}
    assert systems == {"3 x 64", "bm25", "MiniLM"}
    assert 0.5 < values["bm25", "nDCG@10 scifact"] <= 1
    page = (work / "evidence.md").read_text()
    assert f"| scifact | {values['3 x 64', 'nDCG@10 scifact']:.3f} [" in page
    # another work folder with the same figures has nothing left to run
    figures_of = ["--missing", "--csv", str(work / "evidence.csv")]
    again = run(tmp_path / "other", "--nano", "3x64", *figures_of, only="nano")
    assert again.returncode == 0, again.stderr
    assert not list((tmp_path / "other").glob("*-*"))
