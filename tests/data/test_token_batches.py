"""Token ids out of the shards give what tokenising while training gives."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from drama.data.batches import RankBatch, RankBatches
from drama.data.draws import draw_documents, splitmix64
from drama.data.mixture import Mixture
from drama.data.order import LaneOrder
from drama.data.packing import TokenRows
from drama.data.records import Document, Record
from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.shards import to_jsonl
from drama.data.sources import Source
from drama.data.stream import ShardSet
from drama.data.writer import write_shards
from drama.errors import UserError
from drama.testing import byte_tokenizer
from drama.tokenizer import TextEncoder, load_tokenizer

COUNT = 90


def make_record(number: int) -> Record:
    positives = tuple(Document(f"positive {i} of {number}") for i in range(1 + number % 3))
    negatives = tuple(
        Document("so " * (number % 7) + f"negative {i} of {number}", title="A title")
        for i in range(number % 5)
    )
    scores = None
    if number % 2:
        scores = {d.id: 0.5 * i - number for i, d in enumerate((*positives, *negatives)) if i != 1}
    return Record(
        query=f"query {number} ä",
        positives=positives,
        negatives=negatives,
        prompt="Task: " if number % 4 == 0 else "",
        scores=scores,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokens")
    byte_tokenizer().save_pretrained(folder / "model")
    write_shards(map(make_record, range(COUNT)), folder / "text", shard_bytes=30_000)
    to_jsonl([folder / "text"], folder / "records.jsonl")
    options = ShardingOptions(
        shard_bytes=50_000,
        tokenizer=str(folder / "model"),
        query_prefix="Q: ",
        document_prefix="D: ",
        max_tokens=200,
    )
    source = Source(str(folder / "records.jsonl"), "")
    shard_sources([source], folder / "tokens", options)
    return {name: folder / name for name in ("model", "text", "tokens")}


def batches(folders: dict[str, Path], name: str, **changes: Any) -> RankBatches:
    shards = ShardSet([folders[name]])
    # one shard in the place of all: then the order does not depend on how many there are
    order = LaneOrder([len(shards)], batch_size=12, seed=3, lanes=6, block=4, window=8)
    settings: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "seed": 3,
        "hard_negatives": 2,
        "max_query_tokens": 64,
        "max_document_tokens": 64,
    }
    prefixes = {"query_prefix": changes.pop("query_prefix", "Q: "), "document_prefix": "D: "}
    encode = TextEncoder(load_tokenizer(folders["model"]), **prefixes)
    return RankBatches(shards, order, encode, **(settings | changes))


def same(a: RankBatch, b: RankBatch) -> None:
    assert a.rows.tolist() == b.rows.tolist()
    assert (a.num_queries, a.num_cut) == (b.num_queries, b.num_cut)
    for name in ("document_ids", "query_ids", "negatives_of"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.scores.nan_to_num(7e7), b.scores.nan_to_num(7e7))


@pytest.mark.parametrize("limits", [(64, 64), (11, 20), (9, 200)])
def test_token_ids_of_the_shards_are_those_of_tokenising(
    folders: dict[str, Path], limits: tuple[int, int]
) -> None:
    sizes = {"max_query_tokens": limits[0], "max_document_tokens": limits[1]}
    stored, fresh = (batches(folders, name, **sizes) for name in ("tokens", "text"))
    assert not stored.no_tokens
    assert fresh.no_tokens == "the shards hold no token ids"
    cut = 0
    for step in range(15):
        same(stored[step], fresh[step])
        cut += stored[step].num_cut
    assert (cut > 0) == (limits != (64, 64))
    assert not all(math.isnan(x) for x in stored[0].scores.tolist())


def test_ranks_share_out_the_same_batch(folders: dict[str, Path]) -> None:
    alone = batches(folders, "tokens")[2]
    shares = [batches(folders, "tokens", rank=rank, world_size=3)[2] for rank in range(3)]
    rows = [row for share in shares for row in share.rows.tolist()]
    assert sorted(rows) == sorted(alone.rows.tolist())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"query_prefix": "Other: "}, "with other prefixes"),
        ({"max_document_tokens": 201}, "were cut at 200"),
    ],
)
def test_token_ids_that_would_differ_are_not_used(
    folders: dict[str, Path], changes: dict[str, Any], why: str
) -> None:
    stored, fresh = (batches(folders, name, **changes) for name in ("tokens", "text"))
    assert why in stored.no_tokens
    same(stored[1], fresh[1])


def test_another_tokenizer_is_noticed(folders: dict[str, Path]) -> None:
    other = load_tokenizer(folders["model"])
    other.add_tokens(["positive"])
    stored = batches(folders, "tokens")
    encode = TextEncoder(other, "Q: ", "D: ")
    found = RankBatches(
        stored.shards, stored.order, encode, rank=0, world_size=1, seed=3, hard_negatives=2,
        max_query_tokens=64, max_document_tokens=64,
    )  # fmt: skip
    assert found.no_tokens == "the shards hold token ids of another tokenizer"


@pytest.mark.parametrize("name", ["text", "tokens"])
def test_bad_records_stop_the_run_or_are_left_out_and_named(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    sound = batches(folders, name)[0]
    indices, _ = batches(folders, name).order.rank_records(0, 0, 1)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folders[name].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    hurt = ShardSet([copy])
    index = int(indices[5])
    member = hurt.read_token_member(index) if name == "tokens" else hurt._member(index, 0)
    for path in copy.glob("*.tar"):
        content = path.read_bytes()
        if member in content:
            at = content.index(member) + 520
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    there = folders | {name: copy}
    with pytest.raises(UserError, match="its checksum differs"):
        batches(there, name)[0]
    batch = batches(there, name, on_bad="skip")[0]
    assert [(bad.index, bad.reason) for bad in batch.bad] == [(index, "damaged shard")]
    assert batch.num_queries == sound.num_queries - 1
    lost = sound.rows.tolist()[5]
    kept = sound.rows.tolist()[: sound.num_queries]
    kept.remove(lost)
    assert batch.rows.tolist()[: batch.num_queries] == kept
    for path in copy.glob("*.idx"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="every record of a batch is bad"):
        batches(there, name, on_bad="skip")[0]


def test_rows_pass_between_processes() -> None:
    rows = TokenRows.of([[1, 2, 3], [4], [], [5, 6]])
    again = pickle.loads(pickle.dumps(rows))
    assert again.tolist() == rows.tolist() == [[1, 2, 3], [4], [], [5, 6]]
    assert [row.tolist() for row in again[1:]] == [[4], [], [5, 6]]
    assert again[-1].tolist() == [5, 6]
    assert TokenRows.of([]).tolist() == []


def test_splitmix64_is_the_published_one() -> None:
    """First outputs of the reference generator for the seed 1234567 (its state goes up by the
    golden ratio's 64 bits)."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(5)], np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
        4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_draws_are_pinned_and_even() -> None:
    """These numbers may never change: a resumed run would train on other documents."""
    some = np.arange(4)
    drawn = draw_documents(5, np.zeros(4, int), some, some + 1, some * 2, 3)
    assert drawn.positive_B.tolist() == [0, 1, 1, 1]
    assert drawn.owner_M.tolist() == [1, 1, 2, 2, 2, 3, 3, 3]
    assert drawn.negative_M.tolist() == [0, 1, 2, 0, 3, 3, 5, 1]
    many = np.arange(6000)
    drawn = draw_documents(1, many % 7, many, np.full(6000, 4), np.full(6000, 6), 2)
    expected = {"positive": 1500, "negative": 2000}
    for name, values in (("positive", drawn.positive_B), ("negative", drawn.negative_M)):
        counts = np.bincount(values)
        chi2 = float(((counts - expected[name]) ** 2 / expected[name]).sum())
        assert chi2 < 25, (name, counts)  # 5 degrees of freedom: 1 in 7,000
    pairs = Counter(
        zip(drawn.negative_M[::2].tolist(), drawn.negative_M[1::2].tolist(), strict=True)
    )
    assert len(pairs) == 30
    assert all(first != second for first, second in pairs)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_global_batch_is_the_same_for_any_ranks_workers_and_restart(
    folders: dict[str, Path], mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    sizes: dict[str, Any] = {"batch_size": 16, "seed": 3, "lanes": 8, "block": 4, "window": 8}

    def share(rank: int, world: int) -> RankBatches:
        made = batches(folders, "tokens", rank=rank, world_size=world)
        if mixed:
            made.order = Mixture(made.shards.shards, weights={"": 1.0}, **sizes)
        else:
            made.order = LaneOrder(made.shards.shard_sizes, **sizes)
        return made

    alone = share(0, 1)
    whole = {step: sorted(alone[step].rows.tolist()) for step in (3, 4, 5)}
    for world in (1, 2, 3, 4, 8):
        for workers in (0, 1, 4) if world < 4 else (0, 1):
            for start in (3, 5):  # as if stopped before, by other numbers of both
                loaded = [
                    list(
                        DataLoader(
                            share(rank, world),
                            batch_size=None,
                            sampler=range(start, 6),
                            num_workers=workers,
                            multiprocessing_context="fork" if workers else None,
                        )
                    )
                    for rank in range(world)
                ]
                for number, step in enumerate(range(start, 6)):
                    rows = [row for part in loaded for row in part[number].rows.tolist()]
                    assert sorted(rows) == whole[step], (world, workers, start, step)


def test_only_damage_is_left_out(folders: dict[str, Path]) -> None:
    """A server that does not answer must not empty the batches."""
    made = batches(folders, "text", on_bad="skip")

    def away(index: int) -> Record:
        raise UserError("http://x cannot be read, 6 tries: 503")

    made.shards.read = away  # type: ignore[method-assign]
    with pytest.raises(UserError, match="503"):
        made[0]
