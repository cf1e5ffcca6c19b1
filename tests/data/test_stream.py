import os
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.data import stream
from drama.data.order import LaneOrder
from drama.data.records import Document, Record
from drama.data.shards import verify
from drama.data.stream import ShardSet
from drama.data.writer import write_shards
from drama.errors import UserError


def sample(count, source):
    return [Record(f"{source} {i}", (Document(f"text {i}"),), source=source) for i in range(count)]


@pytest.fixture
def folders(tmp_path):
    write_shards(sample(30, "a"), tmp_path / "a", shard_bytes=8000)
    write_shards(sample(11, "b"), tmp_path / "b", name="other")
    return [tmp_path / "a", tmp_path / "b"]


@pytest.fixture
def records():
    return sample(30, "a") + sample(11, "b")


def test_two_folders_are_one_set(folders, records):
    shards = ShardSet(folders)
    assert len(shards.shard_sizes) > 3
    assert sum(shards.shard_sizes) == len(shards) == 41
    assert [shards.read(i) for i in range(41)] == records
    for index in (-1, 41):
        with pytest.raises(IndexError):
            shards.read(index)


class Rows(torch.utils.data.Dataset):
    def __init__(self, shards):
        self.shards = shards

    def __len__(self):
        return len(self.shards)

    def __getitem__(self, index):
        return self.shards.read(index).query


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_read_the_same(folders, records, context):
    shards = ShardSet(folders)
    shards.read(0)  # an open descriptor before the workers start
    loader = torch.utils.data.DataLoader(
        Rows(shards), num_workers=2, batch_size=None, multiprocessing_context=context
    )
    assert list(loader) == [record.query for record in records]


def test_threads_and_few_open_shards(folders, records, monkeypatch):
    monkeypatch.setattr(stream, "OPEN_SHARDS", 1)
    shards = ShardSet(folders)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        order = [i for _ in range(20) for i in (0, 40, 17, 29, 3)]
        assert list(pool.map(shards.read, order)) == [records[i] for i in order]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_pickle_keeps_records_and_order(folders, records):
    shards = ShardSet(folders)
    shards.read(0)
    assert pickle.loads(pickle.dumps(shards)).read(40) == records[40]
    order = LaneOrder(shards.shard_sizes, batch_size=8, seed=0, lanes=4)
    expected = order.indices(2, 1)
    assert (pickle.loads(pickle.dumps(order)).indices(2, 1) == expected).all()


def rewrite_header(path, row, change):
    offset = int(np.fromfile(path.with_suffix(".idx"), "<u8", row + 1)[row])
    with path.open("r+b") as file:
        file.seek(offset)
        info = tarfile.TarInfo.frombuf(file.read(512), "utf-8", "strict")
        change(info)
        file.seek(offset)
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
    return offset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: setattr(info, "type", tarfile.SYMTYPE), "is no plain .json file"),
        (lambda info: setattr(info, "name", "../up.json"), "'../up.json' is no plain .json file"),
        (lambda info: setattr(info, "name", "x.pickle"), "'x.pickle' is no plain .json file"),
        (lambda info: setattr(info, "size", 9999), "has 9999 bytes, the index leaves"),
        (lambda info: setattr(info, "size", 7), "invalid JSON"),
    ],
)
def test_bad_members_are_named(folders, change, message):
    path = folders[1] / "other-000000.tar"
    offset = rewrite_header(path, 4, change)
    shards = ShardSet(folders)
    assert shards.read(30 + 3).query == "b 3"
    where = rf"other-000000\.tar: record 4 at byte {offset}: "
    with pytest.raises(UserError, match=rf"{where}its checksum differs.*write the shards again"):
        shards.read(30 + 4)
    with pytest.raises(UserError, match=rf"{where}.*{message}.*write the shards again"):
        verify(folders[1])


def test_a_shard_that_is_cut_while_it_is_open(folders):
    tar = folders[1] / "other-000000.tar"
    shards = ShardSet(folders)
    shards.read(30)
    os.truncate(tar, 1000)
    with pytest.raises(UserError, match=r"record 1 at byte 1024: truncated: 0 of \d+ bytes"):
        shards.read(31)


def test_a_record_that_a_stranger_wrote(tmp_path, monkeypatch):
    """Its checksum fits, its keys do not."""
    with monkeypatch.context() as patch:
        patch.setattr(Record, "to_json", lambda self: {"query": self.query, "later": 1})
        write_shards(sample(2, "a"), tmp_path / "a")
    with pytest.raises(UserError, match=r"train-000000\.tar: record 1: no record of this version"):
        ShardSet([tmp_path / "a"]).read(1)


def test_no_folder_given():
    with pytest.raises(UserError, match="no folder of shards was given"):
        ShardSet([])


