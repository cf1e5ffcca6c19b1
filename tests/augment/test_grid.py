from collections import Counter

from drama.augment.grid import SEARCHES, TOPICS, Draw, Subject, draw, draw_subject


def test_a_draw_is_a_function_of_seed_and_index():
    # the form and order of what jobs wrote must not change under them
    assert draw(0, 0, ("de", "en")) == DRAW
    assert draw_subject(7, 1) == SUBJECT
    assert draw(1, 0) != draw(0, 0)
    assert draw(0, 1) != draw(0, 0)


def test_every_choice_is_drawn_and_none_depends_on_another():
    draws = [draw(0, index, ("de", "de", "en")) for index in range(3000)]
    languages = Counter(one.language for one in draws)
    assert 1.7 < languages["de"] / languages["en"] < 2.3
    cells = Counter(
        (one.query_length, one.document_length, one.difficulty, one.clarity) for one in draws
    )
    assert len(cells) == 4 * 4 * 3 * 3
    assert max(cells.values()) < 60  # 21 on average
    subjects = {draw_subject(0, index) for index in range(3000)}
    assert len(subjects) > 0.9 * len(TOPICS) * len(SEARCHES)


DRAW = Draw(
    language="de",
    query_length="one sentence",
    document_length="about 40 words",
    difficulty="anyone",
    clarity="says clearly what is sought",
)
SUBJECT = Subject("networks", "claims that a document supports or refutes")
