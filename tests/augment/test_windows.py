"""Rank windows and the positive-aware filter against a reference that is slow and plain."""

import random

import pytest

from drama.augment.windows import (
    COPY,
    MINING,
    NEAR,
    OWN,
    PAPER,
    RERANK,
    Windows,
    choose,
    choose_negatives,
    parse_ranks,
    spell_ranks,
)
from drama.errors import UserError


def reference(windows, texts, scores, own):
    """By the words of the paper and of the docstring: rank by rank, every pair compared."""
    ranked = list(enumerate(zip(texts, scores, strict=True), 1))
    low, high = windows.positives
    positives = []
    for rank, (text, score) in ranked:
        if not low <= rank <= high or (windows.own == "out" and text == own):
            continue
        if not any(text == other for _, other, _ in positives):
            positives.append((rank, text, score))
    if not positives:
        return [], []
    lowest = min(score for _, _, score in positives)
    negatives = []
    low, high = windows.negatives
    for rank, (text, score) in ranked:
        if not low <= rank <= high or text == own:
            continue
        if any(text == other for _, other, _ in positives + negatives):
            continue
        if windows.share is not None and lowest > 0 and score > windows.share * lowest:
            continue
        negatives.append((rank, text, score))
    return [rank - 1 for rank, _, _ in positives], [rank - 1 for rank, _, _ in negatives]


@pytest.mark.parametrize("seed", range(40))
def test_against_the_reference(seed):
    draw = random.Random(seed)
    first = draw.randint(1, 5)
    last = draw.randint(first, 12)
    begin = draw.randint(last + 1, 30)
    windows = Windows(
        depth=50,
        positives=(first, last),
        negatives=(begin, draw.randint(begin, 50)),
        share=draw.choice([None, 0.8, 0.95, 1.0]),
        own=draw.choice(["ranked", "out"]),
    )
    length = draw.choice([0, 3, 20, 50])
    texts = [draw.randrange(draw.choice([15, 1000])) for _ in range(length)]
    scores = sorted((draw.random() for _ in range(length)), reverse=draw.random() < 0.7)
    own = draw.choice([*texts, -1]) if texts else -1
    chosen = choose(windows, texts, scores, own)
    assert (chosen.positives, chosen.negatives) == reference(windows, texts, scores, own)
    assert chosen.own_rank == (texts.index(own) + 1 if own in texts else 0)
    if chosen.positives:
        window = range(begin, min(windows.negatives[1], length) + 1)
        assert len(chosen.negatives) + chosen.left_out.total() == len(window)


def test_the_papers_windows():
    texts, scores = list(range(100, 150)), [1 - rank / 100 for rank in range(50)]
    chosen = choose(PAPER, texts, scores, own=102)
    assert chosen.positives == list(range(10))  # ranks 1 to 10, the own document among them
    assert chosen.negatives == list(range(29, 50))  # ranks 30 to 50
    assert chosen.own_rank == 3
    reranked = choose(RERANK, texts[:20], scores[:20], own=100)
    assert reranked.positives == [0]
    assert reranked.negatives == list(range(9, 20))


def test_the_own_document_is_never_a_negative_and_may_be_kept_out():
    texts, scores = list(range(50)), [1 - rank / 100 for rank in range(50)]
    chosen = choose(PAPER, texts, scores, own=35)
    assert 35 not in chosen.negatives
    assert chosen.left_out == {OWN: 1}
    out = Windows(own="out")
    assert choose(out, texts, scores, own=2).positives == [0, 1, *range(3, 10)]
    alone = Windows(depth=20, positives=(1, 1), negatives=(10, 20), own="out")
    assert choose(alone, texts[:20], scores[:20], own=0).positives == []


def test_copies_are_one_and_no_negatives_of_each_other():
    texts = [7, 7, 8, *range(20, 49), 7, 47, 20, 99]  # a negative and a positive come again
    texts += range(200, 200 + 50 - len(texts))
    chosen = choose(PAPER, texts, [0.5] * 50, own=7)
    assert chosen.positives[:2] == [0, 2]
    kept = [texts[place] for place in chosen.positives + chosen.negatives]
    assert len(set(kept)) == len(kept)
    assert chosen.left_out == {OWN: 1, COPY: 2}


def test_the_filter_is_of_the_lowest_positive_and_holds_for_negative_scores():
    windows = Windows(depth=6, positives=(1, 2), negatives=(3, 6), share=0.95)
    chosen = choose(windows, range(6), [0.9, 0.8, 0.77, 0.7600001, 0.76, 0.5], own=-1)
    assert chosen.negatives == [4, 5]  # 0.95 x 0.8 is 0.76, and only above it is too near
    assert chosen.left_out == {NEAR: 2}
    places, _ = choose_negatives(MINING, range(3), [-0.2, -0.209, -0.22], {9}, lowest=-0.2)
    assert places == [2]  # 5 % below -0.2 is -0.21


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": 40}, "negatives 30-50: ranks ascend from 1 to the depth, which is 40"),
        ({"positives": (0, 3)}, "positives 0-3: ranks ascend from 1"),
        ({"positives": (5, 3)}, "positives 5-3: ranks ascend"),
        ({"positives": (1, 30)}, "positives 1-30 must end before negatives 30-50 begin"),
        ({"share": 1.5}, "share 1.5: above 0 and at most 1"),
    ],
)
def test_windows_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        Windows(**given)


def test_ranks_are_read_and_written():
    assert [parse_ranks(text) for text in ("30-50", " 1 ", "2 - 3")] == [(30, 50), (1, 1), (2, 3)]
    assert parse_ranks(spell_ranks((30, 50))) == (30, 50)
    for text in ("", "a", "1-", "-3", "1-2-3", "1.5"):
        with pytest.raises(UserError, match="is no range; write FIRST-LAST"):
            parse_ranks(text)


def test_without_an_own_document_nothing_is_left_out_and_no_rank_is_told():
    windows = Windows(depth=6, positives=(1, 1), negatives=(3, 6), own="out")
    chosen = choose(windows, range(6), [0.9] * 6, own=None)
    assert (chosen.positives, chosen.negatives) == ([0], [2, 3, 4, 5])
    assert chosen.own_rank is None
