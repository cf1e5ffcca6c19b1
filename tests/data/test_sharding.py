"""Sources into shards: the same bytes whatever the workers and the kills, and what is counted."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import webdataset

from drama.data import sharding
from drama.data.beir import read_corpus, read_qrels, read_queries
from drama.data.manifest import read_manifest
from drama.data.records import Document, Record
from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.shards import verify
from drama.data.sources import Source
from drama.data.stream import ShardSet
from drama.data.tokens import TokenRecord
from drama.errors import UserError
from drama.testing import tiny_llama
from drama.tokenizer import TextEncoder, load_tokenizer

ROOT = Path(__file__).parents[2]
SCIFACT = ROOT / "data" / "demo" / "scifact"
WORDS = ["bees", "bread", "tides", "moons", "honey", "yeast"]
WORDS += ["ocean", "colony", "baker", "storm", "light", "river"]


# in KiB, of this program only: ru_maxrss starts with what the parent had when it forked
PEAK = """
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
"""


def rows(count, seed=0, sources=("",), langs=("",)):
    draw = random.Random(seed)
    for number in range(count):
        text = [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(3)]
        row = {
            "query": f"{number} {text[0]}",
            "positives": [{"text": text[1], "title": draw.choice(["", "a title"])}],
            "negatives": [{"text": text[2]}] * draw.randint(0, 2),
            "query_id": str(number),
            "source": draw.choice(sources),
            "lang": draw.choice(langs),
        }
        yield {key: value for key, value in row.items() if value != ""}


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard(paths, out, workers=1, **options):
    sources = [Source.parse(path) for path in paths]
    return shard_sources(sources, out, ShardingOptions(**options), workers=workers)


def read_all(folder):
    shards = ShardSet([folder])
    return [shards.read(index) for index in range(len(shards))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def source(tmp_path):
    groups = {"sources": ("a", "b"), "langs": ("", "en", "ja")}
    return write(tmp_path / "x.jsonl", rows(1500, **groups))


def test_the_bytes_do_not_depend_on_the_workers(source, tmp_path, model):
    options = {"shard_bytes": 150_000, "tokenizer": str(model)}
    for workers in (1, 2, 3):
        outcome = shard([source], tmp_path / str(workers), workers, **options)
    first = contents(tmp_path / "1")
    assert len(first) > 8
    assert contents(tmp_path / "2") == contents(tmp_path / "3") == first
    assert verify(tmp_path / "3") == outcome.manifest == read_manifest(tmp_path / "3")
    assert outcome.manifest.num_records == 1500


def test_nothing_is_lost_and_the_order_stays(source, tmp_path):
    shard([source], tmp_path / "out", 2, shard_bytes=100_000)
    want = [Record.from_json(json.loads(line)) for line in source.read_text().splitlines()]
    got = read_all(tmp_path / "out")
    for group in product(("a", "b"), ("", "en", "ja")):
        of_group = [record for record in got if (record.source, record.lang) == group]
        assert of_group == [record for record in want if (record.source, record.lang) == group]
        assert of_group
    assert len(got) == len(want)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.jsonl"]


def killed(after, work, workers=1, at_end=""):
    """Run `work` in a process of its own, which a SIGKILL ends after so many records.

    at_end: a function of the job's end before which it is killed instead.
    """
    pid = os.fork()
    if pid == 0:
        try:
            sharding.JOURNAL_EVERY_S = 0.0  # after every chunk
            if at_end:
                setattr(sharding, at_end, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            take, taken = sharding._Job._take, []

            def take_and_die(job, result):
                take(job, result)
                taken.append(1)
                if len(taken) == after:
                    os.kill(os.getpid(), signal.SIGKILL)

            sharding._Job._take = take_and_die
            work(workers)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def starts(monkeypatch):
    """Where each job of this process starts: the number of its first row."""
    found, run = [], sharding._Job.run

    def noting(job, *rest):
        found.append(job.rows_in_all)
        return run(job, *rest)

    monkeypatch.setattr(sharding._Job, "run", noting)
    return found


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_job_goes_on_and_gives_the_same_bytes(source, tmp_path, starts, workers, model):
    other = write(tmp_path / "y.jsonl", rows(300, seed=1))
    out, options = tmp_path / "out", {"shard_bytes": 60_000, "tokenizer": str(model)}
    shard([source, other], tmp_path / "whole", **options)
    for after in (600, 300, 800):
        killed(after, lambda count: shard([source, other], out, count, **options), workers)
        assert not out.exists()
    # of 600 rows two chunks are noted: the second job starts at 512, the third at 768, which
    # dies in the second source; that one's first chunk ends at 1756
    outcome = shard([source, other], out, workers, **options)
    assert starts == [0, 1500]
    assert contents(out) == contents(tmp_path / "whole")
    assert outcome.manifest == verify(out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("at_end", ["count_duplicates", "_take_place"])
def test_a_job_killed_at_its_end_gives_the_same_bytes(source, tmp_path, starts, at_end):
    out = tmp_path / "out"
    shard([source], tmp_path / "whole", shard_bytes=60_000)
    killed(-1, lambda count: shard([source], out, count, shard_bytes=60_000), at_end=at_end)
    shard([source], out, shard_bytes=60_000)
    assert contents(out) == contents(tmp_path / "whole")
    if at_end == "count_duplicates":  # which takes long for a large corpus
        assert starts == [0, 1500]


def test_a_half_written_file_of_a_kill_does_not_stay(source, tmp_path, starts):
    out = tmp_path / "out"
    shard([source], tmp_path / "whole", shard_bytes=60_000)
    killed(1000, lambda count: shard([source], out, count, shard_bytes=60_000))
    (tmp_path / ".out.partial" / ".train-000000.idx.open.partial-77").write_bytes(b"half")
    shard([source], out, shard_bytes=60_000)
    assert starts == [0, 768]
    assert contents(out) == contents(tmp_path / "whole")


def test_what_the_disk_lost_is_not_taken_for_written(source, tmp_path, starts):
    """A tar that is shorter than the journal says must not be filled with zeros."""
    shard([source], tmp_path / "whole")
    for name in ("train-000000.tar", "queries.bin"):
        killed(1000, lambda count: shard([source], tmp_path / "out", count))
        path = tmp_path / ".out.partial" / name
        os.truncate(path, path.stat().st_size // 2)
        shard([source], tmp_path / "out")
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert starts == [0, 0, 0]


@pytest.mark.parametrize("change", ["source", "options", "weight", "journal"])
def test_changed_input_starts_anew(source, tmp_path, starts, change):
    out = tmp_path / "out"
    killed(1000, lambda count: shard([f"q={source}"], out, count))
    spec, options = f"q={source}", {}
    if change == "source":
        write(source, rows(900, seed=5))
    elif change == "options":
        options = {"shard_bytes": 99_000}
    elif change == "weight":
        spec = f"q:2={source}"
    else:
        (tmp_path / ".out.partial" / "journal.json").write_text('{"fingerprint": 1')
    shard([spec], out, **options)
    shard([spec], tmp_path / "whole", **options)
    assert starts == [0, 0]
    assert contents(out) == contents(tmp_path / "whole")


def test_a_source_that_grows_during_the_job_starts_anew(source, tmp_path, starts):
    """The journal holds the state at the job's start, not that of its last note."""
    out = tmp_path / "out"

    def grow_and_shard(count):
        init = sharding._Job.__init__

        def then_grow(job, *rest):
            init(job, *rest)
            write(source, rows(1600, seed=7))

        sharding._Job.__init__ = then_grow
        shard([source], out, count)

    killed(1000, grow_and_shard)
    shard([source], out)
    assert starts == [0]
    assert read_manifest(out).num_records == 1600


