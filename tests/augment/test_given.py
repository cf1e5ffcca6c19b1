"""Records of several sources, one after the other, from any place on."""

import json

import pytest

from drama.augment.given import Given
from drama.data.sources import Source
from drama.errors import UserError


@pytest.fixture
def sources(tmp_path):
    for name, count in (("a", 3), ("b", 4)):
        rows = [{"query": f"{name}{n}", "positives": [{"text": "x"}]} for n in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return [Source.parse(tmp_path / f"{name}.jsonl") for name in ("a", "b")]


def test_reading_goes_on_from_any_place(sources):
    given = Given(sources)
    assert len(given) == 7
    whole = [record.query for record in given.read(0)]
    assert whole == ["a0", "a1", "a2", "b0", "b1", "b2", "b3"]
    for start in range(8):
        assert [record.query for record in given.read(start)] == whole[start:]


def test_about_changes_with_the_files(sources, tmp_path):
    before = Given(sources).about()
    assert Given(sources).about() == before
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write(json.dumps({"query": "new", "positives": [{"text": "x"}]}) + "\n")
    assert Given(sources).about() != before


def test_what_is_no_pair_is_named(sources, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:1: a text without a query; give pairs"):
        list(Given(sources).read(0))
