"""Reading training data: ours beside webdataset, mosaicml-streaming and datasets, same records.

Every figure is taken in a process of its own. All readers parse the same bytes with the same
parser and shuffle over at least 1,024 records; a record is its JSON text, or token ids.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from drama.console import console, progress
from drama.data.batches import RankBatches
from drama.data.manifest import read_manifest
from drama.data.order import LaneOrder
from drama.data.records import Record
from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.sources import Source, read_source
from drama.data.stream import ShardSet
from drama.data.tokens import TokenRecord
from drama.data.writer import write_manifest
from drama.distributed import free_port
from drama.errors import UserError
from drama.files import replacing, replacing_folder
from drama.tokenizer import TextEncoder, load_tokenizer

BATCH, LANES, SHUFFLE = 2048, 64, 1024
KILL_BATCH, KILL_LANES = 48, 12  # divisible by two and by three ranks
STATE_EVERY = 20  # steps
NEIGHBOURS = 200
KINDS = ("text", "tokens")
WAYS = ("ours", "webdataset", "mosaicml-streaming", "datasets")
PROTOCOL_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

Reader = Iterator[tuple[str, Any]]  # query id, and what was read


# -- the same records in four forms ---------------------------------------------------------------


def prepare(pairs: Path, model: Path, folder: Path, count: int) -> None:
    """Write `count` records, cycling through `pairs`, in the form of every library."""
    records = folder / "records.jsonl"
    if not records.is_file():
        with replacing(records) as temporary, temporary.open("wb") as file:
            for value in _numbered(pairs, count):
                file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    for kind, tokenizer in (("text", None), ("tokens", str(model))):
        if not (folder / f"ours-{kind}").is_dir():
            options = ShardingOptions(shard_bytes=64 * 2**20, tokenizer=tokenizer)
            source = Source(str(records), "bench")
            shard_sources([source], folder / f"ours-{kind}", options, workers=os.cpu_count() or 1)
    shards = ShardSet([folder / "ours-tokens"])
    for kind in KINDS:
        if not (folder / f"mds-{kind}").is_dir() and _has("streaming"):
            with replacing_folder(folder / f"mds-{kind}") as out:
                _write_mds(shards, kind, out)
        if not (folder / f"parquet-{kind}").is_dir():
            with replacing_folder(folder / f"parquet-{kind}") as out:
                _write_parquet(shards, kind, out)


def _numbered(pairs: Path, count: int) -> Iterator[dict[str, Any]]:
    known = [record.to_json() for record in read_source(pairs)]
    for number in range(count):
        value = dict(known[number % len(known)])
        yield value | {"query": f"{value['query']} ({number})", "query_id": str(number)}


def _payloads(shards: ShardSet, kind: str) -> Iterator[tuple[str, bytes]]:
    with progress() as bar:
        task = bar.add_task(f"copy {kind}", total=len(shards), note="")
        for index in range(len(shards)):
            record = shards.read(index)
            yield (
                record.query_id,
                json.dumps(record.to_json(), ensure_ascii=False).encode()
                if kind == "text"
                else shards.read_tokens(index).to_bytes(),
            )
            bar.update(task, advance=1)


def _write_mds(shards: ShardSet, kind: str, out: Path) -> None:
    from streaming import MDSWriter

    columns = {"id": "str", "payload": "bytes"}
    with MDSWriter(out=str(out), columns=columns, size_limit=64 * 2**20) as writer:
        for query_id, payload in _payloads(shards, kind):
            writer.write({"id": query_id, "payload": payload})


def _write_parquet(shards: ShardSet, kind: str, out: Path) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema([("id", pyarrow.string()), ("payload", pyarrow.binary())])
    rows, number = _payloads(shards, kind), 0
    while part := list(islice(rows, 10_000)):
        with ParquetWriter(out / f"part-{number:05d}.parquet", schema) as writer:
            for first in range(0, len(part), 1000):
                ids, payloads = zip(*part[first : first + 1000], strict=True)
                writer.write_table(pyarrow.table([ids, payloads], schema=schema))
        number += 1


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


# -- readers --------------------------------------------------------------------------------------


def _parse(kind: str, payload: bytes) -> Any:
    return json.loads(payload) if kind == "text" else TokenRecord.from_bytes(payload).rows()


def read_ours(folder: Path, kind: str, first: int = 0) -> Reader:
    """One by one, in the order of training, from record `first` of the epoch on."""
    shards = ShardSet([folder / f"ours-{kind}"])
    order = LaneOrder(shards.shard_sizes, batch_size=BATCH, seed=0, lanes=LANES)
    for step in range(min(first // BATCH, order.batches_per_epoch - 1), order.batches_per_epoch):
        for index in order.rank_records(step, 0, 1)[0].tolist():
            if kind == "text":
                record: Record = shards.read(index)
                yield record.query_id, record
            else:
                yield "", shards.read_tokens(index).rows()


def read_webdataset(folder: Path, kind: str, first: int = 0) -> Reader:
    """Plain webdataset over our shards; it has no position, what came before is read again."""
    import webdataset

    urls = sorted(map(str, (folder / f"ours-{kind}").glob("*.tar")))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(SHUFFLE).decode()
    for sample in islice(dataset, first, None):
        if kind == "text":
            yield sample["json"]["query_id"], sample["json"]
        else:
            yield "", _parse(kind, sample["tok"])


def read_mosaic(folder: Path, kind: str, first: int = 0) -> Reader:
    """StreamingDataset, resumed by its own state."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(
        local=str(folder / f"mds-{kind}"),
        shuffle=True,
        batch_size=128,  # decides how far it reads ahead; of 1, 128 and 2,048 the fastest
        num_canonical_nodes=1,
    )
    if first:
        dataset.load_state_dict(_mosaic_state(dataset, first))
    for sample in dataset:
        yield sample["id"], _parse(kind, sample["payload"])


