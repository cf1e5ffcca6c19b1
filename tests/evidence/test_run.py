"""The runner over small commands that really run; `shape` of them is that of an evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from drama.errors import UserError
from drama.evidence.nodes import RECORD, Cell, Node
from drama.evidence.rows import read_rows
from drama.evidence.run import pace, run_cells
from drama.files import locked

EVALUATION = {
    "datasets": {
        "scifact": {
            "systems": {
                "model": {"metrics": {"nDCG@10": 0.5}, "intervals": {"nDCG@10": [0.4, 0.6]}}
            }
        }
    },
    "groups": {},
}


def python(code: str) -> tuple[str, ...]:
    return ("python", "-c", code)


def made(name: str, *needs: Node, minutes: float = 1.0) -> Node:
    """Counts how often it ran, in a file beside its folder."""
    return Node(name, (python(f"open('{name}.ran', 'a').write('x')"),), minutes, needs)


def cell(variant: str, *needs: Node) -> Cell:
    write = (
        "import os, sys; os.makedirs(sys.argv[1]); "
        f"open(sys.argv[1] + '/evaluation.json', 'w').write({json.dumps(EVALUATION)!r})"
    )
    node = Node("evaluation", ((*python(write), "{out}/evaluation", variant),), 1.0, needs)
    return Cell("shape", variant, 0, node)


def variants(csv: Path) -> list[str]:
    return [row.variant for row in read_rows(csv)]


def test_what_ended_is_not_run_again(tmp_path: Path) -> None:
    work, csv = tmp_path / "work", tmp_path / "rows.csv"
    shared = made("shared")
    cells = [cell("a", shared, made("one", shared)), cell("b", shared, made("two", shared))]
    assert run_cells(cells, work, csv, scale="smoke") == []
    assert variants(csv) == ["a", "b"]
    before = csv.read_bytes()
    assert run_cells(cells, work, csv, scale="smoke") == []
    assert csv.read_bytes() == before
    assert {p.name: p.read_text() for p in work.glob("*.ran")} == {
        "shared.ran": "x", "one.ran": "x", "two.ran": "x",
    }  # fmt: skip


def test_a_failed_node_is_told_and_the_other_cells_go_on(tmp_path: Path, capsys) -> None:
    work, csv = tmp_path / "work", tmp_path / "rows.csv"
    code = "import os; print('on the way'); os.path.exists('mended') or exit('no such width: 7')"
    broken = Node("broken", (python(code),), 1.0)
    after = made("after", broken)
    cells = [cell("a", broken, after), cell("b", broken), cell("c", made("sound"))]
    assert run_cells(cells, work, csv, scale="smoke") == ["shape/a/0", "shape/b/0"]
    said = capsys.readouterr().err
    assert said.count("ended with exit code 1: no such width: 7") == 1  # once, not once a cell
    assert "log.txt" in said
    assert variants(csv) == ["c"]
    assert not (work / "after.ran").exists()

    (work / "mended").touch()
    assert run_cells(cells, work, csv, scale="smoke") == []
    assert variants(csv) == ["a", "b", "c"]
    assert (work / "sound.ran").read_text() == "x"
    record = json.loads((work / broken.folder / RECORD).read_text())
    assert record["minutes"] is None  # it was begun twice: its minutes are not known


def test_the_budget_ends_the_run_before_a_cell_that_does_not_fit(tmp_path: Path, capsys) -> None:
    work, csv = tmp_path / "work", tmp_path / "rows.csv"
    shared = made("shared", minutes=3.0)
    cells = [cell("a", shared), cell("b", shared, made("long", minutes=600.0)), cell("c", shared)]
    assert run_cells(cells, work, csv, scale="smoke", budget_hours=1e-9) == []
    assert variants(csv) == []
    assert "budget: shape/a/0 needs 4 minutes, 0 are left" in capsys.readouterr().err
    run_cells(cells[:1], work, csv, scale="smoke")
    assert 0 < pace([shared], work) < 1  # it took seconds in place of its three minutes
    run_cells(cells, work, csv, scale="smoke", budget_hours=1e-9)
    assert variants(csv) == ["a"]  # what has ended costs nothing


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    # a lock of this process is no lock against it, so another one holds it
    code = (
        "import sys, time\nfrom drama.files import locked\n"
        f"with locked({str(tmp_path / 'lock')!r}):\n"
        "    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            with pytest.raises(UserError, match="another job is writing there"):
                run_cells([cell("a")], tmp_path, tmp_path / "rows.csv", scale="smoke")
        finally:
            other.kill()
    with locked(tmp_path / "lock"):
        pass
