"""Batches for language models: windows, epochs, stored token ids, any ranks and workers."""

from __future__ import annotations

import pickle
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

from drama.data.manifest import read_manifest
from drama.data.mixture import Mixture
from drama.data.order import LaneOrder
from drama.data.records import Document, Record
from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.shards import to_jsonl
from drama.data.sources import Source
from drama.data.stream import ShardSet
from drama.data.texts import RankTexts, TextBatch
from drama.data.writer import write_shards
from drama.errors import UserError
from drama.testing import byte_tokenizer
from drama.tokenizer import TextEncoder, load_tokenizer

BATCH, LANES, LONGEST = 16, 8, 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_record(number: int) -> Record:
    """Texts of up to about 130 tokens of source b and without one, and pairs of source a. No part
    of a text comes twice."""

    def document(part: int) -> Document:
        return Document(" ".join(f"{number}/{part}/{word}" for word in range(1 + number % 17)))

    if number % 3 == 0:
        positives = tuple(document(part) for part in range(3))
        return Record(f"query {number}", positives, (Document("negative"),), source="a")
    return Record("", (document(0),), source="b" if number % 3 == 1 else "")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("batches")
    records = sorted(map(make_record, range(120)), key=lambda record: record.source)
    write_shards(records, folder / "text", shard_bytes=30_000)
    to_jsonl([folder / "text"], folder / "x.jsonl")
    options = ShardingOptions(
        shard_bytes=60_000, tokenizer=str(model), document_prefix="D: ", max_tokens=1000
    )
    shard_sources([Source(str(folder / "x.jsonl"), "")], folder / "tokens", options)
    return {name: folder / name for name in ("text", "tokens")}


def batches(
    folders: dict[str, Path], model: Path, name: str, mixed: bool = False, **changes: Any
) -> RankTexts:
    shards = ShardSet([folders[name]])
    sizes: dict[str, Any] = {"batch_size": BATCH, "seed": 3, "lanes": LANES, "block": 4}
    order: Any = LaneOrder([len(shards)], window=8, **sizes)
    if mixed:
        order = Mixture(shards.shards, weights={"a": 2, "b": 1}, window=8, **sizes)
    settings = {"rank": 0, "world_size": 1, "seed": 3, "max_tokens": LONGEST}
    prefix = changes.pop("document_prefix", "D: ")
    # the query prefix is another one than that of the shards: no query is read
    encode = TextEncoder(load_tokenizer(model), "another: ", prefix)
    return RankTexts(shards, order, encode, **(settings | changes))


def as_lists(batch: TextBatch) -> list[tuple[Any, ...]]:
    numbers = (part.tolist() for part in (batch.source_B, batch.index_B, batch.epoch_B))
    return list(zip(batch.rows.tolist(), *numbers, strict=True))


def test_stored_token_ids_give_the_same_batches(folders: dict[str, Path], model: Path) -> None:
    stored, text = (batches(folders, model, name) for name in ("tokens", "text"))
    assert (stored.no_tokens, text.no_tokens) == ("", "the shards hold no token ids")
    assert stored.sources == ["(none)", "a", "b"]
    for step in range(2 * stored.order.batches_per_epoch):
        assert as_lists(stored[step]) == as_lists(text[step])
        assert stored[step].num_tokens == sum(map(len, stored[step].rows))
    assert "other prefixes" in batches(folders, model, "tokens", document_prefix="").no_tokens
    assert "were cut at 1000" in batches(folders, model, "tokens", max_tokens=1001).no_tokens


def test_rows_are_whole_documents_or_windows_of_them(folders: dict[str, Path], model: Path) -> None:
    made = batches(folders, model, "tokens")
    encode, eos = made.tokenize, made.tokenize.tokenizer.eos_token_id
    starts: dict[int, set[int]] = defaultdict(set)
    drawn: dict[int, set[int]] = defaultdict(set)
    ends = 0
    for step in range(12 * made.order.batches_per_epoch):
        batch = made[step]
        assert len(batch.rows) == BATCH
        for row, source, index, epoch in as_lists(batch):
            record = made.shards.read(index)
            assert made.sources[source] == (record.source or "(none)")
            assert epoch == step // made.order.batches_per_epoch
            texts = [document.full_text for document in record.positives]
            wholes = encode(texts, "document", 10**9)[0]
            places = [
                (number, start)
                for number, whole in enumerate(wholes)
                for start in range(len(whole) - len(row) + 1)
                if whole[start : start + len(row)] == row
            ]
            ((number, start),) = places
            whole = wholes[number]
            assert len(row) == min(len(whole), LONGEST)
            assert row[-1] == eos or len(whole) > LONGEST
            ends += len(whole) > LONGEST and row[-1] == eos
            drawn[index].add(number)
            if len(whole) > 2 * LONGEST:
                starts[index].add(start)
    assert sum(len(numbers) == 3 for numbers in drawn.values()) > 30  # all positives of a pair
    assert np.mean([len(found) for found in starts.values()]) > 5  # another window each epoch
    assert ends  # the last window is drawn too


def test_a_window_is_a_function_of_seed_epoch_and_record(
    folders: dict[str, Path], model: Path
) -> None:
    row = list(range(1000))
    made, other = (batches(folders, model, "text", seed=seed) for seed in (3, 4))

    def window(row: list[int], index: int, epoch: int, texts: RankTexts = made) -> list[int]:
        return list(texts._window(row, index, epoch))

    starts = {window(row, index, epoch)[0] for index in range(100) for epoch in range(3)}
    assert len(starts) > 200
    assert max(starts) <= 960
    assert window(row, 5, 1) == window(row, 5, 1)
    assert window(row, 5, 1) != window(row, 5, 1, other)
    # numpy keeps the words of Philox, so a run goes on with another version of it
    assert [window(row, index, 1)[0] for index in (5, 6, 2**40)] == [866, 207, 13]
    assert [window(row[:n], 5, 1) for n in (39, 40)] == [row[:39], row[:40]]
    assert {window(row[:41], i, 0)[0] for i in range(50)} == {0, 1}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["text", "tokens"])
