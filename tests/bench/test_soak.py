"""What a soak counts as broken, on samples and run folders made by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from drama.bench import soak
from drama.bench.soak import Sample, broken_promises, growths, leftovers


def run(folder: Path, loss: float, memory: list[float], descriptors: list[int]):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": loss, "seconds": loss}))
    (folder / "model").write_text(str(loss))
    samples = [
        Sample(0, 0, 190 + 10 * i, 190 + 10 * i, rss, count)
        for i, (rss, count) in enumerate(zip(memory, descriptors, strict=True))
    ]
    end = samples[-1].step + 10
    samples.append(Sample(0, 0, end, end, 1.0, 0))  # of a process that ends
    return SimpleNamespace(kept=folder, samples=samples, pids=set())


def test_growth_is_counted_from_step_200_on(tmp_path):
    seen = run(tmp_path / "a", 1.0, [10, 100, 101, 99], [90, 20, 20, 21])
    ((growth, first, last),) = growths(seen).values()
    assert growth == pytest.approx(101 / 99 - 1)
    assert (first, last) == (20, 21)


def test_each_broken_promise_is_named(tmp_path, monkeypatch):
    flat = [100.0, 100.0, 101.0], [20, 20, 20]
    whole, same = (run(tmp_path / name, 1.0, *flat) for name in "ab")
    assert broken_promises(whole, same) == []
    other = run(tmp_path / "c", 2.0, *flat)
    assert [line.split(":")[0] for line in broken_promises(other, whole)] == [
        "losses differ", "run folders differ",
    ]  # fmt: skip
    grown = run(tmp_path / "d", 1.0, [1, 100, 103], [20, 20, 25])
    memory, files = broken_promises(whole, grown)
    assert "memory moved by 3.0%" in memory
    assert "20 file descriptors became 25" in files
    shared = tmp_path / "shm"
    shared.mkdir()
    for name in ("torch_77_1_0", "torch_7_1_0", "else"):
        (shared / name).touch()
    monkeypatch.setattr(soak, "SHARED_MEMORY", shared)
    assert leftovers({77}) == ["torch_77_1_0"]
