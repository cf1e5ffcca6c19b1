"""What is counted comes back from a journal, an old one too."""

import json

from drama.augment.tally import Tally
from drama.data.records import Document, Record

RECORD = Record("query", (Document("text"),), lang="en", source="a")


def test_a_journal_gives_the_same_tally_back():
    tally = Tally()
    for n in range(9):
        tally.add(RECORD, n % 3, {"copy": 1}, {"task": "ab"[n % 2], "field": "x"})
    again = Tally.from_json(json.loads(json.dumps(tally.to_json())))
    for each in (tally, again):
        each.add(RECORD, None, {}, {"task": "c"})
        summary = each.summary()
        assert summary["records"] == 10
        assert summary["labels"] == {"task": {"a": 5, "b": 4, "c": 1}, "field": {"x": 9}}
        assert list(summary["labels"]["task"]) == ["a", "b", "c"]
    assert again.to_json() == tally.to_json()


def test_a_journal_from_before_there_were_labels():
    tally = Tally()
    tally.add(RECORD, 1, {}, {})
    old = {name: value for name, value in tally.to_json().items() if name != "labels"}
    assert Tally.from_json(old).summary() == tally.summary()