def test_the_real_command_killed_from_outside_can_be_started_again_at_once(tmp_path):
    """Workers must not outlive the job: they would hold its lock."""
    source = write(tmp_path / "x.jsonl", rows(3_000))
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent(
            """
            import sys
            from drama.cli import main
            from drama.data import sharding
            sharding.JOURNAL_EVERY_S = 0.05
            main(["shard", *sys.argv[1:]])
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", str(driver), str(source), "--workers", "2", "--out"]
    job = subprocess.Popen(
        [*command, "out"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    journal = tmp_path / ".out.partial" / "journal.json"
    end = time.monotonic() + 60
    while not journal.exists() and job.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    job.kill()
    assert job.wait() == -signal.SIGKILL
    assert len(children) == 2
    assert 0 < json.loads(journal.read_text())["rows_in_all"] < 3_000
    again = subprocess.run(
        [*command, "out"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    for child in children:
        state = Path(f"/proc/{child}/stat")  # a zombie is ended too, nobody may reap it here
        assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    shard([source], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_jobs_on_one_folder(source, tmp_path):
    ready, may_end = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run = sharding._Job.run

            def wait_first(job, *rest):
                os.write(ready[1], b"x")
                os.read(may_end[0], 1)
                return run(job, *rest)

            sharding._Job.run = wait_first
            shard([source], tmp_path / "out", 2)
            os._exit(0)
        finally:
            os._exit(1)
    try:
        assert os.read(ready[0], 1) == b"x"
        with pytest.raises(UserError, match=r"\.out\.partial: another job is writing there") as e:
            shard([source], tmp_path / "out")
        assert "\n" not in str(e.value)
    finally:
        os.write(may_end[1], b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(read_all(tmp_path / "out")) == 1500


def test_a_worker_that_is_killed_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding._Work, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a worker was ended from outside, perhaps for want of mem"):
        shard([source], tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == [source]


def test_several_sources_with_names_and_weights(tmp_path):
    own = write(tmp_path / "own.jsonl", rows(40, sources=("inner",)))
    packed = tmp_path / "flag.jsonl.gz"
    flag = [{"query": f"f {i}", "pos": ["p"], "neg": ["n"], "prompt": "Do: "} for i in range(7)]
    packed.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in flag).encode()))
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"anchor": f"a {i}", "positive": "p"} for i in range(5)]))
    specs = [own, f"flags:2.5={packed}", f"pairs:1={pairs}", f"sci={SCIFACT}"]
    manifest = shard(specs, tmp_path / "out", 2).manifest
    assert manifest.weights == {"flags": 2.5, "pairs": 1.0}
    counts = {"inner": 40, "flags": 7, "pairs": 5, "sci": 300}
    assert manifest.counts("source") == counts
    got = read_all(tmp_path / "out")
    assert Counter(record.source for record in got) == counts
    assert {record.prompt for record in got if record.source == "flags"} == {"Do: "}
    with pytest.raises(UserError, match=r"own\.jsonl are both called 'own'; name them: NAME=PATH"):
        shard([own, own], tmp_path / "twice")


def test_token_ids_are_those_of_the_encoder(tmp_path, model):
    items = list(rows(300, langs=("en", "ja")))
    for number, item in enumerate(items):
        item["query"] += " 日本の猫 🐝" * (number % 3)
        if number % 4 == 0:
            item["prompt"] = "Find what answers: "
    items[5]["positives"] = [{"text": "long " * 100, "id": "x"}, {"text": "", "title": "only"}]
    items[5]["scores"] = {"x": 0.25}
    source = write(tmp_path / "x.jsonl", items)
    settings = {"query_prefix": "Q: ", "document_prefix": "D: ", "max_tokens": 90}
    shard([source], tmp_path / "out", 2, tokenizer=str(model), **settings)
    shards = ShardSet([tmp_path / "out"])
    assert shards.tokens.max_tokens == 90
    encoder = TextEncoder(load_tokenizer(model), "Q: ", "D: ")
    num_cut = 0
    for index in range(len(shards)):
        record, tokens = shards.read(index), shards.read_tokens(index)
        documents = (*record.positives, *record.negatives)
        prompt = record.prompt or "Q: "
        want = encoder.tokenizer([prompt + record.query])["input_ids"]
        want += encoder.tokenizer(["D: " + d.full_text for d in documents])["input_ids"]
        eos = encoder.tokenizer.eos_token_id
        want = [row if len(row) <= 90 else [*row[:89], eos] for row in want]
        assert [row.tolist() for row in tokens.rows()] == want
        assert want[0] == encoder.queries([record], 90)[0][0]
        num_cut += sum(len(row) == 90 for row in want)
        assert (tokens.num_positives, tokens.num_negatives) == (
            len(record.positives),
            len(record.negatives),
        )
        if record.query_id == "5":
            np.testing.assert_array_equal(tokens.scores[:2], [0.25, np.nan])
        else:
            assert tokens.scores is None
        again = TokenRecord.from_bytes(tokens.to_bytes())
        for name in ("num_positives", "num_negatives", "ids", "scores", "lengths", "tokens"):
            np.testing.assert_array_equal(getattr(again, name), getattr(tokens, name))
    assert num_cut
    verify(tmp_path / "out")


def test_plain_webdataset_opens_shards_with_token_ids(source, tmp_path, model):
    manifest = shard([source], tmp_path / "out", shard_bytes=300_000, tokenizer=str(model)).manifest
    paths = [str(tmp_path / "out" / item.file) for item in manifest.shards]
    shards = ShardSet([tmp_path / "out"])
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert len(samples) == len(shards) == 1500
    for index, sample in enumerate(samples):
        assert Record.from_json(sample["json"]) == shards.read(index)
        assert sample["tok"] == shards.read_tokens(index).to_bytes()


def test_decontamination_is_counted_per_set(tmp_path):
    """Real scifact, and a second set; titles inside and outside of the text."""
    queries, corpus = read_queries(SCIFACT), {d.id: d for d in read_corpus(SCIFACT)}
    grades = next(iter(read_qrels(SCIFACT, "test").values()))
    answer = corpus[next(iter(grades))]
    judged = {id_ for of_query in read_qrels(SCIFACT, "test").values() for id_ in of_query}
    free = next(d for d in corpus.values() if d.id not in judged)
    query = next(iter(queries.values()))
    other = tmp_path / "other"
    (other / "qrels").mkdir(parents=True)
    write(other / "corpus.jsonl", [{"_id": "1", "title": "Bees", "text": "Honey is stored."}])
    train_only = {"_id": "t", "text": "a query of the train split"}
    write(other / "queries.jsonl", [{"_id": "q", "text": "who stores honey"}, train_only])
    header = "query-id\tcorpus-id\tscore\n"
    (other / "qrels" / "test.tsv").write_text(header + "q\t1\t1\n")
    (other / "qrels" / "train.tsv").write_text(header + "t\t1\t1\n")

    def row(query, **positive):
        return {"query": query, "positives": [positive or {"text": "fresh"}]}

    dropped = [
        row(query),
        row(f"  {query.upper()} !!"),
        row("a", text=answer.text),
        row("b", text=answer.text, title=answer.title),
        row("c", text=f"{answer.title}: {answer.text}"),
        row("d", text=answer.text, title="another title"),
    ]
    dropped_by_other = [
        row("Who stores honey?"),
        row("e", text="honey is stored"),
        row("f", text="Bees. Honey is stored"),
        row("g", title="Bees", text="Honey is stored."),
    ]
    kept = [
        row("h", text=free.text, title=free.title),  # in the corpus, but it answers nothing
        row("i", text=answer.text[:-20]),
        row("a query of the train split"),
        row(answer.text),
        row("Bees"),
        {**row("j"), "negatives": [{"text": answer.text}]},  # a negative teaches no answer
    ]
    source = write(tmp_path / "x.jsonl", [*dropped, *kept, *dropped_by_other])
    sets = (str(SCIFACT), str(other))
    outcome = shard([source], tmp_path / "out", decontaminate=sets)
    assert outcome.left_out == {"in scifact": len(dropped), "in other": len(dropped_by_other)}
    assert outcome.manifest.left_out == outcome.left_out
    assert [record.query for record in read_all(tmp_path / "out")] == [r["query"] for r in kept]
    listed = [json.loads(line) for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    numbers = [*range(1, 7), *range(13, 17)]
    assert [item["where"] for item in listed] == [f"{source}:{n}" for n in numbers]
    other.rename(tmp_path / "scifact")  # another set of that name
    alike = (str(SCIFACT), str(tmp_path / "scifact"))
    outcome = shard([source], tmp_path / "alike", decontaminate=alike)
    names = {f"in {SCIFACT.parent.name}/scifact", f"in {tmp_path.name}/scifact"}
    assert set(outcome.left_out) == names
    with pytest.raises(UserError, match="scifact is given twice"):
        shard([source], tmp_path / "no", decontaminate=(str(SCIFACT),) * 2)
    with pytest.raises(UserError, match="none is no BEIR folder"):
        shard([source], tmp_path / "no", decontaminate=(str(tmp_path / "none"),))


def test_faults_leave_neither_folder_nor_partial(source, tmp_path):
    for options, message in [
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"name": "../x"}, "shard name"),
        ({"tokenizer": str(tmp_path / "none")}, "no tokenizer"),
    ]:
        with pytest.raises(UserError, match=message):
            shard([source], tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == [source]
    nothing = write(tmp_path / "nothing.jsonl", [{"query": "q"}, {"query": "r"}])
    with pytest.raises(UserError, match=r"nothing\.jsonl:1: unknown layout"):
        shard([nothing], tmp_path / "out", skip_bad=True)
    empty = write(tmp_path / "empty.jsonl", [{"query": "q", "positives": []}])
    with pytest.raises(UserError, match="no records to write"):
        shard([empty], tmp_path / "out", skip_bad=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.jsonl", "nothing.jsonl", "x.jsonl"]


def test_a_bad_row_stops_and_may_then_be_skipped(source, tmp_path, monkeypatch, starts):
    """What was written stays, and the job goes on with the other choice, either way."""
    monkeypatch.setattr(sharding, "JOURNAL_EVERY_S", 0.0)
    lines = source.read_text().splitlines()
    lines[1000] = "broken"
    source.write_text("\n".join(lines))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"x\.jsonl:1001: invalid JSON"):
        shard([source], out)
    assert not out.exists()
    shard([source], out, skip_bad=True)
    assert starts == [0, 768]
    shard([source], tmp_path / "whole", skip_bad=True)
    assert contents(out) == contents(tmp_path / "whole")
    killed(1300, lambda count: shard([source], tmp_path / "third", count, skip_bad=True))
    with pytest.raises(UserError, match=r"x\.jsonl:1001: invalid JSON"):
        shard([source], tmp_path / "third")  # the row that was skipped counts again


def test_ids_that_are_null_are_none(tmp_path):
    items = [
        {"query_id": None, "query": "q", "positive_passages": [{"docid": None, "text": "p"}]},
    ]
    shard([write(tmp_path / "tevatron.jsonl", items)], tmp_path / "a")
    items = [{"query_id": None, "query": "q", "pos_doc": "p", "neg_doc": ["n"]}]
    shard([write(tmp_path / "inline.jsonl", items)], tmp_path / "b")
    for folder in "ab":
        (record,) = read_all(tmp_path / folder)
        assert record.query_id == ""
        assert record.positives == (Document("p"),)


def test_an_old_folder_is_replaced_and_another_one_refused(source, tmp_path):
    shard([source], tmp_path / "out", shard_bytes=20_000)
    small = write(tmp_path / "y.jsonl", rows(3))
    shard([small], tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [
        "manifest.json", "train-000000.idx", "train-000000.tar"
    ]  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="mine exists and is no folder of shards"):
        shard([small], tmp_path / "mine")


@pytest.mark.parametrize("cut", [0.5, 1.0])
@pytest.mark.parametrize("count", [3, 700])
@pytest.mark.parametrize("packing", ["gz", "xz", "zst"])
def test_a_packed_source_that_breaks_off(tmp_path, packing, count, cut):
    import lzma

    import pyarrow

    plain = "".join(json.dumps(row) + "\n" for row in rows(count)).encode()
    zstd = pyarrow.Codec("zstd")
    pack = {
        "gz": gzip.compress,
        "xz": lzma.compress,
        "zst": lambda content: zstd.compress(content, asbytes=True),
    }[packing]
    packed = pack(plain)
    path = tmp_path / "x"
    path.write_bytes(packed[: int(len(packed) * cut) - (cut == 1.0)])
    with pytest.raises(UserError, match=r"x: .*(cut or damaged|cannot)"):
        shard([path], tmp_path / "out")
    path.write_bytes(packed)
    assert shard([path], tmp_path / "out").manifest.num_records == count
    path.write_bytes(packed + packed)  # as `cat` joins them
    assert shard([path], tmp_path / "out").manifest.num_records == 2 * count


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_is_flat(tmp_path, workers):
    program = f"""
import sys
from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.sources import Source
shard_sources(
    [Source.parse(sys.argv[1])], sys.argv[2], ShardingOptions(), workers=int(sys.argv[3])
)
{PEAK}
print(peak())
"""
    peaks = []
    for count in (5_000, 50_000):
        source = write(tmp_path / f"{count}.jsonl", rows(count))
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, source, tmp_path / "out", str(workers)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 40_000  # the records' members are 100 MiB
