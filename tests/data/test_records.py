import hashlib
import json
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drama.data.records import Document, Record, document_hash64
from drama.errors import UserError

TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
DOCUMENT = st.builds(Document, text=TEXT, title=st.just("") | TEXT, id=st.just("") | TEXT)
RECORD = st.builds(
    Record,
    query=TEXT,
    positives=st.lists(DOCUMENT, min_size=1, max_size=3).map(tuple),
    negatives=st.lists(DOCUMENT, max_size=3).map(tuple),
    query_id=st.just("") | TEXT,
    source=st.just("") | TEXT,
    lang=st.sampled_from(["", "en", "zh_TW"]),
)


TEXTS = st.builds(
    lambda document, **rest: Record("", (document,), **rest),
    DOCUMENT,
    source=st.just("") | TEXT,
    lang=st.sampled_from(["", "en"]),
)


def record(**changes):
    value = {"query": "q", "positives": [{"text": "p"}], "negatives": [{"text": "n"}]}
    value.update(changes)
    return {key: item for key, item in value.items() if item is not ...}


@given(RECORD | TEXTS)
def test_json_round_trip(value):
    assert Record.from_json(json.loads(json.dumps(value.to_json()))) == value
    assert Record.trusted(json.loads(json.dumps(value.to_json()))) == value


def test_a_text_has_a_form_of_its_own():
    text = Record.from_json({"text": "t", "title": "T", "lang": "en"})
    assert text == Record("", (Document("t", "T"),), lang="en")
    assert text.is_text
    assert text.own_text == "T t"
    assert text.to_json() == {"id": Document("t", "T").id, "title": "T", "text": "t", "lang": "en"}
    assert Record.from_json({"text": "t"}).to_json() == {"id": Document("t").id, "text": "t"}
    assert not Record.from_json(record()).is_text
    assert Record.from_json(record()).own_text == "q"


def test_a_missing_id_is_the_hash_of_the_normalised_text():
    text = unicodedata.normalize("NFKC", "\uff34itle some ﬁne text").casefold()
    expected = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    assert Document("some\n  ﬁne TEXT ", "\uff34itle").id == expected
    assert len(expected) == 16
    assert Document("other").id != expected
    assert Document("some fine text", "Title", "x").id == "x"


def test_hash64_fits_an_int64_tensor_and_tells_ids_apart():
    ids = [document_hash64(str(i)) for i in range(2000)]
    assert torch.tensor(ids, dtype=torch.int64).tolist() == ids
    assert len(set(ids)) == 2000
    assert min(ids) < 0 < max(ids)
    assert document_hash64("7") == document_hash64("7")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "record must be a JSON object, not a list"),
        ({}, "empty record"),
        (record(query=...), "record has no 'query'"),
        (record(query=" \n"), "query is empty"),
        (record(query=3), "query must be a string, not a number"),
        (record(positives=...), "record has no 'positives'"),
        (record(positives=[]), "positives is empty"),
        (record(positives={"text": "p"}), "positives must be a list of documents, not an object"),
        (record(positives=["p"]), r"positives\[0\] must be a JSON object, not a string"),
        (record(positives=[{"title": "t"}]), r"positives\[0\] has no 'text'"),
        (record(positives=[{"text": "p"}, {"text": ""}]), r"positives\[1\]\.text is empty"),
        (record(negatives=[{"text": None}]), r"negatives\[0\]\.text must be a string, not null"),
        (record(negatives=[{"text": "n", "body": "x"}]), r"negatives\[0\] has the unknown key"),
        (record(negative=[]), "unknown key 'negative' .did you mean 'negatives'"),
        (record(text="t"), "record has the unknown key 'text'"),
        ({"text": "t", "query": ""}, "record has the unknown key 'text'"),
        ({"text": "t", "prompt": "p"}, "record has the unknown key 'prompt'"),
        ({"text": "t", "negatives": []}, "record has the unknown key 'negatives'"),
        ({"text": "t", "titel": ""}, "unknown key 'titel' .did you mean 'title'"),
        ({"text": " "}, "record.text is empty"),
        ({"text": None}, "record.text must be a string, not null"),
        ({"text": "t", "source": 3}, "source must be a string, not a number"),
        ({"title": "t"}, "record has the unknown key 'title'"),
        (record(lang=["en"]), "lang must be a string, not a list"),
        (record(query="a\ud800"), "query holds an unpaired surrogate at character 1"),
        (record(scores=[1]), "scores must be an object of numbers, not a list"),
        (record(scores={"zzz": 1.0}), "scores names document 'zzz'"),
        (record(scores={Document("p").id: "1"}), "must be a number, not a string"),
        (record(scores={Document("p").id: float("nan")}), "is nan, not a finite number"),
        (record(scores={Document("p").id: 10**400}), "is 1000000000.*, not a finite number"),
    ],
)
def test_a_fault_is_named(value, message):
    with pytest.raises(UserError, match=message):
        Record.from_json(value)


def test_scores_are_kept():
    value = record(scores={Document("p").id: 1, Document("n").id: -0.5})
    assert Record.from_json(value).scores == {Document("p").id: 1.0, Document("n").id: -0.5}