def test_a_global_batch_is_the_same_for_any_ranks_and_workers(
    folders: dict[str, Path], model: Path, name: str, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    steps = range(6, 9)  # into the second epoch
    alone = batches(folders, model, name, mixed)
    whole = [sorted(as_lists(alone[step])) for step in steps]
    assert all(len(rows) == BATCH for rows in whole)
    for world in (1, 2, 4):
        for workers in (0, 2) if world < 4 else (0,):
            shares = [
                DataLoader(
                    batches(folders, model, name, mixed, rank=rank, world_size=world),
                    batch_size=None,
                    sampler=steps,
                    num_workers=workers,
                    multiprocessing_context="fork" if workers else None,
                )
                for rank in range(world)
            ]
            for parts, rows in zip(zip(*shares, strict=True), whole, strict=True):
                assert len({len(part.rows) for part in parts}) == 1
                assert sorted(row for part in parts for row in as_lists(part)) == rows


def test_a_mixture_over_texts_keeps_its_shares(folders: dict[str, Path], model: Path) -> None:
    made = batches(folders, model, "tokens", mixed=True)
    counts: Counter[str] = Counter()
    for step in range(60):
        counts.update(made.sources[number] for number in made[step].source_B.tolist())
    assert counts.total() == 60 * BATCH
    for name, share in (("a", 1 / 2), ("b", 1 / 4), ("(none)", 1 / 4)):
        assert abs(counts[name] - share * 60 * BATCH) < 2


def test_rows_without_anything_to_predict_are_left_out(tmp_path: Path, model: Path) -> None:
    tokenizer = load_tokenizer(model)
    write_shards([Record("", (Document(f"text {i}"),)) for i in range(8)], tmp_path / "out")
    shards = ShardSet([tmp_path / "out"])
    order = LaneOrder([8], batch_size=8, seed=0, lanes=1)
    made = RankTexts(
        shards, order, TextEncoder(tokenizer), rank=0, world_size=1, seed=0, max_tokens=4
    )
    rows = [[1], [], [1, 2], [1, 2, 3, 4, 5, 6], [1], [1, 2, 3], [7, 8], [9]]
    made._tokenised = lambda *_: rows  # type: ignore[method-assign]
    batch = pickle.loads(pickle.dumps(made[0]))
    numbers = order.rank_records(0, 0, 1)[0]
    assert [len(row) for row in batch.rows] == [2, 4, 3, 2]
    assert batch.index_B.tolist() == numbers[[2, 3, 5, 6]].tolist()
    assert len(batch.source_B) == len(batch.epoch_B) == 4
    rows[:] = [[1]] * 8
    assert len(made[0].rows) == 0
    with pytest.raises(UserError, match="max_tokens is 1"):
        RankTexts(shards, order, TextEncoder(tokenizer), rank=0, world_size=1, seed=0, max_tokens=1)


def test_a_damaged_text_ends_the_run_or_is_reported(tmp_path: Path, model: Path) -> None:
    write_shards([Record("", (Document(f"text {i}"),)) for i in range(8)], tmp_path / "out")
    tar = tmp_path / "out" / read_manifest(tmp_path / "out").shards[0].file
    content = bytearray(tar.read_bytes())
    content[content.index(b"text 3")] ^= 1
    tar.write_bytes(content)
    settings: dict[str, Any] = {"rank": 0, "world_size": 1, "seed": 0, "max_tokens": 4}
    shards, encode = ShardSet([tmp_path / "out"]), TextEncoder(load_tokenizer(model))
    order = LaneOrder([8], batch_size=8, seed=0, lanes=1)
    with pytest.raises(UserError, match="record 3 "):
        RankTexts(shards, order, encode, **settings)[0]
    batch = RankTexts(shards, order, encode, on_bad="skip", **settings)[0]
    assert [bad.index for bad in batch.bad] == [3]
    assert sorted(batch.index_B.tolist()) == [0, 1, 2, 4, 5, 6, 7]


def test_every_window_begins_as_a_text_does(folders: dict[str, Path], tmp_path: Path) -> None:
    """With a tokenizer that puts BOS in front: language models expect it at the first place."""
    tokenizer = byte_tokenizer()
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    tokenizer.save_pretrained(tmp_path)
    texts = batches(folders, tmp_path, "text")
    plain = batches(folders, tmp_path, "text", max_tokens=10_000)
    cut = 0
    for step in range(texts.order.batches_per_epoch):
        for short, whole in zip(texts[step].rows, plain[step].rows, strict=True):
            assert short[0] == begin
            assert len(short) == min(LONGEST, len(whole))
            assert begin not in short[1:]
            inside = whole.tolist()
            assert any(
                inside[i : i + len(short) - 1] == short[1:].tolist() for i in range(len(inside))
            )
            cut += len(whole) > LONGEST
    assert cut > 10


def test_a_rank_without_records_has_an_empty_batch(folders: dict[str, Path], model: Path) -> None:
    class One:
        batches_per_epoch = 1

        def rank_records(self, step: int, rank: int, world: int) -> tuple[Any, Any]:
            own = np.arange(1)[rank::world]
            return own, np.zeros_like(own)

    for name in ("text", "tokens"):
        texts = batches(folders, model, name, rank=1, world_size=2)
        texts.order = One()
        batch = texts[0]
        assert (len(batch.rows), batch.num_tokens, batch.source_B.tolist()) == (0, 0, [])
