"""Training on weighted sources, token ids out of the shards, and damaged records."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest

from drama.data.reading import BadRecord
from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.sources import Source, read_source
from drama.data.writer import write_shards
from drama.loading import BadRecords
from drama.testing import read_metrics, run_alone

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "launchers" / "train.py"
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of shards: sources `one` and `two`."""
    folder = tmp_path_factory.mktemp("sources")
    for name, first in (("one", 0), ("two", 60)):
        write_shards(islice(read_source(PAIRS, name), first, first + 60), folder / name)
    return folder


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of an HTTP server over a folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def train(world: Path, out: Path, shards: str, *changes: str) -> subprocess.CompletedProcess[str]:
    settings = [
        f"output={out}", f"data.shards={shards}", "train.deepspeed=zero1", "train.save_every=2",
        "train.schedule=constant", "train.batch_size=16", *changes,
    ]  # fmt: skip
    arguments = [part for setting in settings for part in ("--set", setting)]
    return run_alone(TRAIN, "--recipe", str(world / "recipe.yaml"), *arguments)


def test_a_source_is_added_between_two_runs(world: Path, sources: Path, tmp_path: Path) -> None:
    one = f"[{sources / 'one'}]"
    out = tmp_path / "run"
    first = train(world, out, one, "train.steps=4", "data.weights={one: 1}")
    assert first.returncode == 0, first.stderr
    assert [line["epochs"] for line in read_metrics(out)] == [
        {"one": round(16 * steps / 60, 4)} for steps in (1, 2, 3, 4)
    ]  # fmt: skip
    weights = "data.weights={one: 1, two: 3}"
    with served(sources) as address:  # the new one from afar
        both = f"[{sources / 'one'}, '{address}/two']"
        second = train(
            world, out, both, "train.steps=6", weights, f"data.cache={tmp_path / 'cache'}"
        )
    assert second.returncode == 0, second.stderr
    assert "two is new" in second.stderr
    assert "one has the share 0.25, it was 1" in second.stderr
    after = read_metrics(out)[-1]["epochs"]
    assert after == {"one": round((64 + 8) / 60, 4), "two": round(24 / 60, 4)}


@pytest.mark.slow
def test_token_ids_out_of_the_shards_give_the_same_run(world: Path, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    lines = [json.dumps(r.to_json(), ensure_ascii=False) for r in islice(read_source(PAIRS), 60)]
    records.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ShardingOptions(tokenizer=str(world / "backbone"))
    shard_sources([Source.parse(records)], tmp_path / "tokens", options, workers=2)
    shard_sources([Source.parse(records)], tmp_path / "text", ShardingOptions())
    losses = {}
    for name in ("tokens", "text"):
        done = train(world, tmp_path / f"run-{name}", f"[{tmp_path / name}]", "train.steps=2")
        assert done.returncode == 0, done.stderr
        assert ("token ids of the shards" in done.stderr) == (name == "tokens")
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / f"run-{name}")]
    assert losses["tokens"] == losses["text"]


def test_damaged_records_are_left_out_counted_and_listed(
    world: Path, sources: Path, tmp_path: Path
) -> None:
    shutil.copytree(sources / "one", tmp_path / "one")
    tar = tmp_path / "one" / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    at = content.index(b'{"query":')
    content[at + 12] ^= 1
    tar.write_bytes(content)
    done = train(
        world, tmp_path / "run", f"[{tmp_path / 'one'}]", "train.steps=4", "data.on_bad=skip",
        "data.lanes=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run")
    bad = [json.loads(x) for x in (tmp_path / "run/bad.jsonl").read_text().splitlines()]
    assert {(line["record"], line["reason"]) for line in bad} == {(0, "damaged shard")}
    assert all("train-000000.tar: record 0 at byte 0" in line["error"] for line in bad)
    for line in lines:
        hurt = line["step"] in [entry["step"] for entry in bad]
        assert line["pairs"] == 16 - hurt
        assert line.get("bad") == ({"damaged shard": 1} if hurt else None)


def test_a_line_of_bad_records_that_was_cut_short_does_not_keep_a_run_from_going_on(tmp_path):
    """By a disk that was full; a message may hold what Python, not JSON, takes for a line's end."""
    bad = BadRecords(tmp_path)
    for step in (2, 5):
        bad.report(step, [BadRecord(7, "damaged", "a\u2028b")])
    kept = bad.path.read_bytes().splitlines(keepends=True)[0]
    bad.path.write_bytes(bad.path.read_bytes() + b'{"step": 3, "rec')
    bad.forget(4)
    assert bad.path.read_bytes() == kept
