"""Every command that takes long, killed at a random moment and started again: the same files.

Commands whose own tests do this already are listed in docs/reliability.md.
"""

import os
import random
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from drama.killing import Changes, Job, digests

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "data" / "demo"
TRIES = 8


@dataclass(frozen=True)
class Case:
    """A command over the world's folder, with OUT for where it writes.

    before: a command whose result lies in OUT when this one begins.
    """

    command: str
    before: str | None = None

    def line(self, world: Path, out: Path, command: str | None = None) -> list[str]:
        text = (command or self.command).format(
            world=world, demo=DEMO, run=world / "whole", model=world / "whole" / "model", OUT=out
        )
        return [sys.executable, "-P", "-m", "drama.cli", *text.split()]


CUT = "prune {world}/backbone --calibration {demo}/calibration.txt.gz --calibration-tokens 4096"
CASES = {
    "prune": Case(f"{CUT} --to layers=2,hidden=32,heads=2,ffn=48 --out {{OUT}}"),
    "prune over an old one": Case(
        f"{CUT} --to layers=2,hidden=32,heads=2,ffn=48 --out {{OUT}}",
        before=f"{CUT} --to layers=1,hidden=32,heads=2,ffn=48 --out {{OUT}}",
    ),
    "shard": Case("shard {demo}/pairs.jsonl.xz --tokenizer {model} --workers 2 --out {OUT}"),
    "encode": Case("encode {demo}/scifact --model {model} --window 64 --out {OUT}"),
    "index": Case("index {world}/vectors --type hnsw --rows-per-file 200 --out {OUT}"),
    "evaluate": Case(
        "evaluate {demo}/scifact --system bm25 --model tiny={model} --max-tokens 64 --out {OUT}"
    ),
    "teach": Case("teach {world}/shards --model {model} --out {OUT}"),
    "needle": Case(
        "needle --model {model} --text {demo}/calibration.txt.gz --lengths 160,200 --documents 20 "
        "--out {OUT}"
    ),
    "average": Case("average {run} --out {OUT}"),
    "export": Case("export {run} --out {OUT}"),
    "export over an old one": Case(
        "export {run} --dtype bfloat16 --out {OUT}", before="export {run} --out {OUT}"
    ),
    "augment crops": Case(
        "augment crops {demo}/scifact --teacher {model} --depth 20 --positives 1-4 "
        "--negatives 8-20 --work {OUT}-work --out {OUT}.jsonl.gz"
    ),
}


@pytest.fixture(scope="session")
def vectors(world: Path) -> None:
    """Of the demo's corpus, in the world's folder."""
    case = Case("encode {demo}/scifact --model {model} --out {OUT}")
    run(case.line(world, world / "vectors"), world / "vectors.log")


def run(command: list[str], log: Path, watch: Callable[[], int] | None = None) -> None:
    with Job(command, log, {"PYTHONPATH": str(ROOT)}) as job:
        while watch and job.process.poll() is None:
            watch()
        assert job.ended() == 0, job.said()


@pytest.mark.slow
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("name", CASES)
def test_killed_and_started_again_it_gives_the_same_files(name, world, tmp_path) -> None:
    case, logs, place = CASES[name], tmp_path / "logs", tmp_path / "place"
    command = case.line(world, place / "out")

    def begin() -> dict[str, str]:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if case.before:
            run(case.line(world, place / "out", case.before), logs / "before.log")
        return digests(place)

    begin()
    changes = Changes(place)
    run(command, logs / "whole.log", changes)
    whole, most = digests(place), changes.count
    chance = random.Random(zlib.crc32(name.encode()))
    for _ in range(TRIES):
        moment, old = chance.randint(1, max(1, most - 1)), begin()
        print(f"{name}: killed at change {moment} of about {most}")
        seen = Changes(place)
        with Job(command, logs / "killed.log", {"PYTHONPATH": str(ROOT)}) as job:
            try:
                job.kill_at(lambda seen=seen, moment=moment: seen() >= moment)
            except AssertionError:  # this time it made fewer changes that could be seen
                most = moment
                continue
        break
    else:
        pytest.fail("it always ended before it could be killed")
    if case.before and (place / "out").exists():
        there = {k: x for k, x in digests(place).items() if k.startswith("out/")}
        assert there in (old, whole), "neither the old folder nor the new one"
    run(command, logs / "again.log")
    assert digests(place) == whole
    assert not [path for path in os.listdir(place) if "partial" in path or ".old-" in path]