@st.composite
def orders(draw):
    """Arguments of an order: sizes of shards, and numbers that fit them."""
    lanes = draw(st.integers(1, 12))
    batch_size = lanes * draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 200), min_size=1, max_size=6))
    sizes[0] += max(0, batch_size - sum(sizes))
    options = {name: draw(st.integers(1, 40)) for name in ("block", "window")}
    return sizes, {
        "batch_size": batch_size,
        "lanes": lanes,
        "seed": draw(st.integers(0, 99)),
    } | options


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(0, 3))
def test_an_epoch_holds_each_record_at_most_once(arguments, epoch):
    sizes, options = arguments
    order = LaneOrder(sizes, **options)
    batches = [order.indices(epoch, batch) for batch in range(order.batches_per_epoch)]
    assert all(batch.shape == (options["lanes"], order.per_lane) for batch in batches)
    seen = np.concatenate([batch.ravel() for batch in batches])
    assert len(seen) == sum(sizes) // options["batch_size"] * options["batch_size"]
    assert len(np.unique(seen)) == len(seen)
    assert 0 <= seen.min() <= seen.max() < sum(sizes)


@settings(max_examples=60, deadline=None)
@given(orders(), st.data())
def test_any_world_size_and_any_restart_give_the_same_batch(arguments, data):
    sizes, options = arguments
    running = LaneOrder(sizes, **options)
    epoch, batch = (
        data.draw(st.integers(0, 2)),
        data.draw(st.integers(0, running.batches_per_epoch - 1)),
    )
    for earlier in range(batch):
        running.indices(epoch, earlier)
    whole = running.indices(epoch, batch)
    restarted = LaneOrder(sizes, **options)
    for world in (1, 2, 3, 4, 8):
        if world > options["lanes"]:
            continue
        parts = [restarted.rank_indices(epoch, batch, rank, world) for rank in range(world)]
        for rank, part in enumerate(parts):
            rows = [whole[lane] for lane in range(rank, options["lanes"], world)]
            assert part.tolist() == np.concatenate(rows).tolist()
        assert sorted(np.concatenate(parts)) == sorted(whole.ravel())


def test_the_order_is_pinned():
    """These numbers may never change: a resumed run would read other data."""
    order = LaneOrder([10, 7, 12], batch_size=6, seed=5, lanes=3, block=4, window=4)
    assert order.indices(0, 0).tolist() == [[27, 22], [26, 25], [14, 10]]
    assert order.indices(1, 3).tolist() == [[0, 24], [3, 20], [8, 15]]


def test_epochs_and_seeds_differ_and_leave_out_other_records():
    order = LaneOrder([500, 500], batch_size=64, seed=1)
    epochs = [
        np.concatenate([order.indices(e, b).ravel() for b in range(order.batches_per_epoch)])
        for e in range(4)
    ]
    assert not (epochs[0] == epochs[1]).all()
    left_out = [frozenset(range(1000)) - set(epoch.tolist()) for epoch in epochs]
    assert all(len(left) == 1000 % 64 for left in left_out)
    assert len(set(left_out)) == 4
    other = LaneOrder([500, 500], batch_size=64, seed=2)
    assert not (other.indices(0, 0) == order.indices(0, 0)).all()


def test_a_lane_reads_whole_blocks_of_one_shard():
    block, window = 16, 32
    sizes = [1600, 1600]
    order = LaneOrder(sizes, batch_size=32, seed=3, lanes=4, block=block, window=window)
    lane = np.concatenate([order.indices(0, b)[1] for b in range(order.batches_per_epoch)])
    for start in range(0, len(lane), window):
        part = np.sort(lane[start : start + window])
        runs = np.split(part, np.flatnonzero(np.diff(part) != 1) + 1)
        assert len(runs) <= window // block + 1  # a window starts inside a block at most once
        assert len(part) == window or start + window > len(lane)


def test_records_of_one_topic_are_spread_over_batches():
    """100 topics of 100 records in file order: a batch of 64 holds many topics, as a random one
    would (48 expected)."""
    order = LaneOrder([10_000], batch_size=64, seed=0)
    topics = [len(set(order.indices(0, b).ravel() // 100)) for b in range(order.batches_per_epoch)]
    assert np.mean(topics) > 35


def test_ten_million_records_start_at_once():
    start = time.perf_counter()
    order = LaneOrder([50_000] * 200, batch_size=2048, seed=0)
    order.indices(7, order.batches_per_epoch - 1)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 128}, "has 100 records, fewer than one batch of 128"),
        ({"batch_size": 100}, "batch_size 100 is no multiple of the 64 lanes; take 64 or 128"),
        ({"batch_size": 8}, "batch_size 8 is no multiple of the 64 lanes; take 64"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": 64, "window": 0}, "window is 0"),
        ({"batch_size": 64, "seed": -1}, "seed is -1; it must not be negative"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        LaneOrder([60, 40], **{"seed": 0} | options)


def test_too_many_ranks_and_batches():
    order = LaneOrder([100], batch_size=8, seed=0, lanes=4)
    with pytest.raises(UserError, match="5 ranks cannot share 4 lanes; take lanes >= 5"):
        order.rank_indices(0, 0, 0, 5)
    with pytest.raises(IndexError):
        order.indices(0, order.batches_per_epoch)