def _mosaic_state(dataset: Any, done: int) -> dict[str, Any]:
    """Its own state after `done` records of the first epoch, in which a new set is not yet."""
    state: dict[str, Any] = dataset.state_dict(done, from_beginning=True)
    return state | {"epoch": 0}


def read_datasets(folder: Path, kind: str, first: int = 0) -> Reader:
    """An IterableDataset over parquet, resumed by its own state, which `save_state` took."""
    dataset = _parquet(folder, kind).shuffle(seed=0, buffer_size=SHUFFLE)
    if first:
        dataset.load_state_dict(json.loads((folder / f"state-{first}.json").read_text()))
    for sample in dataset:
        yield sample["id"], _parse(kind, sample["payload"])


def _parquet(folder: Path, kind: str) -> Any:
    from datasets import load_dataset

    files = sorted(map(str, (folder / f"parquet-{kind}").glob("*.parquet")))
    return load_dataset("parquet", data_files=files, split="train", streaming=True)


READERS: dict[str, Callable[..., Reader]] = {
    "ours": read_ours,
    "webdataset": read_webdataset,
    "mosaicml-streaming": read_mosaic,
    "datasets": read_datasets,
}


# -- what is measured, each in a process of its own ----------------------------------------------


def speed(way: str, kind: str, folder: Path, seconds: float) -> dict[str, float]:
    """Records/s and tokens/s of one core after a start of 2,000 records, and the peak memory."""
    reader = READERS[way](folder, kind)
    next(islice(reader, 1999, None))
    count, tokens, began = 0, 0, time.perf_counter()
    for _, value in reader:
        count += 1
        if kind == "tokens":
            tokens += sum(map(len, value))
        if count % 500 == 0 and time.perf_counter() - began > seconds:
            break
    spent = time.perf_counter() - began
    return {"records/s": count / spent, "tokens/s": tokens / spent, "peak MiB": _peak_mib()}


def batches(kind: str, folder: Path, model: Path, seconds: float) -> dict[str, float]:
    """What training takes: whole batches of 2,048 queries, one positive and all four negatives
    each, tokenised where the shards hold no token ids."""
    shards = ShardSet([folder / f"ours-{kind}"])
    order = LaneOrder(shards.shard_sizes, batch_size=BATCH, seed=0, lanes=LANES)
    encode = TextEncoder(load_tokenizer(model), "Query: ")
    rows = RankBatches(
        shards, order, encode, rank=0, world_size=1, seed=0, hard_negatives=4,
        max_query_tokens=512, max_document_tokens=512,
    )  # fmt: skip
    if bool(rows.no_tokens) == (kind == "tokens"):
        raise UserError(f"the shards' token ids: {rows.no_tokens or 'used'}")
    rows[0]
    step, count, tokens, began = 1, 0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        batch = rows[step]
        step, count, tokens = step + 1, count + batch.num_queries, tokens + batch.num_tokens
    spent = time.perf_counter() - began
    return {"records/s": count / spent, "tokens/s": tokens / spent, "peak MiB": _peak_mib()}


