from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drama.retrieve.snippet import SNIPPET, marks, query_words, snippet

FILLER = "Nothing of this kind stands in here at all, and on it goes for a while. " * 5


def marked(text, query):
    return [text[a:b] for a, b in marks(text, query_words(query))]


def test_words_are_compared_by_their_stems_and_stop_words_do_not_count():
    assert marked("Vaccinated! The vaccines of a VACCINE", "is the vaccine in") == [
        "Vaccinated",
        "vaccines",
        "VACCINE",
    ]
    assert marked("the a of", "the of") == []


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ("Yeast turns sugar into gas.", "what does yeast make of sugar?"),
        ("酵母把糖变成气体。", "酵母和糖"),
        ("La levure mange du sucre.", "sucre pour la levure"),
    ],
)
def test_a_snippet_begins_with_the_sentence_that_answers(answer, query):
    text, spans = snippet(f"{FILLER}{answer} {FILLER}", query_words(query))
    assert text.startswith(f"… {answer}")
    assert text.endswith("…")
    assert len(text) <= SNIPPET
    assert len(spans) >= 2
    assert all(text[a:b] in answer for a, b in spans)


def test_the_sentence_with_most_words_wins_and_the_first_of_equals():
    words = query_words("sugar yeast bread")
    text = f"Sugar is sweet. {FILLER} Yeast eats sugar. {FILLER} Bread needs yeast."
    assert snippet(text, words)[0].startswith("… Yeast eats sugar. ")
    assert snippet(f"{FILLER}{FILLER}", words)[0] == snippet(FILLER, frozenset())[0]


def test_one_long_sentence_is_cut_around_the_words():
    text = "word " * 300 + "yeast " + "word " * 300
    found, spans = snippet(text, query_words("yeast"))
    assert len(found) <= SNIPPET
    assert found.startswith("… word ")
    assert [found[a:b] for a, b in spans] == ["yeast"]


def test_short_texts_stay_whole():
    assert snippet(" a\n\nb  c ", frozenset()) == ("a b c", ())
    assert snippet("", query_words("a")) == ("", ())


def test_long_texts_are_cut_at_a_word():
    text, _ = snippet("word  and\n" * 100, query_words("word"))
    assert len(text) <= SNIPPET
    assert text.endswith(("word…", "and…"))
    assert "  " not in text


@given(st.text(max_size=600), st.text(max_size=40), st.integers(10, 300))
def test_any_text(text, query, limit):
    found, spans = snippet(text, query_words(query), limit)
    assert len(found) <= limit
    ends = [0]
    for start, end in spans:
        assert ends[-1] <= start < end <= len(found)
        ends.append(end)
    body = found.removeprefix("… ").removesuffix("…")
    assert body in " ".join(text.split())
