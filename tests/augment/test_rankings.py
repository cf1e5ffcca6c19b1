import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.augment.answers import Dropped, Reason
from drama.augment.rankings import Ranking, Windows, parse_labels, parse_ranking


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[3] > [1] > [2] > [4]", Ranking((2, 0, 1, 3), 4)),
        ("3 > 1 > 2 > 4", Ranking((2, 0, 1, 3), 4)),
        ("**[3] > [1] > [2] > [4]**", Ranking((2, 0, 1, 3), 4)),
        ("The 4 passages in order:\n[3] > [1] > [2] > [4]", Ranking((2, 0, 1, 3), 4)),
        ("[4] is best, since [4] says so.\n[3]>[1]>[2]>[4]", Ranking((2, 0, 1, 3), 4)),
        ("<think>[4] > [3]</think>[3] > [1] > [2] > [4]", Ranking((2, 0, 1, 3), 4)),
        ("[3]\n[1]\n[2]\n[4]", Ranking((2, 0, 1, 3), 4)),
        ("1. [3]\n2. [1]\n3. [2]\n4. [4]", Ranking((2, 0, 1, 3), 4)),
        ("1. Passage 3\n2. Passage 1\n3. Passage 2\n4. Passage 4", Ranking((2, 0, 1, 3), 4)),
        ("[3, 1, 2, 4]", Ranking((2, 0, 1, 3), 4)),
        ("3, 1, 2, 4", Ranking((2, 0, 1, 3), 4)),
        ("[3] → [1] → [2] → [4]", Ranking((2, 0, 1, 3), 4)),
        ("[3] > [1] > [3] > [3]", Ranking((2, 0, 1, 3), 2, repeated=2)),
        ("[7] > [3] > [0] > [1]", Ranking((2, 0, 1, 3), 2, out_of_range=2)),
        ("[3] > [99999999999999999999] > [1]", Ranking((2, 0, 1, 3), 1)),  # the chain ends there
        ("[4] > [3]", Ranking((3, 2, 0, 1), 2)),  # SmolLM2-135M-Instruct, asked for five
        ("Passage 2 is the best one.", Ranking((1, 0, 2, 3), 1)),
        ("[3] > [1] > [2", Ranking((2, 0, 1, 3), 3)),
        ("[3] >= [1] > [2]", Ranking((2, 0, 1, 3), 3)),
        ("[3] = [1] > [2]", Ranking((2, 0, 1, 3), 3)),
        ("[3] ≥ [1] ≥ [2]", Ranking((2, 0, 1, 3), 3)),
        ("[1] > [3] > [2]\nNo, wait: [3] > [1] > [2]", Ranking((2, 0, 1, 3), 3)),
        ("The 4 passages by relevance: 3, 1, 2", Ranking((2, 0, 1, 3), 3)),
        ("Query 2 asks for eggs. Order: 3, 1, 4", Ranking((2, 0, 3, 1), 3)),
        ("The top 4\n3\n1\n2", Ranking((2, 0, 1, 3), 3)),
        ("Order: 3\n1\n2\n4", Ranking((2, 0, 1, 3), 4)),
        ("Passage 3, Passage 1, and Passage 2", Ranking((2, 0, 1, 3), 3)),
        ("Passage 3\nPassage 1\nPassage 2", Ranking((2, 0, 1, 3), 3)),
        ("- 3\n- 1\n- 2", Ranking((2, 0, 1, 3), 3)),
        ("1, 2, 3 it was. Better: 3, 1, 2", Ranking((2, 0, 1, 3), 3)),
    ],
)
def test_an_order_is_read_and_repaired(answer, expected):
    found = parse_ranking(answer, 4)
    assert isinstance(found, Ranking)
    if "9999" in answer:
        assert sorted(found.order) == [0, 1, 2, 3]
        return
    assert found == expected
    assert found.missing == 4 - expected.given
    assert found.is_repaired == (found != Ranking(found.order, 4))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (" ", Reason.EMPTY),
        ("They are all the same to me.", Reason.NO_RANKING),
        ("[9] > [8]", Reason.NO_RANKING),
        ("9" * 6000, Reason.NO_RANKING),
        ("Query 2 asks for eggs, and none of the 4 has any.", Reason.NO_RANKING),
        ("The 3 passages are equally good.", Reason.NO_RANKING),
        ("3 (0.95), 1 (0.90)", Reason.NO_RANKING),
    ],
)
def test_an_answer_without_an_order_is_dropped(answer, reason):
    assert parse_ranking(answer, 4) == Dropped(reason)


def test_a_count_before_the_order_is_no_passage():
    found = parse_ranking("Here are the 20 passages ranked by relevance: 3, 1, 2, 4, 5", 20)
    assert isinstance(found, Ranking)
    assert found.order[:5] == (2, 0, 1, 3, 4)
    assert found.given == 5
    assert parse_ranking("It is 1.", 1) == Ranking((0,), 1)


NUMBERS = st.lists(
    st.sampled_from(
        ["[", "]", " > ", ">", "\n", ". ", ",", "Passage ", "٣", "²", "yes", "no", ": "]
    )
    | st.integers(0, 30).map(str)
    | st.text(max_size=3),
    max_size=40,
).map("".join)


@settings(max_examples=250, deadline=None)
@given(NUMBERS, st.integers(1, 25))
def test_an_order_is_always_a_permutation(answer, num_passages):
    found = parse_ranking(answer, num_passages)
    if isinstance(found, Ranking):
        assert sorted(found.order) == list(range(num_passages))
        assert 1 <= found.given <= num_passages
    labels = parse_labels(answer, num_passages)
    assert isinstance(labels, Dropped) or len(labels) == num_passages