def resume(way: str, kind: str, folder: Path, share: float) -> dict[str, float]:
    """Seconds from opening the data to the first record, and to the first batch of 2,048, at a
    share of the epoch."""
    first = int(share * len(ShardSet([folder / f"ours-{kind}"])))
    _import(way)
    began = time.perf_counter()
    reader = READERS[way](folder, kind, first)
    next(reader)
    record = time.perf_counter() - began
    for _ in islice(reader, BATCH - 1):
        pass
    return {"first record": record, "first batch": time.perf_counter() - began}


def link_many(folder: Path, times: int, out: Path) -> None:
    """A folder of as many shards again, `times` over, as links: a large corpus on a small disk."""
    manifest = read_manifest(folder)
    out.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, shard in enumerate(manifest.shards * times):
        copy = replace(shard, file=f"train-{number:06d}.tar")
        for old, new in ((shard.file, copy.file), (shard.idx_file, copy.idx_file)):
            (out / new).unlink(missing_ok=True)
            os.link(folder / old, out / new)
        shards.append(copy)
    write_manifest(out, replace(manifest, shards=tuple(shards)))


def spread(way: str, folder: Path) -> dict[str, float]:
    """How well a batch is mixed: of the runs of 200 neighbouring records, how many of them are in
    a batch of 2,048, beside a draw at random; the mean of 8 batches."""
    reader = READERS[way](folder, "text")
    runs_of = (int(query_id) // NEIGHBOURS for query_id, _ in reader)
    batches = [list(islice(runs_of, BATCH)) for _ in range(8)]
    counts = [len(set(batch)) for batch in batches if len(batch) == BATCH]
    runs = len(ShardSet([folder / "ours-text"])) / NEIGHBOURS
    return {"runs": float(np.mean(counts)), "at random": runs * (1 - (1 - 1 / runs) ** BATCH)}


def save_state(folder: Path, share: float) -> dict[str, float]:
    """Take the state of `datasets` at a share of the epoch: it has none before it was there."""
    first = int(share * len(ShardSet([folder / "ours-text"])))
    dataset = _parquet(folder, "text").shuffle(seed=0, buffer_size=SHUFFLE)
    for _ in islice(dataset, first):
        pass
    (folder / f"state-{first}.json").write_text(json.dumps(dataset.state_dict()))
    return {}


def _import(way: str) -> None:
    names = {"webdataset": "webdataset", "mosaicml-streaming": "streaming", "datasets": "datasets"}
    if way in names:
        __import__(names[way])


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# -- kill -9 and another number of ranks ----------------------------------------------------------


def rank_batches(way: str, folder: Path, step: int) -> Iterator[list[str]]:
    """One rank's records of every step from `step` on; ranks are in the environment."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if way == "ours":
        shards = ShardSet([folder / "ours-text"])
        order = LaneOrder(shards.shard_sizes, batch_size=KILL_BATCH, seed=0, lanes=KILL_LANES)
        for at in range(step, order.batches_per_epoch):
            yield [shards.read(int(i)).query_id for i in order.rank_records(at, rank, world)[0]]
        return
    size = KILL_BATCH // world
    if way == "mosaicml-streaming":
        import torch.distributed as dist
        from streaming import StreamingDataset

        dist.init_process_group("gloo")
        dataset = StreamingDataset(
            local=str(folder / "mds-text"), shuffle=True, batch_size=size, num_canonical_nodes=1
        )
        if step:
            state = _mosaic_state(dataset, step * KILL_BATCH)
            dist.barrier()  # the state goes through shared memory, which all of them read
            dataset.load_state_dict(state)
            dist.barrier()
        ids = (sample["id"] for sample in dataset)
    elif way == "webdataset":  # no state: it starts over
        import webdataset

        urls = sorted(map(str, (folder / "ours-text").glob("*.tar")))
        tars = webdataset.WebDataset(
            urls, shardshuffle=len(urls), seed=0, nodesplitter=webdataset.split_by_node
        )
        ids = (json.loads(s["json"])["query_id"] for s in tars.shuffle(SHUFFLE))
    else:  # its state is of one rank and the same number of ranks: it starts over
        from datasets.distributed import split_dataset_by_node

        whole = _parquet(folder, "text").shuffle(seed=0, buffer_size=SHUFFLE)
        ids = (s["id"] for s in split_dataset_by_node(whole, rank, world))
    while part := list(islice(ids, size)):
        yield part


def run_rank(way: str, folder: Path, out: Path, step: int) -> None:
    """Write what a rank reads, a line a step, and note every 20th step as saved."""
    rank = int(os.environ["RANK"])
    with (out / f"rank{rank}.log").open("w", encoding="ascii", buffering=1) as log:
        for at, ids in enumerate(rank_batches(way, folder, step), step):
            log.write(f"{at} {' '.join(ids)}\n")
            if (at + 1) % STATE_EVERY == 0:
                with replacing(out / f"saved{rank}") as temporary:
                    temporary.write_text(str(at + 1), encoding="ascii")


def killed(way: str, folder: Path, scratch: Path) -> dict[str, float]:
    """Two ranks are killed on the way, three go on from the last state: what came twice, and what
    never came though the epoch ended (beyond what fills no batch)."""
    total = len(ShardSet([folder / "ours-text"]))
    seen: Counter[str] = Counter()
    saved = 0
    for world in (2, 3):
        out = scratch / f"{way}-{world}"
        out.mkdir()
        ranks = _start_ranks(way, folder, out, world, saved)
        if world == 2:
            saved = _wait_for_steps(out, ranks, total // KILL_BATCH // 4)
            for rank in ranks:
                rank.send_signal(signal.SIGKILL)
        if any(rank.wait() not in (0, -signal.SIGKILL) for rank in ranks):
            raise UserError(f"{way}: a rank failed, see {out}")
        for path in out.glob("rank*.log"):
            for line in path.read_text(encoding="ascii").splitlines():
                step, *ids = line.split()
                if world == 3 or int(step) < saved:  # what came after the state is trained again
                    seen.update(ids)
    most_left_out = total % KILL_BATCH if way == "ours" else 0
    return {
        "repeated": sum(seen.values()) - len(seen),
        "lost": max(0, total - len(seen) - most_left_out),
    }


def _wait_for_steps(out: Path, ranks: Sequence[subprocess.Popen[bytes]], least: int) -> int:
    """The last step that every rank has saved, once that is `least`."""
    while True:
        steps = [int(path.read_text(encoding="ascii")) for path in out.glob("saved?")]
        if len(steps) == len(ranks) and min(steps) >= least:
            return min(steps)
        if any(rank.poll() not in (None, 0) for rank in ranks):
            raise UserError(f"a rank failed, see {out}")
        time.sleep(0.01)


def _start_ranks(
    way: str, folder: Path, out: Path, world: int, step: int
) -> list[subprocess.Popen[bytes]]:
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    ranks = []
    for rank in range(world):
        environment = os.environ | PROTOCOL_ENV | common
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        task = {"task": "run_rank", "way": way, "folder": str(folder), "out": str(out),
                "step": step}  # fmt: skip
        with (out / f"rank{rank}.err").open("wb") as errors:
            command = [sys.executable, "-m", "drama.bench.data", json.dumps(task)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=errors, stderr=errors))
    return ranks


# -- processes ------------------------------------------------------------------------------------

TASKS: dict[str, Callable[..., Any]] = {
    "speed": speed, "batches": batches, "resume": resume, "spread": spread,
    "save_state": save_state, "run_rank": run_rank,
}  # fmt: skip


def alone(task: str, **arguments: Any) -> dict[str, float]:
    """Run a task of this module in a process of its own, on one core.

    Raises:
        UserError: the process failed; its last lines.
    """
    whole = json.dumps({"task": task, **arguments}, default=str)
    command = [sys.executable, "-m", "drama.bench.data", whole]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | PROTOCOL_ENV, check=False
    )
    if done.returncode:
        raise UserError(f"{task} {arguments}: {done.stderr[-1500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: dict[str, Any]) -> None:
    """One task, its figures as JSON on the last line."""
    if hasattr(os, "sched_setaffinity") and arguments["task"] != "run_rank":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    paths = ("folder", "model", "out")
    values = {k: Path(v) if k in paths else v for k, v in arguments.items() if k != "task"}
    result = TASKS[arguments["task"]](**values)
    sys.stdout.write(json.dumps(result) + "\n")


def ways() -> Sequence[str]:
    """The libraries that are installed; says which are not."""
    found = []
    for way in WAYS:
        if way == "mosaicml-streaming" and not _has("streaming"):
            console.print("mosaicml-streaming is not installed; its rows are left out")
        else:
            found.append(way)
    return found


def library(way: str) -> dict[str, str]:
    """Name and version, for the rows."""
    return {} if way.startswith("ours") else {way: metadata.version(way)}


def mean_and_spread(values: Sequence[float]) -> str:
    """A short text of several figures."""
    return f"{np.median(values):,.4g} ({min(values):,.4g} to {max(values):,.4g})"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
