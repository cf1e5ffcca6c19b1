from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from drama.data.batches import RankBatch, RankBatches
from drama.data.order import LaneOrder
from drama.data.packing import count_chunks, even_chunks, pack
from drama.data.records import Document, Record, document_hash64
from drama.data.stream import ShardSet
from drama.data.writer import write_shards
from drama.testing import byte_tokenizer
from drama.tokenizer import TextEncoder, load_tokenizer

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40).map(sorted)

# -- packing and chunks ---------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=9), min_size=1, max_size=9))
def test_pack_lays_rows_side_by_side(rows: list[list[int]]) -> None:
    batch = pack(rows)
    assert batch.input_ids_T.dtype == batch.position_ids_T.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    ends = batch.cu_seqlens.tolist()
    assert ends[0] == 0
    assert len(ends) == len(rows) + 1
    assert ends[-1] == len(batch.input_ids_T) == len(batch.position_ids_T)
    for row, start, end in zip(rows, ends, ends[1:], strict=False):
        assert batch.input_ids_T[start:end].tolist() == row
        assert batch.position_ids_T[start:end].tolist() == list(range(len(row)))
    assert batch.lengths == tuple(map(len, rows))
    moved = batch.to("cpu")
    assert torch.equal(moved.input_ids_T, batch.input_ids_T)
    assert moved.lengths == batch.lengths


def test_pack_refuses_a_row_without_tokens() -> None:
    with pytest.raises(AssertionError, match="at least one token"):
        pack([[1], []])


def fewest_chunks(lengths: list[int], budget: int) -> int:
    """By dynamic programming: consecutive runs within the budget, or one row alone."""
    best = [0]
    for end in range(1, len(lengths) + 1):
        best.append(
            1 + min(
                best[start]
                for start in range(end)
                if start == end - 1 or sum(lengths[start:end]) <= budget
            )
        )  # fmt: skip
    return best[-1]


@given(LENGTHS, st.integers(1, 200))
def test_chunks_are_as_few_as_the_budget_allows(lengths: list[int], budget: int) -> None:
    assert count_chunks(lengths, budget) == fewest_chunks(lengths, budget)


@given(LENGTHS, st.integers(1, 50))
def test_every_row_is_in_exactly_one_of_n_consecutive_chunks(
    lengths: list[int], num_chunks: int
) -> None:
    chunks = even_chunks(lengths, num_chunks)
    assert len(chunks) == num_chunks
    assert [row for chunk in chunks for row in chunk] == list(range(len(lengths)))
    # a forward of nothing is run only where there is less than a row for every chunk
    assert sum(not chunk for chunk in chunks) == max(0, num_chunks - len(lengths))
    assert all(chunks[: len(lengths)])


@given(LENGTHS, st.integers(1, 200), st.integers(0, 5))
def test_no_chunk_exceeds_the_budget_but_a_row_longer_than_it(
    lengths: list[int], budget: int, more: int
) -> None:
    """Also where another rank needs more chunks than this one."""
    for chunk in even_chunks(lengths, count_chunks(lengths, budget) + more):
        assert sum(lengths[row] for row in chunk) <= max(budget, *lengths, 0)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8).map(sorted), st.integers(1, 9))
def test_the_largest_chunk_is_as_small_as_possible(lengths: list[int], num_chunks: int) -> None:
    optimum = min(
        max(sum(lengths[a:b]) for a, b in zip((0, *cuts), (*cuts, len(lengths)), strict=True))
        for count in range(min(num_chunks, len(lengths)))
        for cuts in combinations(range(1, len(lengths)), count)
    )
    chunks = even_chunks(lengths, num_chunks)
    assert max(sum(lengths[row] for row in chunk) for chunk in chunks) == optimum


# -- batches of a rank ----------------------------------------------------------------------------

NUM_RECORDS, LANES, BATCH = 70, 6, 12  # 5 batches an epoch, 10 records left out of each