@settings(max_examples=100, deadline=None)
@given(
    st.permutations(range(20)),
    st.sampled_from(
        ["", "Sure, the 20 passages in order:\n", "```\n", "<think>[1] > [2]</think>\n"]
    ),
    st.sampled_from(["", "\n```", "\n\nPassage [4] says most, and [5] least."]),
)
def test_noise_around_an_order_changes_nothing(order, before, after):
    answer = " > ".join(f"[{place + 1}]" for place in order)
    assert parse_ranking(before + answer + after, 20) == Ranking(tuple(order), 20)


# -- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "[1] no\n[2] yes\n[3] no",
        "[1] No.\n[2] Yes, it answers the query.\n[3] No, it does not say yes.",
        "1: no, 2: yes, 3: no",
        "1. no\n2. **Yes**\n3. no",
        "(1) no (2) yes (3) no",
        "| 1 | no |\n| 2 | yes |\n| 3 | no |",
        "Passage 1: Not relevant\nPassage 2: Relevant\nPassage 3: it isn't relevant",
        '{"1": "no", "2": "yes", "3": "no"}',
        '```json\n{"[1]": false, "[2]": true, "[3]": false,}\n```',
        "Here are the labels:\n[3] no\n[2] yes\n[1] no\n[4] yes",
        "no\nyes\nno",
        "No, yes, no",
        '["no", "yes", "no"]',
        "1 no\n2 yes\n3 no",
    ],
)
def test_labels_are_read_in_whatever_form(answer):
    assert parse_labels(answer, 3) == (False, True, False)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1] no\n[2] yes", (False, True, None)),
        ("[1] no\n[1] yes\n[2] yes\n[2] yes", (None, True, None)),
        ("[2] perhaps\n[3] yes", (None, None, True)),
        ("yes, no", Dropped(Reason.NO_LABELS)),  # two for three: which?
        ("[7] yes", Dropped(Reason.NO_LABELS)),
        ("I do not see it.", Dropped(Reason.NO_LABELS)),
        ("", Dropped(Reason.EMPTY)),
    ],
)
def test_what_is_not_said_is_not_guessed(answer, expected):
    assert parse_labels(answer, 3) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("relevant", True),
        ("**Relevant**, since it tells the hour", True),
        ("relevant: no", False),
        ("relevant: yes", True),
        ("not relevant", False),
        ("irrelevant", False),
        ("not at all relevant", False),
        ("not quite directly relevant", False),
        ("never relevant", False),
        ("it isn't really relevant", False),
        ("lacks relevant facts", None),
        ("partially relevant", None),
        ("relevant only in part", None),
        ("not only relevant", None),
        ("not irrelevant", None),
        ("it names relevant places", None),
        ("that is not true", None),
        ("not false", None),
        ("It does not tell the hour, so no", False),
        ("Yes, though it is short", True),
    ],
)
def test_a_denial_or_a_hedge_is_no_yes(said, expected):
    assert parse_labels(f"[1] {said}\n[2] yes", 2) == (expected, True)
    assert parse_labels(f'{{"1": "{said}", "2": "yes"}}', 2) == (expected, True)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("relevant, irrelevant, partially relevant", (True, False, None)),
        ("Not at all relevant\nRelevant\nno", (False, True, False)),
        ("no yes no", (False, True, False)),
        ("partially relevant\nlacks relevant facts\nperhaps", Dropped(Reason.NO_LABELS)),
    ],
)
def test_labels_without_numbers_hedge_too(answer, expected):
    assert parse_labels(answer, 3) == expected


# -- windows --------------------------------------------------------------------------------------


def run(num_passages: int, relevance: list[int], **options: int) -> tuple[Windows, list[int]]:
    """Rerank by a judge that knows the relevance; returns the sizes of the calls too."""
    windows = Windows(num_passages, **options)
    sizes = []
    while places := windows.places:
        sizes.append(len(places))
        best = sorted(range(len(places)), key=lambda place: -relevance[places[place]])
        windows.take(Ranking(tuple(best), len(best)))
    return windows, sizes


def test_windows_go_from_the_end_to_the_front():
    windows = Windows(50)
    seen = []
    while places := windows.places:
        seen.append((places[0], places[-1]))
        windows.take(Ranking(tuple(range(len(places))), len(places)))
    assert seen == [(30, 49), (20, 39), (10, 29), (0, 19)]
    assert windows.order == list(range(50))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 20), st.randoms())
def test_the_best_passages_of_a_step_reach_the_front(num_passages, step, random):
    relevance = random.sample(range(num_passages), num_passages)
    windows, sizes = run(num_passages, relevance, step=step)
    assert sorted(windows.order) == list(range(num_passages))
    assert windows.dropped == 0
    # what fits into the overlap of two windows is carried from the end to the front
    carried = num_passages if num_passages <= 20 else 20 - step
    best = sorted(range(num_passages), key=lambda place: -relevance[place])
    assert windows.order[:carried] == best[:carried]
    assert all(size == min(20, num_passages) for size in sizes)


def test_a_window_without_an_answer_keeps_its_order():
    windows = Windows(30)
    windows.take(Dropped(Reason.NO_RANKING))
    windows.take(Ranking((*range(19, -1, -1),), 20))
    assert windows.order == [*range(19, -1, -1), *range(20, 30)]
    assert windows.places == ()
    assert windows.dropped == 1


def test_a_hundred_passages_take_nine_calls_and_one_takes_none():
    assert len(run(100, list(range(100)))[1]) == 9
    assert run(1, [0])[1] == []
