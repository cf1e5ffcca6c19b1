"""The job: the same bytes after every kill, a report that counts, and no second writer."""

import gzip
import json
import os
import random
import signal
from collections import Counter

import pytest

from drama.augment import job as module
from drama.augment.job import Dropped, Job, Kept, Step
from drama.data.records import Document, Record
from drama.data.sources import read_source
from drama.errors import UserError

WORDS = ["bees", "bread", "tides", "moons", "honey", "yeast", "ocean", "蜜蜂"]
TOTAL = 400


def result(number):
    """A function of the number alone, as a step's results must be."""
    draw = random.Random(number)
    if draw.random() < 0.2:
        return Dropped(draw.choice(["too short", "no answer"]))
    query = f"{number} {' '.join(draw.choices(WORDS, k=draw.randint(3, 30)))}"
    if number % 100 == 99:
        query = "the same again and again"
    if number % 100 == 98:
        query = f"where do honey bees of the eastern river valley sleep in winter {number}"
    documents = [
        Document(" ".join(draw.choices(WORDS, k=9)) + f" {i}", id=f"{i}") for i in range(4)
    ]
    record = Record(
        query, tuple(documents[:2]), tuple(documents[2:]), source=draw.choice("ab"), lang="en",
        scores={document.id: draw.random() for document in documents},
    )  # fmt: skip
    own_rank = draw.choice([0, 1, 7])
    return Kept(record, own_rank, {"copy": number % 3}, {"task": draw.choice(["claim", "title"])})


def steps(start, size=32):
    for first in range(start, TOTAL, size):
        end = min(first + size, TOTAL)
        yield Step(end, [result(number) for number in range(first, end)])


def work(out, about=None, make=steps):
    with Job(out, "test", about or {"seed": 0}) as job:
        return job.report or job.run(make(job.start), TOTAL)


def page(out):
    """The page beside an output, without the output's name."""
    text = out.with_name(f"{out.name.split('.')[0]}.report.html").read_text()
    assert out.name in text
    return text.replace(out.name, "OUT")


