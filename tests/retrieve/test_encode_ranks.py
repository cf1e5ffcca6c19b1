"""Many ranks encode one corpus: neither their number nor a death among them shows in the bytes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from drama.distributed import free_port
from drama.retrieve.encode import encode_corpus
from drama.testing import run_deepspeed
from tests.retrieve.test_encode import assert_same, many, windows_done

LAUNCHER = Path(__file__).parents[2] / "launchers" / "encode.py"


def test_the_holes_that_several_ranks_leave_are_filled(jsonl, model, tmp_path):
    """And nothing else: what is marked as done stays as it is."""
    corpus, whole, folder = many(jsonl), tmp_path / "whole", tmp_path / "v"
    encode_corpus(corpus, model, whole, window=60)  # the last window has 40 documents
    shutil.copytree(whole, folder)
    inputs = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    (folder / "progress.json").write_text(json.dumps({"inputs": inputs}))
    done = [1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0]
    (folder / "done.bin").write_bytes(bytes(done))
    stored = np.load(folder / "vectors.npy", mmap_mode="r+")
    for number, is_done in enumerate(done):
        rows = slice(60 * number, 60 * number + 60)
        stored[rows] = stored[rows][::-1] if is_done else 0
    stored.flush()
    filled = encode_corpus(corpus, model, folder, window=60).vectors_ND
    want = np.load(whole / "vectors.npy")
    for number, is_done in enumerate(done):
        rows = slice(60 * number, 60 * number + 60)
        np.testing.assert_array_equal(filled[rows], want[rows][::-1] if is_done else want[rows])
    assert not (folder / "done.bin").exists()


@pytest.mark.slow
def test_too_many_ranks_or_too_few_windows_hurt_nobody(dataset, model, tmp_path):
    """Three ranks, one window: two of them have nothing to do."""
    done = run_deepspeed(
        LAUNCHER, str(dataset), "--model", str(model), "--out", str(tmp_path / "v"), num_ranks=3
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "v: 8 vectors of width 64" in done.stdout + done.stderr
    encode_corpus(dataset, model, tmp_path / "alone")
    assert_same(tmp_path / "alone", tmp_path / "v")


@pytest.mark.slow
def test_a_rank_that_is_killed_and_other_ranks_that_go_on(jsonl, model, tmp_path):
    """Two ranks, one of which dies; then one process; the bits of one that was never stopped."""
    corpus, folder = many(jsonl), tmp_path / "v"
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--no_local_rank", "--num_gpus", "2",
        "--master_port", str(free_port()), str(LAUNCHER), str(corpus),
        "--model", str(model), "--out", str(folder), "--window", "8",
    ]  # fmt: skip
    launcher = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    while launcher.poll() is None and windows_done(folder) < 3:
        time.sleep(0.002)
    ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True) if _is_rank(p)]
    assert len(ranks) == 2
    ranks[-1].kill()
    assert launcher.wait(timeout=120) != 0
    before = np.frombuffer((folder / "done.bin").read_bytes(), np.uint8)
    assert 3 <= before.sum() < 80
    stored = np.load(folder / "vectors.npy")
    lost = np.abs(stored.reshape(80, 8, 64)).max((1, 2)).astype(bool) & (before == 0)
    assert lost.sum() <= 2  # at most one window a rank was written and not recorded

    encode_corpus(corpus, model, folder, window=8)
    encode_corpus(corpus, model, tmp_path / "whole", window=8)
    assert_same(tmp_path / "whole", folder)


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        command = process.cmdline()
        return "launchers/encode.py" in " ".join(command) and "deepspeed" not in " ".join(command)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("start", ["deepspeed 1", "deepspeed 2", "deepspeed 3", "torchrun 2"])
def test_ranks_do_not_show(jsonl, model, tmp_path, start):
    corpus, (program, number) = many(jsonl), start.split()
    options = [str(corpus), "--model", str(model), "--out", str(tmp_path / "v"), "--window", "16"]
    if program == "deepspeed":
        done = run_deepspeed(LAUNCHER, *options, num_ranks=int(number))
    else:
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        done = subprocess.run(
            [torchrun, "--nproc_per_node", number, "--master_port", str(free_port()),
             str(LAUNCHER), *options],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    encode_corpus(corpus, model, tmp_path / "alone", window=16)
    assert_same(tmp_path / "alone", tmp_path / "v")


@pytest.mark.slow
def test_a_fault_on_many_ranks_is_no_traceback(jsonl, model, tmp_path):
    corpus = jsonl("twice.jsonl", [{"_id": "a", "text": "x"}] * 2)
    done = run_deepspeed(LAUNCHER, str(corpus), "--model", str(model), "--out", str(tmp_path / "v"))
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "encode: error: " in said
    assert "twice.jsonl:2: document 'a' stands in the corpus twice" in said
    assert "Traceback" not in said
