import gzip
import json
import lzma

import pytest

from drama.data.beir import read_corpus, read_qrels, read_queries
from drama.data.sources import read_source
from drama.errors import UserError

HEADER = "query-id\tcorpus-id\tscore\n"


@pytest.fixture
def folder(tmp_path):
    """Three documents, two queries; d3 is judged irrelevant, q2 has no positive."""
    corpus = [{"_id": f"d{i}", "title": f"t{i}", "text": f"text {i}"} for i in (1, 2, 3)]
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in (1, 2)]
    dump = {"corpus.jsonl": corpus, "queries.jsonl": queries}
    for name, rows in dump.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels").mkdir()
    rows = "q1\td2\t2\nq1\td1\t1\nq1\td3\t0\nq2\td3\t0\n"
    (tmp_path / "qrels/train.tsv").write_text(HEADER + rows)
    (tmp_path / "qrels/test.tsv").write_text(HEADER + "q1\td3\t1\n")
    return tmp_path


def test_read(folder):
    assert [(d.id, d.title, d.text) for d in read_corpus(folder)][1] == ("d2", "t2", "text 2")
    assert read_queries(folder) == {"q1": "query 1", "q2": "query 2"}
    expected = {"q1": {"d2": 2, "d1": 1, "d3": 0}, "q2": {"d3": 0}}
    assert read_qrels(folder, "train") == expected


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_packed_files_are_found(folder, suffix, pack):
    plain = list(read_corpus(folder)), read_qrels(folder, "train")
    for name in ("corpus.jsonl", "qrels/train.tsv"):
        path = folder / name
        path.with_name(path.name + suffix).write_bytes(pack(path.read_bytes()))
        path.unlink()
    assert (list(read_corpus(folder)), read_qrels(folder, "train")) == plain


def test_training_records_come_from_the_train_split(folder):
    (record,) = read_source(folder, "set")
    assert (record.query, record.query_id, record.source) == ("query 1", "q1", "set")
    assert [d.id for d in record.positives] == ["d2", "d1"]
    assert [d.id for d in record.negatives] == ["d3"]
    (folder / "qrels/train.tsv").unlink()
    (record,) = read_source(folder)
    assert [d.id for d in record.positives] == ["d3"]


def test_qrels_without_header(folder):
    (folder / "qrels/test.tsv").write_text("q1\td3\t1\n")
    assert read_qrels(folder, "test") == {"q1": {"d3": 1}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "d1"}\n', r"corpus\.jsonl:1: the line has no 'text'"),
        ("corpus.jsonl", '{"_id": 1, "text": ""}\n', ":1: the line is not a string: '_id'"),
        ("corpus.jsonl", '{"_id": "1", "text": ""}\n' * 2, ":2: document '1' .* twice"),
        ("queries.jsonl", '{"_id": "1", "text": "a"}\n' * 2, ":2: query '1' .* twice"),
        ("queries.jsonl", '{"_id": "1", "text": " "}\n', ":1: query '1' is empty"),
        ("qrels/train.tsv", HEADER, "train.tsv holds no judgements"),
        ("qrels/train.tsv", HEADER + "q1 d1 1\n", "train.tsv:2: 1 columns, expected"),
        ("qrels/train.tsv", HEADER + "q1\td1\thigh\n", ":2: score 'high' is not an integer"),
        ("qrels/train.tsv", "q1\td1\t1\nq1\td1\t0\n", ":2: query 'q1', document 'd1' is judged 1"),
        ("qrels/train.tsv", "q9\td1\t1\n", "names the unknown query 'q9'"),
        ("qrels/train.tsv", "q1\td9\t1\n", "names the unknown document 'd9'"),
    ],
)
def test_faults_name_file_and_line(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_source(folder))


def test_unknown_split_lists_the_known(folder):
    with pytest.raises(UserError, match=r"no qrels split 'tset' .did you mean 'test'.*test, train"):
        read_qrels(folder, "tset")


def test_folder_without_queries(folder):
    (folder / "queries.jsonl").unlink()
    with pytest.raises(UserError, match=r"is no BEIR folder: it has no queries\.jsonl"):
        read_queries(folder)