def killed(out, after):
    """Run in a process of its own, which a SIGKILL ends at the step after so many documents."""
    pid = os.fork()
    if pid == 0:
        try:
            module.JOURNAL_EVERY_S = 0.0

            def dying(start):
                for step in steps(start):
                    if step.end > after:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield step

            work(out, make=dying)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_killed_job_goes_on_to_the_same_bytes(tmp_path, suffix):
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    work(whole)
    for after in (50, 170, 390):
        killed(out, after)
        assert not out.exists()
        # a step that was half-written when the power went, after the journal
        with (tmp_path / f".out{suffix}.partial/records.jsonl").open("ab") as file:
            file.write(b'{"query": "half')
    starts = []

    def noting(start):
        starts.append(start)
        return steps(start)

    work(out, make=noting)
    assert starts == [384]
    assert out.read_bytes() == whole.read_bytes()
    names = ("out", "whole")
    assert len({(tmp_path / f"{name}.report.json").read_bytes() for name in names}) == 1
    assert page(out) == page(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name
        for stem in names
        for name in (f"{stem}{suffix}", f"{stem}.report.json", f"{stem}.report.html")
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(
    "at", ["count_duplicates", "_sample", "write_page", "Job._take_place", "shutil.rmtree"]
)
def test_a_job_killed_at_its_end_gives_the_same_bytes(tmp_path, at, suffix):
    out, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
    work(whole)
    pid = os.fork()
    if pid == 0:
        try:
            owner, name = module, at
            if "." in at:
                owner, name = getattr(module, at.split(".")[0]), at.split(".")[1]
            setattr(owner, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            work(out)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    if out.exists():
        assert page(out) == page(whole)
    work(out)
    assert out.read_bytes() == whole.read_bytes()
    assert page(out) == page(whole)
    assert not list(tmp_path.glob(".*.partial"))


def test_what_is_written_is_what_came(tmp_path):
    work(tmp_path / "out.jsonl")
    kept = [item for item in map(result, range(TOTAL)) if isinstance(item, Kept)]
    assert list(read_source(tmp_path / "out.jsonl")) == [item.record for item in kept]


def test_the_report_counts(tmp_path):
    report = work(tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.report.json").read_text()) == json.loads(json.dumps(report))
    results = [result(number) for number in range(TOTAL)]
    kept = [item for item in results if isinstance(item, Kept)]
    assert report["records"] == len(kept)
    assert report["read"] == TOTAL
    dropped = Counter(item.reason for item in results if isinstance(item, Dropped))
    assert report["dropped"] == dropped
    assert list(report["dropped"].values()) == sorted(dropped.values(), reverse=True)
    assert report["sources"] == Counter(item.record.source for item in kept)
    assert report["languages"] == {"en": len(kept)}
    assert report["positives"] == report["negatives"] == {"2": len(kept)}
    assert report["negatives_left_out"] == {"copy": sum(i.left_out["copy"] for i in kept)}
    assert sum(report["query_chars"].values()) == len(kept)
    assert all(
        count == sum(int(bound) / 2 < len(i.record.query) <= int(bound) for i in kept)
        for bound, count in report["query_chars"].items()
    )
    ranks = Counter(item.own_rank for item in kept)
    assert report["own_ranks"] == {"1": ranks[1], "7": ranks[7], "deeper": ranks[0]}
    labels = Counter(item.labels["task"] for item in kept)
    assert report["labels"] == {"task": labels}
    assert report["self_retrieval"] == {
        "first": round(ranks[1] / len(kept), 4),
        "found": round(1 - ranks[0] / len(kept), 4),
    }
    again = sum(item.record.query == "the same again and again" for item in kept)
    assert report["duplicate_queries"]["exact"] == again - 1 > 0
    near = [item.record.query for item in kept if "eastern river valley" in item.record.query]
    assert report["duplicate_queries"]["near"] == len(near) - 1 > 0
    assert all(set(pair) <= set(near) for pair in report["duplicate_queries"]["examples"])
    briefs = [
        {
            "query": item.record.query,
            "positive": item.record.positives[0].text,
            "negative": item.record.negatives[0].text,
        }
        for item in kept
    ]
    places = [briefs.index(example) for example in report["examples"]]
    assert len(places) == 10
    assert sorted(set(places)) == places


def test_a_finished_job_is_not_done_again(tmp_path):
    report = work(tmp_path / "out.jsonl")
    again = work(tmp_path / "out.jsonl", make=lambda start: pytest.fail("done again"))
    assert again == json.loads(json.dumps(report))
    before = page(tmp_path / "out.jsonl")
    (tmp_path / "out.report.html").unlink()  # as of an output that is older than the page
    work(tmp_path / "out.jsonl", make=lambda start: pytest.fail("done again"))
    assert page(tmp_path / "out.jsonl") == before


def test_other_arguments_are_noticed(tmp_path):
    out = tmp_path / "out.jsonl"
    killed(out, 100)
    message = r"out\.jsonl is half-written with other arguments \(seed 0, not 1\); give those, ano"
    with pytest.raises(UserError, match=message):
        work(out, {"seed": 1})
    work(out)
    with pytest.raises(UserError, match=r"out\.jsonl exists, made otherwise \(seed 0, not 1; an"):
        work(out, {"seed": 1, "files": "0" * 99})
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.jsonl exists, made otherwise \(it has no report"):
        work(tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_what_the_disk_lost_is_not_taken_for_written(tmp_path):
    work(tmp_path / "whole.jsonl")
    out = tmp_path / "out.jsonl"
    for name in ("records.jsonl", "queries.bin"):
        killed(out, 200)
        path = tmp_path / ".out.jsonl.partial" / name
        os.truncate(path, path.stat().st_size // 2)
        starts = []
        work(out, make=lambda start, starts=starts: starts.append(start) or steps(start))
        assert starts == [0]
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        out.unlink()


def test_two_jobs_on_one_output(tmp_path):
    out, ready, may_end = tmp_path / "out.jsonl", os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:

            def waiting(start):
                os.write(ready[1], b"x")
                os.read(may_end[0], 1)
                yield from steps(start)

            work(out, make=waiting)
            os._exit(0)
        finally:
            os._exit(1)
    try:
        assert os.read(ready[0], 1) == b"x"
        with pytest.raises(UserError, match=r"\.out\.jsonl\.partial: another job is writing there"):
            work(out)
    finally:
        os.write(may_end[1], b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert gzip.compress(out.read_bytes())


def test_nothing_kept_and_bad_names(tmp_path):
    nothing = [Step(2, [Dropped("too short"), Dropped("too short")])]
    with pytest.raises(UserError, match=r"out\.jsonl: no records to write \(too short 2\)"):
        work(tmp_path / "out.jsonl", make=lambda start: nothing)
    for name in ("out", "out.json", "out.txt.gz", ".jsonl"):
        with pytest.raises(UserError, match=r"the name must end in \.jsonl or \.jsonl\.gz"):
            work(tmp_path / name)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"folder\.jsonl is a folder"):
        work(tmp_path / "folder.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.jsonl"]
