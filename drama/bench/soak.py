"""A long run with kills and resumes beside the same run left alone: equal losses, flat memory.

A tiny model, two CPU ranks. The disturbed run is killed at random steps, in turn rank 0, rank 1
and everything at once by SIGKILL, then all by SIGTERM, and started again with the same command.
Memory and file descriptors are read from outside, from /proc.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from drama.bench.rows import Rows
from drama.console import console
from drama.data.sources import read_source
from drama.data.writer import write_shards
from drama.errors import UserError
from drama.figures import lines_under_each_other
from drama.killing import Job, deepspeed_command, digests, steps_done
from drama.recipe import Recipe
from drama.testing import read_metrics, tiny_llama

SETTLED = 200  # steps of a process, after which its memory has to stay
MOST_GROWTH = 0.02
WAYS = ("SIGKILL rank 0", "SIGKILL rank 1", "SIGKILL all", "SIGTERM all")
SAMPLE_EVERY_S = 0.1
# of a line of metrics.jsonl: what has to be equal to the last bit
EXACT = ("step", "loss", "loss_by_prefix", "grad_norm", "lr", "tokens", "evaluation")
# clocks, between runs that are equal; the model card says the hours
DIFFERS = ("metrics.jsonl", "tensorboard/*", "model/README.md")
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Sample:
    """One look at one rank; life: which start of the command, from 0."""

    life: int
    rank: int
    step: int
    own_step: int  # since this start
    rss_mib: float
    descriptors: int


@dataclass(frozen=True)
class Kill:
    """How a life ended, and after which step."""

    way: str
    step: int


class Soaked:
    """A run, what was done to it, and what was seen. Its folder is that of the recipe until it has
    ended, then `kept`: checkpoints name the folder, and those of two runs have to be equal.
    """

    def __init__(self, path: Path, launcher: Path, kept: Path) -> None:
        self.path, self.launcher, self.kept = path, launcher, kept
        self.recipe = Recipe.load(path)
        self.output = self.recipe.output
        self.kills: list[Kill] = []
        self.samples: list[Sample] = []
        self.pids: set[int] = set()

    def run(self, chance: random.Random | None, gaps: tuple[int, int]) -> None:
        """To the last step; with `chance`, ended every so many steps, drawn from `gaps`.

        Raises:
            UserError: a life ended otherwise than it was made to.
        """
        num_steps = self.recipe.train.steps
        assert num_steps is not None
        for life in range(num_steps):  # more than there can be
            at = steps_done(self.output) + chance.randint(*gaps) if chance else num_steps
            way = WAYS[life % len(WAYS)] if at < num_steps else None
            log = self.kept.parent / "logs" / f"{self.kept.name}-{life}.log"
            command = deepspeed_command(self.launcher, "--recipe", str(self.path))
            with Job(command, log) as job:
                self._watch(job, life, at if way else None)
                if way is None:
                    if code := job.ended():
                        raise UserError(f"{self.kept}: life {life} ended with {code}; see {log}")
                    os.replace(self.output, self.kept)
                    return
                step = steps_done(self.output)
                self._end(job, way)
            self.kills.append(Kill(way, step))
            console.print(f"{self.kept.name}: {way} after step {step:,}", highlight=False)
        raise UserError(f"{self.kept} does not come to its end; see the logs beside it")

    def _watch(self, job: Job, life: int, until: int | None) -> None:
        """Look at the ranks until so many steps are done, or the command has ended."""
        ranks: dict[int, int] = {}
        first = None
        while job.process.poll() is None:
            step = steps_done(self.output)
            if len(ranks) < 2:
                ranks = job.ranks()
                before = step
            elif step != before or first is not None:
                # a resumed run first drops the lines beyond its checkpoint
                first = min(step, before) if first is None else first
                for rank, pid in ranks.items():
                    if seen := _look(pid):
                        own = step - first
                        self.samples.append(Sample(life, rank, step, own, *seen))
                if until is not None and step >= until:
                    self.pids.update(job.alive())
                    return
            time.sleep(SAMPLE_EVERY_S)
        if until is not None:
            raise UserError(f"{self.kept}: life {life} ended by itself: {job.said()}")

    def _end(self, job: Job, way: str) -> None:
        if way == "SIGTERM all":
            job.terminate()
            job.ended()  # the launcher has a code of its own after a signal
            if "stopped by a signal after step" not in job.said():
                raise UserError(f"{self.kept} did not stop in order: {job.said()}")
        else:
            ranks = {"SIGKILL rank 0": 0, "SIGKILL rank 1": 1}
            job.kill_at(lambda: True, rank=ranks.get(way))


def _look(pid: int) -> tuple[float, int] | None:
    """Resident MiB and open file descriptors of a process; None where it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        if not pages:  # it is ending
            return None
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return None


