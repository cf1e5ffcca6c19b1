"""Reports that are read again, and one line for those that are not what a job wrote."""

import json

import pytest

from drama.augment.reports import read_report, report_paths
from drama.errors import UserError

GOOD = {"kind": "crops", "read": 2, "records": 1, "own_ranks": {"1": 1, "deeper": 0}}


def test_by_the_records_or_by_the_report(tmp_path):
    (tmp_path / "a.report.json").write_text(json.dumps(GOOD))
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.report.json"):
        assert read_report(tmp_path / name) == ("a", GOOD)
    assert [path.name for path in report_paths(tmp_path / "b.c.jsonl.xz")] == [
        "b.c.report.json",
        "b.c.report.html",
    ]


def test_what_is_not_there(tmp_path):
    (tmp_path / "crops.report.json").write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match=r"crop\.jsonl has no report: .*crop\.report\.json does "
                       r"not exist \(did you mean '.*crops\.report\.json'\?\)"):  # fmt: skip
        read_report(tmp_path / "crop.jsonl")
    with pytest.raises(UserError, match=r"^\S*crop\.report\.json does not exist"):
        read_report(tmp_path / "crop.report.json")
    with pytest.raises(UserError, match=r"shards: the name must end in \.jsonl or"):
        read_report(tmp_path / "shards")
    (tmp_path / "folder.report.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.report\.json cannot be read: Is a directory"):
        read_report(tmp_path / "folder.report.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is damaged \(Expecting value"),
        (json.dumps(GOOD)[:-9], r"is damaged \(Unterminated"),
        ("[" * 100_000, r"is damaged \("),
        (b"\xff\xfe", r"is damaged \("),
        ("[]", r"is no report of a job \(the whole: "),
        ("{}", r"is no report of a job \(kind: Field required\); give what `drama augment`"),
        (json.dumps(GOOD | {"records": -1}), r"\(records: Input should be greater"),
        (json.dumps(GOOD | {"languages": {"en": "many"}}), r"\(languages\.en: Input should be a"),
        (json.dumps(GOOD | {"query_chars": {"x": 1}}), r"\(query_chars\.x"),
        (json.dumps(GOOD | {"own_ranks": {"0": 1}}), r"\(own_ranks\.0"),
        (json.dumps(GOOD | {"self_retrieval": {"first": "x"}}), r"\(self_retrieval\.first: "),
        (json.dumps(GOOD | {"examples": [{"positive": "x"}]}), r"\(examples\.0\.query: Field"),
        (json.dumps(GOOD | {"duplicate_queries": {"examples": [["a"]]}}), r"examples\.0\.1"),
    ],
)
def test_damaged_or_something_else(tmp_path, text, message):
    path = tmp_path / "a.report.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"a\.report\.json .*{message}") as fault:
        read_report(path)
    assert "\n" not in str(fault.value)
