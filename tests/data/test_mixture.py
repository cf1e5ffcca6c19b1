from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.data import mixture as module
from drama.data.manifest import Shard
from drama.data.mixture import Mixture, training_order
from drama.data.order import LaneOrder
from drama.data.records import Document, Record
from drama.data.shards import merge
from drama.data.stream import ShardSet
from drama.data.writer import write_manifest, write_shards
from drama.errors import UserError


def shard(number: int, source: str, records: int, lang: str = "", sha256: str = "") -> Shard:
    sha256 = sha256 or f"{source} {lang} {number}"
    return Shard(f"x-{number:06d}.tar", 1, sha256, "", records, source, lang)


#: interleaved, as merged folders are
SHARDS = [shard(0, "a", 300), shard(1, "b", 50), shard(2, "a", 120), shard(3, "c", 900)]
RANGES = {"a": [*range(300), *range(350, 470)], "b": range(300, 350), "c": range(470, 1370)}


def mixture(shards: list[Shard] = SHARDS, **changes: Any) -> Mixture:
    options: dict[str, Any] = {
        "batch_size": 48,
        "seed": 7,
        "weights": {"a": 2.0, "b": 1.0, "c": 3.0},
        "lanes": 16,
        "block": 8,
        "window": 32,
    }
    return Mixture(shards, **(options | changes))


def source_of(numbers: np.ndarray) -> Counter[str]:
    names = {n: name for name, part in RANGES.items() for n in part}
    return Counter(names[n] for n in numbers.tolist())


def test_each_batch_has_its_size_and_nearly_the_shares() -> None:
    order = mixture()
    total: Counter[str] = Counter()
    for step in range(200):
        counts = source_of(order.rank_records(step, 0, 1)[0])
        assert counts.total() == 48
        for name, share in (("a", 2 / 6), ("b", 1 / 6), ("c", 3 / 6)):
            assert abs(counts[name] - 48 * share) < 1
        total += counts
    assert abs(total["b"] / total.total() - 1 / 6) < 0.002


def test_shares_that_are_no_whole_numbers_come_out_in_the_mean() -> None:
    order = mixture(weights={"a": 1.0, "b": 0.013, "c": 3.0})
    counts = sum((source_of(order.rank_records(s, 0, 1)[0]) for s in range(3000)), Counter())
    expected = 48 * 3000 * 0.013 / 4.013
    assert abs(counts["b"] - expected) < 4 * np.sqrt(expected)


@settings(max_examples=30, deadline=None)
@given(
    weights=st.fixed_dictionaries({n: st.floats(0.05, 20) for n in "abc"}),
    sizes=st.lists(st.integers(60, 400), min_size=3, max_size=3),
    batch_size=st.integers(1, 30),
    one_source=st.booleans(),
)
def test_a_source_gives_each_record_once_an_epoch(
    weights: dict[str, float], sizes: list[int], batch_size: int, one_source: bool
) -> None:
    shards = [shard(i, name, size) for i, (name, size) in enumerate(zip("abc", sizes, strict=True))]
    order = mixture(shards, weights=weights, batch_size=batch_size, one_source=one_source)
    given_: dict[str, list[tuple[int, int]]] = {"a": [], "b": [], "c": []}
    ends = np.cumsum(sizes)
    for step in range(120):
        numbers, epochs = order.rank_records(step, 0, 1)
        assert len(numbers) == batch_size
        names = ["abc"[int(np.searchsorted(ends, n, side="right"))] for n in numbers]
        if one_source:
            assert len(set(names)) == 1
        for name, number, epoch in zip(names, numbers.tolist(), epochs.tolist(), strict=True):
            given_[name].append((epoch, number))
    for group, (name, pairs) in zip(order.groups, given_.items(), strict=True):
        assert len(set(pairs)) == len(pairs)  # never twice in an epoch
        assert len(pairs) == order.positions(120)[order.groups.index(group)]
        by_epoch = Counter(epoch for epoch, _ in pairs)
        for epoch in range(max(by_epoch, default=0)):  # whole but for what no lane can take
            assert by_epoch[epoch] == group.per_epoch
            assert sum(group.sizes) - group.per_epoch < group.order.lanes
        assert order.epochs(120)[name] == round(len(pairs) / group.per_epoch, 4)