def prepare(folder: Path, pairs: Path, num_steps: int) -> Path:
    """A tiny Llama, shards of real pairs, and the recipe of both runs, whose path is returned.

    Its first 200 steps hold an evaluation and several checkpoints: all that memory is needed for.
    """
    path = folder / "recipe.yaml"
    tiny_llama(folder / "backbone")
    records = list(islice(read_source(pairs), 640))
    write_shards(records[:512], folder / "shards")
    write_shards(records[512:], folder / "held-out")
    recipe = Recipe.from_tree(
        {
            "name": "soak",
            "output": str(folder / "run"),
            "model": {"path": str(folder / "backbone")},
            "data": {
                "shards": [str(folder / "shards")], "hard_negatives": 1, "lanes": 8,
                "max_query_tokens": 32, "max_document_tokens": 64,
            },
            "loss": {"temperature": 0.1, "matryoshka_dims": [32, 64]},
            "train": {
                "batch_size": 16, "steps": num_steps, "lr": 1e-3, "token_budget": 1024,
                "precision": "fp32", "deepspeed": "zero1", "save_every": 20,
            },
            "eval": {"every": 50, "shards": [str(folder / "held-out")]},
        }
    )  # fmt: skip
    recipe.save(path)
    return path


def broken_promises(disturbed: Soaked, alone: Soaked) -> list[str]:
    """What was promised and did not come true, a line each."""
    broken = []
    ours, theirs = (
        [{name: line.get(name) for name in EXACT} for line in read_metrics(run.kept)]
        for run in (disturbed, alone)
    )
    if ours != theirs:
        differing = [a["step"] for a, b in zip(ours, theirs, strict=False) if a != b]
        broken.append(
            f"losses differ: {len(ours):,} and {len(theirs):,} steps, first at {differing[:1]}"
        )
    folders = [digests(run.kept, DIFFERS) for run in (disturbed, alone)]
    if folders[0] != folders[1]:
        names = sorted({name for name, _ in folders[0].items() ^ folders[1].items()})
        broken.append(f"run folders differ: {names[:5]}")
    for rank, (growth, first, last) in growths(alone).items():
        if growth > MOST_GROWTH:
            broken.append(f"rank {rank}: memory moved by {growth:.1%} after step {SETTLED}")
        if last > first:
            broken.append(f"rank {rank}: {first} file descriptors became {last}")
    if left := leftovers(disturbed.pids | alone.pids):
        broken.append(f"left in {SHARED_MEMORY}: {left[:5]}")
    return broken


def growths(run: Soaked) -> dict[int, tuple[float, int, int]]:
    """By rank, over the steps of one life after it has settled: (most - least) / least of the
    resident memory, and file descriptors in the first and the last tenth (medians). The last step
    does not count: behind it the model is written and the process ends."""
    found = {}
    last_step = max((s.step for s in run.samples), default=0)
    for rank in sorted({sample.rank for sample in run.samples}):
        settled = [
            s
            for s in run.samples
            if s.rank == rank and s.own_step >= SETTLED and s.step < last_step
        ]
        if not settled:
            continue
        memory = [sample.rss_mib for sample in settled]
        tenth = max(1, len(settled) // 10)
        first, last = (
            int(statistics.median_low(s.descriptors for s in part))
            for part in (settled[:tenth], settled[-tenth:])
        )
        found[rank] = (max(memory) / min(memory) - 1, first, last)
    return found


def leftovers(pids: set[int]) -> list[str]:
    """Files of these processes in the machine's shared memory; torch names them by process."""
    starts = tuple(f"torch_{pid}_" for pid in pids)
    return [path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(starts)]


def add_rows(rows: Rows, disturbed: Soaked, alone: Soaked, broken: Sequence[str]) -> None:
    """The figures of a soak."""
    facts: dict[str, Any] = {
        "steps": alone.recipe.train.steps, "ranks": 2, "kills": len(disturbed.kills)
    }  # fmt: skip
    detail = facts | {"ends": [asdict(kill) for kill in disturbed.kills]}
    rows.add("drama", "kills and resumes", "broken promises", "", [len(broken)], detail)
    for rank, (growth, first, last) in growths(alone).items():
        x = f"rank {rank}, from step {SETTLED}"
        rows.add("drama", "undisturbed", "resident memory, most / least - 1", x, [growth], facts)
        rows.add("drama", "undisturbed", "file descriptors gained", x, [last - first], facts)
    for mode, run in (("kills and resumes", disturbed), ("undisturbed", alone)):
        for rank in (0, 1):
            most = [max(s.rss_mib for s in run.samples if s.rank == rank)]
            rows.add("drama", mode, "highest resident memory, MiB", f"rank {rank}", most, facts)
        size = sum(p.stat().st_size for p in run.kept.rglob("*") if p.is_file()) / 2**20
        rows.add("drama", mode, "run folder, MiB", "", [size], facts)


def figure(disturbed: Soaked, alone: Soaked) -> Figure:
    """Loss and resident memory over the steps, both runs; each kill a thin line."""
    losses = {
        name: [(line["step"], line["loss"]) for line in read_metrics(run.kept)]
        for name, run in (("undisturbed", alone), ("killed and resumed", disturbed))
    }
    memory = {
        f"{name}, rank {rank}": [(s.step, s.rss_mib) for s in run.samples if s.rank == rank]
        for name, run in (("undisturbed", alone), ("killed and resumed", disturbed))
        for rank in (0, 1)
    }
    return lines_under_each_other(
        {"loss": losses, "resident memory, MiB": memory},
        marks=[kill.step for kill in disturbed.kills],
    )
