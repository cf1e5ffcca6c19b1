"""The benchmark of pruning: its launcher on a tiny model, and that it compares equals."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from drama.testing import tiny_llama

LAUNCHER = Path(__file__).parents[2] / "launchers" / "bench_pruning.py"


def test_the_launcher_writes_a_row_for_every_way_and_phase(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "source")
    (tmp_path / "a.txt").write_text("\n\n".join(f"Paragraph number {i}." for i in range(200)))
    command = [
        sys.executable, str(LAUNCHER), "--model", str(tmp_path / "source"), "--to",
        "layers=2,hidden=32,heads=2,ffn=48", "--text", str(tmp_path / "a.txt"), "--rows", "4",
        "--length", "32", "--seconds", "0", "--out", str(tmp_path / "out.csv"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "same loss" in done.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ways = {"no masks", "masks open", "masks half way", "masks target",
            "masks target, nothing left out"}  # fmt: skip
    assert {row["x"] for row in rows} == ways
    for way in ways:
        of_way = {row["mode"]: float(row["median"]) for row in rows if row["x"] == way}
        assert {"forward", "backward", "step"} <= of_way.keys()
        assert min(of_way.values()) > 0
    alive = {row["x"]: row["config"] for row in rows if "alive" in row["config"]}
    assert '"alive": 1.0' in alive["masks target, nothing left out"]
    assert '"alive": 1.0' not in alive["masks target"]