@pytest.mark.parametrize("one_source", [False, True])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_any_world_size_and_any_start_give_the_same_batches(world: int, one_source: bool) -> None:
    running = mixture(one_source=one_source)
    for step in (0, 1, 5, 17):
        whole = running.rank_records(step, 0, 1)
        fresh = mixture(one_source=one_source)
        parts = [fresh.rank_records(step, rank, world) for rank in range(world)]
        for column in (0, 1):
            assert np.concatenate([part[column] for part in parts]).tolist() == (
                whole[column].tolist()
            )
        sizes = [len(part[0]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        again = pickle.loads(pickle.dumps(running)).rank_records(step, 0, 1)
        assert again[0].tolist() == whole[0].tolist()


def test_positions_are_sums_of_counts_far_into_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAWS", 7)
    order = mixture()
    summed = np.zeros(3, int)
    for step in range(40):
        assert mixture().positions(step).tolist() == order.positions(step).tolist()
        assert order.positions(step).tolist() == summed.tolist()
        counts = source_of(order.rank_records(step, 0, 1)[0])
        summed += [counts[name] for name in "abc"]


def test_the_mixture_is_pinned() -> None:
    """These numbers may never change: a resumed run would read other data."""
    order = mixture(batch_size=6, lanes=3)
    assert order.rank_records(0, 0, 1)[0].tolist() == [181, 328, 861, 5, 657, 893]
    assert order.rank_records(5001, 0, 1)[0].tolist() == [56, 614, 67, 586, 302, 651]


def test_a_resumed_mixture_is_the_one_that_never_stopped() -> None:
    running, resumed = mixture(), mixture()
    assert resumed.resume(running.state(33), 33) == []
    for step in (33, 90):
        assert resumed.rank_records(step, 0, 1)[0].tolist() == (
            running.rank_records(step, 0, 1)[0].tolist()
        )
    assert resumed.state(90) == running.state(90)


def test_sources_may_be_added_and_weighed_anew_between_runs() -> None:
    before = mixture()
    state = before.state(20)
    more = [*SHARDS, shard(4, "d", 500)]
    after = mixture(more, weights={"a": 1.0, "b": 1.0, "c": 1.0, "d": 5.0})
    notes = after.resume(state, 20)
    assert "d is new" in notes
    assert any(note.startswith("a has the share 0.125, it was 0.3333") for note in notes)
    seen = [before.rank_records(step, 0, 1) for step in range(20)]
    seen += [after.rank_records(step, 0, 1) for step in range(20, 45)]
    pairs = [
        (n, e)
        for numbers, epochs in seen
        for n, e in zip(numbers.tolist(), epochs.tolist(), strict=True)
    ]
    assert len(set(pairs)) == len(pairs)  # nothing came twice in an epoch of its source
    for group in after.groups:  # and nothing was jumped over
        position = after.positions(45)[after.groups.index(group)]
        first_epoch = {n for n, e in pairs if e == 0} & set(
            np.concatenate(
                [
                    np.arange(start, start + size)
                    for start, size in zip(group.starts, group.sizes, strict=True)
                ]
            ).tolist()
        )
        assert len(first_epoch) == min(position, group.per_epoch)
    # and it can be stopped and taken up once more
    again = mixture(more, weights={"a": 1.0, "b": 1.0, "c": 1.0, "d": 5.0})
    assert again.resume(after.state(60), 60) == []
    assert again.rank_records(61, 0, 1)[0].tolist() == after.rank_records(61, 0, 1)[0].tolist()


def test_a_source_whose_records_were_replaced_starts_anew() -> None:
    state = mixture().state(20)
    other = [*SHARDS[:3], shard(3, "c", 900, sha256="other")]
    after = mixture(other)
    assert after.resume(state, 20) == ["c has other records, it starts anew"]
    assert after.positions(20).tolist() == [state["now"]["a"], state["now"]["b"], 0]
    dropped = mixture(SHARDS[:3], weights={"a": 1.0, "b": 1.0})
    assert "c is left out" in dropped.resume(state, 20)


LANGUAGES = [
    shard(0, "web", 8000, "en"), shard(1, "web", 500, "sw"), shard(2, "qa", 1000, "en")
]  # fmt: skip


def test_languages_share_by_the_power_of_their_share() -> None:
    """Conneau et al., "Unsupervised Cross-lingual Representation Learning at Scale", 3.1."""
    order = mixture(LANGUAGES, weights={"web": 1.0, "qa": 1.0}, language_alpha=0.3)
    assert [group.name for group in order.groups] == ["qa [en]", "web [en]", "web [sw]"]
    swahili, english = 0.5 * 500 / 8500, 0.5 + 0.5 * 8000 / 8500
    expected = swahili**0.3 / (swahili**0.3 + english**0.3)
    assert order.shares_G[2] == pytest.approx(expected)
    assert order.shares_G[0] / order.shares_G[1] == pytest.approx(0.5 / (0.5 * 8000 / 8500))
    flat = mixture(LANGUAGES, weights={}, language_alpha=1.0)
    assert flat.shares_G * 9500 == pytest.approx([1000, 8000, 500])
    even = mixture(LANGUAGES, weights={}, language_alpha=0.0)
    assert even.shares_G[2] == pytest.approx(0.5)


def test_one_source_a_batch_is_drawn_with_its_weight() -> None:
    order = mixture(one_source=True)
    counts: Counter[str] = Counter()
    for step in range(2000):
        (name,) = source_of(order.rank_records(step, 0, 1)[0])
        counts[name] += 1
    expected = {"a": 2000 * 2 / 6, "b": 2000 / 6, "c": 1000.0}
    chi2 = sum((counts[name] - mean) ** 2 / mean for name, mean in expected.items())
    assert chi2 < 14  # 2 degrees of freedom: 1 in 1,100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"a": 1.0, "x": 1.0}}, "names the source 'x', which the shards do not hold"),
        ({"weights": {"a": 1.0, "b": 99.0}, "batch_size": 90},
         "source b has 50 records, fewer than its part of one batch, 89; lower its weight"),
        ({"one_source": True, "batch_size": 64}, "source b has 50 records.* 64"),
    ],
)  # fmt: skip
def test_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixture(**changes)


