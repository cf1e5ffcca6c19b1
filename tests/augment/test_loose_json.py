import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.augment.loose_json import loose_objects, loose_strings

JSON = st.recursive(
    st.text(max_size=8) | st.booleans() | st.none() | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": "b", "c": "d"}', {"a": "b", "c": "d"}),
        ("{'a': 'it's', 'c': 'd'}", {"a": "it's", "c": "d"}),
        ('{"a": "b", "c": "d",}', {"a": "b", "c": "d"}),
        ('{"a": "b"\n "c": "d"}', {"a": "b", "c": "d"}),
        ('{"a": "say "b", she said", "c": "d"}', {"a": 'say "b", she said', "c": "d"}),
        ('{"a": "one\ntwo", "c": "d"}', {"a": "one\ntwo", "c": "d"}),
        ('{"a": "b", "c": "the end is miss', {"a": "b", "c": "the end is miss"}),
        ('{"a": "b", "c', {"a": "b"}),
        ('{"a": "b", "c":', {"a": "b", "c": ""}),
        ("{a: b, c: d}", {"a": "b", "c": "d"}),
        ("{“a”: “b”, “c”: “d”}", {"a": "b", "c": "d"}),
        ("{'a': True, 'b': None, 'c': 3}", {"a": True, "b": None, "c": "3"}),
        (r"""{'a': 'x\n\"y\" \u00e9\\', 'c': 'd'}""", {"a": 'x\n"y" é\\', "c": "d"}),
        (r"{'a': '\ud83d\ude00 \ud83d'}", {"a": "😀 \ufffd"}),
        ('Sure! {"a": ["b", "c",], "d": {"e": "f"}} Hope this helps.', {"a": ["b", "c"]}),
        ('{{"a": "b"}}', {"a": "b"}),
    ],
)
def test_objects_are_read_as_far_as_they_go(text, expected):
    found = loose_objects(text)[0]
    assert {key: found[key] for key in expected} == expected


def test_inner_objects_follow_their_outer_one():
    text = 'x {"a": {"b": "c"}} y {"d": [{"e": "f"}]}'
    assert loose_objects(text) == [
        {"a": {"b": "c"}}, {"b": "c"}, {"d": [{"e": "f"}]}, {"e": "f"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('here: ["a", "b"]', ["a", "b"]),
        ("['a', 'b',", ["a", "b"]),
        ('[{"task": "a"}, {"task": "b"}]', ["a", "b"]),
        ("[a, b]", ["a", "b"]),
        ('{"1": "a", "2": "b [c]"}', ["a", "b [c]"]),
        ('{"x": "y", "tasks": ["a", "b"]}', ["a", "b"]),
        ("none", []),
    ],
)
def test_lists_of_strings(text, expected):
    assert loose_strings(text) == expected


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=8), JSON, min_size=1, max_size=3))
def test_valid_json_is_read_as_it_is(value):
    assert loose_objects(f"Here: {json.dumps(value)} done")[0] == value
    assert loose_objects(json.dumps(value, ensure_ascii=False))[0] == value


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="{}[]\"'“”:,\\ua1 \n") | st.text())
def test_no_text_raises(text):
    assert all(isinstance(found, dict) for found in loose_objects(text))
    assert all(isinstance(found, str) for found in loose_strings(text))


@pytest.mark.parametrize("text", ["{" * 40_000, "[" * 40_000, "{'a':" * 8_000, "{'" + " " * 40_000])
def test_depth_and_length_are_bounded(text):
    loose_objects(text)
    loose_strings(text)


def test_a_number_that_python_refuses_to_read_is_no_fault():
    assert loose_objects('{"b": "c", "a": ' + "9" * 5000 + "}")[0]["b"] == "c"
