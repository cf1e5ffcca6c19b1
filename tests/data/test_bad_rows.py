"""Rows that are no records: named with place and reason, or skipped and listed."""

import json
from collections import Counter

import pytest

from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.sources import Source
from drama.data.stream import ShardSet
from drama.errors import UserError


def shard(path, out, workers=1, **options):
    return shard_sources([Source.parse(path)], out, ShardingOptions(**options), workers=workers)


def good_row(number):
    row = {"query": f"{number} bees", "positives": [{"text": "honey"}], "query_id": str(number)}
    return json.dumps(row).encode()


BAD_ROWS = [
    ("not json", "invalid JSON", "invalid JSON"),
    ("", "empty record", "empty record"),
    ('{"query": "q"}', "no positives", "record has no 'positives'"),
    ('{"query": "q", "positives": []}', "no positives", "positives is empty"),
    ('{"query": " ", "positives": [{"text": "p"}]}', "empty text", "query is empty"),
    ('{"query": "q", "positives": [{"text": ""}]}', "empty text", "positives[0].text is empty"),
    ('{"query": "q", "positives": ["p"]}', "wrong key or type", "must be a JSON object"),
    ('{"query": "\\ud800", "positives": [{"text": "p"}]}', "invalid UTF-8", "unpaired surrogate"),
    ("[" * 100_000, "invalid JSON", "nested too deeply"),
    ('{"query": "q", "positives": [{"text": "%s"}]}' % ("x" * (2**24 + 1)), "text too long", "16,"),
    (b'{"query": "\xff", "positives": [{"text": "p"}]}', "invalid UTF-8", "invalid UTF-8"),
]


def test_bad_rows_are_listed_with_place_and_reason(tmp_path):
    good = [good_row(number) for number in range(len(BAD_ROWS))]
    bad = [row if isinstance(row, bytes) else row.encode() for row, _, _ in BAD_ROWS]
    source = tmp_path / "x.jsonl"
    source.write_bytes(b"\n".join(line for pair in zip(good, bad, strict=True) for line in pair))
    outcome = shard(source, tmp_path / "out", 2, skip_bad=True)
    assert outcome.left_out == Counter(reason for _, reason, _ in BAD_ROWS)
    assert outcome.manifest.left_out == dict(sorted(outcome.left_out.items()))
    listed = [json.loads(line) for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    for number, ((_, reason, error), item) in enumerate(zip(BAD_ROWS, listed, strict=True)):
        assert item["where"] == f"{source}:{2 * number + 2}"
        assert item["reason"] == reason
        assert error in item["error"]
    shards = ShardSet([tmp_path / "out"])
    assert [shards.read(number).query_id for number in range(len(shards))] == [
        str(number) for number in range(len(BAD_ROWS))
    ]
    with pytest.raises(UserError, match=r"x\.jsonl:2: invalid JSON"):
        shard(source, tmp_path / "stopped", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.jsonl"]


@pytest.mark.parametrize("first", [row for row in BAD_ROWS if len(row[0]) < 1000])
def test_a_bad_first_row_is_skipped_too(tmp_path, first):
    row, reason, _ = first
    source = tmp_path / "x.jsonl"
    source.write_bytes((row if isinstance(row, bytes) else row.encode()) + b"\n" + good_row(0))
    outcome = shard(source, tmp_path / "out", skip_bad=True)
    assert outcome.manifest.num_records == 1
    assert outcome.left_out == {reason: 1}
    with pytest.raises(UserError, match=r"x\.jsonl:1: "):
        shard(source, tmp_path / "stopped")