def test_ranks_beyond_the_batch_and_steps_before_the_start() -> None:
    order = mixture(batch_size=4)
    with pytest.raises(UserError, match="5 ranks cannot share batches of 4"):
        order.rank_records(0, 0, 5)
    order.resume(mixture(batch_size=4, weights={"a": 1.0}).state(9), 9)
    with pytest.raises(IndexError, match="before this mixture began, at 9"):
        order.positions(8)


def test_weights_in_the_shards_make_a_mixture(tmp_path: Path) -> None:
    records = {
        name: [Record(f"{name} {i}", (Document(f"text {i}"),), source=name) for i in range(40)]
        for name in "ab"
    }
    write_shards([*records["a"], *records["b"]], tmp_path / "plain")
    options: dict[str, Any] = {
        "batch_size": 8, "seed": 0, "lanes": 4, "block": 4, "window": 8,
        "one_source": False, "language_alpha": None,
    }  # fmt: skip
    plain = ShardSet([tmp_path / "plain"])
    assert isinstance(training_order(plain, weights={}, **options), LaneOrder)
    given_ = training_order(plain, weights={"a": 3.0}, **options)
    assert isinstance(given_, Mixture)
    assert given_.shares_G.tolist() == [0.75, 0.25]  # one that is not named has weight 1
    for name, weight in (("heavy", 3.0), ("light", 0.5)):
        manifest = write_shards(records["a"], tmp_path / name)
        write_manifest(tmp_path / name, replace(manifest, weights={"a": weight}))
    write_shards(records["b"], tmp_path / "b")
    both = ShardSet([tmp_path / "heavy", tmp_path / "b"])
    found = training_order(both, weights={}, **options)
    assert isinstance(found, Mixture)
    assert found.shares_G.tolist() == [0.75, 0.25]
    differ = ShardSet([tmp_path / "heavy", tmp_path / "light", tmp_path / "b"])
    with pytest.raises(UserError, match=r"source 'a' the weights 3 and 0\.5; set data\.weights"):
        training_order(differ, weights={}, **options)
    assert isinstance(training_order(differ, weights={"a": 1.0}, **options), Mixture)
    with pytest.raises(UserError, match=r"source 'a' has weight 3 and 0\.5"):
        merge([tmp_path / "heavy", tmp_path / "light"], tmp_path / "merged")


def test_an_epoch_of_a_small_source_leaves_out_few_records() -> None:
    for records in range(64, 2000, 7):
        (group,) = mixture([shard(0, "a", records)], weights={}, lanes=64, batch_size=1).groups
        assert 0 <= records - group.per_epoch <= 0.03 * records