def make_record(number: int) -> Record:
    """Record `number` has 1 to 3 positives and 0 to 4 negatives, every text of its own."""
    return Record(
        query=f"query {number}",
        positives=tuple(Document(f"positive {i} of {number}") for i in range(1 + number % 3)),
        negatives=tuple(
            Document(f"negative {i} of {number}", title="A title") for i in range(number % 5)
        ),
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "train"
    write_shards(map(make_record, range(NUM_RECORDS)), folder, shard_bytes=30_000)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def make(shards: Path, tokenizer: Any) -> Any:
    def batches(rank: int = 0, world_size: int = 1, **changes: Any) -> RankBatches:
        shard_set = ShardSet([shards])
        assert len(shard_set.shard_sizes) > 1
        order = LaneOrder(
            shard_set.shard_sizes, batch_size=BATCH, seed=3, lanes=LANES, block=4, window=8
        )
        settings: dict[str, Any] = {
            "seed": 3,
            "hard_negatives": 2,
            "max_query_tokens": 64,
            "max_document_tokens": 64,
        }
        return RankBatches(
            shard_set,
            order,
            TextEncoder(tokenizer, query_prefix="Q: ", document_prefix="D: "),
            rank=rank,
            world_size=world_size,
            **(settings | changes),
        )

    return batches


def decoded(batch: RankBatch, tokenizer: Any) -> tuple[list[str], list[str]]:
    """Query and document texts, prefixes included, EOS checked and dropped."""
    assert all(row[-1] == tokenizer.eos_token_id for row in batch.rows)
    texts = [tokenizer.decode(row[:-1]) for row in batch.rows]
    return texts[: batch.num_queries], texts[batch.num_queries :]


def by_query(batches: list[RankBatch], tokenizer: Any) -> dict[str, str]:
    """Query -> its positive, over several ranks' shares."""
    pairs: dict[str, str] = {}
    for batch in batches:
        queries, documents = decoded(batch, tokenizer)
        for query, positive in zip(queries, documents, strict=False):
            assert query not in pairs
            pairs[query] = positive
    return pairs


def same(a: RankBatch, b: RankBatch) -> bool:
    return (
        a.rows.tolist() == b.rows.tolist()
        and a.num_queries == b.num_queries
        and torch.equal(a.document_ids, b.document_ids)
        and a.num_cut == b.num_cut
    )


def test_positives_come_first_and_ids_belong_to_the_texts(make: Any, tokenizer: Any) -> None:
    for step in range(7):  # into the second epoch
        batch = make()[step]
        queries, documents = decoded(batch, tokenizer)
        assert batch.num_queries == len(queries) == BATCH
        assert len(batch.document_ids) == len(documents) == len(batch.rows) - BATCH
        assert batch.document_ids.dtype == torch.int64
        for query, positive in zip(queries, documents, strict=False):
            number = query.removeprefix("Q: query ")
            assert positive.startswith("D: positive ")
            assert positive.endswith(f" of {number}")
        known = {
            f"D: {d.title} {d.text}" if d.title else f"D: {d.text}": document_hash64(d.id)
            for record in map(make_record, range(NUM_RECORDS))
            for d in (*record.positives, *record.negatives)
        }
        assert batch.document_ids.tolist() == [known[text] for text in documents]


def test_negatives_are_the_record_s_own_up_to_the_number_asked_for(
    make: Any, tokenizer: Any
) -> None:
    queries, documents = decoded(make()[0], tokenizer)
    numbers = [int(query.removeprefix("Q: query ")) for query in queries]
    negatives = documents[BATCH:]
    assert len(set(negatives)) == len(negatives)
    for number in numbers:
        own = [text for text in negatives if text.endswith(f" of {number}")]
        assert all(text.startswith("D: A title negative ") for text in own)
        assert len(own) == min(2, number % 5)
    assert len(negatives) == sum(min(2, number % 5) for number in numbers)
    none = make(hard_negatives=0)[0]
    assert len(none.rows) == 2 * BATCH


def test_draws_vary_by_epoch_and_not_by_call(make: Any, tokenizer: Any) -> None:
    batches = make()
    per_epoch = batches.order.batches_per_epoch
    assert per_epoch == 5
    seen: dict[str, set[str]] = {}
    positives: dict[str, set[str]] = {}
    for step in range(6 * per_epoch):
        batch = batches[step]
        queries, documents = decoded(batch, tokenizer)
        for query, positive in zip(queries, documents, strict=False):
            positives.setdefault(query, set()).add(positive)
        for text in documents[BATCH:]:
            seen.setdefault(text.rpartition(" of ")[2], set()).add(text)
    # records with more than they are asked for bring others in another epoch
    assert len(positives) == NUM_RECORDS
    for query, drawn in positives.items():
        assert len(drawn) <= 1 + int(query.removeprefix("Q: query ")) % 3
    several = [number for number in range(NUM_RECORDS) if number % 5 > 2]
    assert np.mean([len(seen[str(number)]) > 2 for number in several]) > 0.9
    assert all(len(seen[str(number)]) <= number % 5 for number in several)
    assert np.mean([len(positives[f"Q: query {n}"]) > 1 for n in range(2, 70, 3)]) > 0.9
    assert same(batches[0], make()[0])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("step", [0, 4, 5])
def test_the_global_batch_does_not_depend_on_the_world_size(
    make: Any, tokenizer: Any, world_size: int, step: int
) -> None:
    alone = make()[step]
    shares = [make(rank, world_size)[step] for rank in range(world_size)]
    assert {share.num_queries for share in shares} == {BATCH // world_size}
    assert by_query(shares, tokenizer) == by_query([alone], tokenizer)
    ids = sorted(id_ for share in shares for id_ in share.document_ids.tolist())
    assert ids == sorted(alone.document_ids.tolist())
    rows = sorted(tuple(row) for share in shares for row in share.rows)
    assert rows == sorted(map(tuple, alone.rows))


def load(batches: RankBatches, steps: range, workers: int) -> list[RankBatch]:
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    return list(loader)


def test_workers_and_restarts_do_not_change_the_batches(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    straight = load(make(1, 3), range(9), workers=0)
    with_workers = load(make(1, 3), range(9), workers=2)
    resumed = load(make(1, 3), range(6, 9), workers=2)
    assert len(straight) == len(with_workers) == 9
    assert all(map(same, straight, with_workers))
    assert all(map(same, straight[6:], resumed))
    assert not any(same(a, b) for a, b in pairwise(straight))


def test_another_seed_gives_other_batches(make: Any) -> None:
    assert not same(make()[0], make(seed=4)[0])


def test_cut_texts_are_counted_and_end_in_eos(make: Any, tokenizer: Any) -> None:
    whole = make()[0]
    assert whole.num_cut == 0
    cut = make(max_query_tokens=8, max_document_tokens=16)[0]
    queries, documents = whole.rows.tolist()[:BATCH], whole.rows.tolist()[BATCH:]
    too_long = sum(len(r) > 8 for r in queries) + sum(len(r) > 16 for r in documents)
    assert cut.num_cut == too_long > BATCH
    eos = tokenizer.eos_token_id
    for row, full in zip(cut.rows.tolist(), whole.rows.tolist(), strict=True):
        limit = 8 if full in queries else 16
        expected = full if len(full) <= limit else [*full[: limit - 1], eos]
        assert row == expected
