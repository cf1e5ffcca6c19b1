import gzip
import json
import lzma

import pytest
from datasets import Dataset, DatasetDict

from drama.data.records import Document
from drama.data.sources import HUB_NAME, read_source
from drama.errors import UserError

OURS = {"query": "q", "positives": [{"text": "p", "title": "t"}], "negatives": [{"text": "n"}]}
TEVATRON = {
    "query_id": 7,
    "query": "q",
    "positive_passages": [{"docid": 1, "title": "t", "text": "p"}],
    "negative_passages": [{"docid": "2", "title": None, "text": "n"}],
}
FLAG = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "prompt": "ignored"}
COLUMNS = {"anchor": "q", "positive": "p", "negative_10": "c", "negative_2": "b", "negative": "a"}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(documents):
    return [(document.title, document.text) for document in documents]


@pytest.mark.parametrize(
    ("row", "positives", "negatives"),
    [
        (OURS, [("t", "p")], [("", "n")]),
        (TEVATRON, [("t", "p")], [("", "n")]),
        (FLAG, [("", "p")], [("", "n"), ("", "m")]),
        (COLUMNS, [("", "p")], [("", "a"), ("", "b"), ("", "c")]),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_each_layout_in_each_packing(tmp_path, row, positives, negatives, pack):
    path = tmp_path / "my.set.jsonl"  # packed or not is told from the bytes
    path.write_bytes(pack(lines(row, row)))
    first, second = read_source(path)
    assert first == second
    assert (first.query, first.source) == ("q", "my.set")
    assert texts(first.positives) == positives
    assert texts(first.negatives) == negatives
    assert next(read_source(path, "named")).source == "named"


def test_ids_and_teacher_scores_are_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(TEVATRON))
    (record,) = read_source(path)
    assert record.query_id == "7"
    assert [d.id for d in (*record.positives, *record.negatives)] == ["1", "2"]
    path.write_bytes(lines(FLAG | {"pos_scores": [0.9], "neg_scores": [0.2, 0.1]}))
    (record,) = read_source(path)
    expected = {"p": 0.9, "n": 0.2, "m": 0.1}
    assert record.scores == {Document(text).id: score for text, score in expected.items()}


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(OURS, OURS).replace(b"\n", b"\r\n"))
    assert len(list(read_source(path))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.jsonl holds no records"),
        (lines(OURS) + b"\n" + lines(OURS), "x.jsonl:2: empty record"),
        (lines(OURS) + b"{}\n", "x.jsonl:2: empty record"),
        (lines(OURS) + b'{"query": "q",\n', "x.jsonl:2: invalid JSON: .*line 1 column"),
        (b'{"query": ' + b"[" * 100_000, "x.jsonl:1: invalid JSON: nested too deeply"),
        (b"[" * 100_000, "x.jsonl: after item -1: invalid JSON"),
        (b'[{"query":' * 50_000, "x.jsonl: after item -1: invalid JSON"),
        (b"[1]\n", "x.jsonl: after item -1: an item must be a JSON object"),
        (b"1\n", "x.jsonl:1: a line must hold one JSON object"),
        (lines(OURS) + b'{"query": "\xff"}\n', "x.jsonl:2: invalid UTF-8 at byte 11 of the line"),
        (lines(OURS, {**OURS, "query": ""}), "x.jsonl:2: query is empty"),
        (lines(OURS, FLAG), "x.jsonl:2: record has the unknown key 'pos'"),
        (lines({"question": "q", "answer": "a"}), "x.jsonl:1: unknown layout .* question, answer"),
        (lines({**TEVATRON, "positive_passages": "p"}), ":1: positive_passages must be a list"),
        (lines({**FLAG, "neg": [None]}), r":1: negatives\[0\].text must be a string, not null"),
        (lines({**FLAG, "pos_scores": []}), ":1: 1 texts in pos, 0 pos_scores"),
        (lines(COLUMNS, {"anchor": "q"}), "x.jsonl:2: no 'positive'"),
        (gzip.compress(lines(OURS) * 999)[:-9], "x.jsonl: the compressed file is cut or damaged"),
        (lzma.compress(lines(OURS) * 999)[:-9], "x.jsonl: the compressed file is cut or damaged"),
    ],
)
def test_faults_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_source(path))


def test_missing_path_and_strange_folder(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        list(read_source(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="is neither a BEIR folder"):
        list(read_source(tmp_path))


@pytest.mark.parametrize("row", [OURS, TEVATRON, FLAG, COLUMNS])
def test_hugging_face_folder(tmp_path, row):
    (tmp_path / "x.jsonl").write_bytes(lines(row))
    expected = list(read_source(tmp_path / "x.jsonl", "set"))
    Dataset.from_list([row]).save_to_disk(tmp_path / "set")
    assert list(read_source(tmp_path / "set")) == expected
    splits = DatasetDict(train=Dataset.from_list([row]), dev=Dataset.from_list([row, row]))
    splits.save_to_disk(tmp_path / "splits")
    assert list(read_source(tmp_path / "splits", "set")) == expected


def test_hugging_face_folder_faults(tmp_path):
    rows = [{"anchor": "q", "positive": "p"}, {"anchor": "q", "positive": " "}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=r"set: row 1: positives\[0\].text is empty"):
        list(read_source(tmp_path / "set"))
    row = Dataset.from_list([COLUMNS])
    DatasetDict(dev=row, test=row).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="splits has no split 'train'; it has: dev, test"):
        list(read_source(tmp_path / "splits"))


@pytest.mark.parametrize(
    "content",
    [b'[{"query": "a", "positives": [{"text": "b"}]}]\n[{"query": "c", "positives": []}]',
     b'[[{"query": "a", "positives": [{"text": "b"}]}], [1]]'],
)  # fmt: skip
def test_nothing_of_a_json_array_is_lost_without_a_word(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"follows the end of the JSON array|must be a JSON object"):
        list(read_source(path))


def test_a_json_array_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.json"
    first, second = (
        json.dumps({"query": query, "positives": [{"text": "p"}]}).encode() for query in "ac"
    )
    path.write_bytes(b"\xef\xbb\xbf [" + first + b" , " + b" " * 70_000 + second + b"]\n\n")
    assert [record.query for record in read_source(path)] == ["a", "c"]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "positive_passages": ["p"], "negative_passages": []},
        {"question": "q", "positive_ctxs": [{"text": "p"}]},
        {"anchor": "q", "positive": "p"},
        {"query": "q", "pos_doc": "p"},
        {"query": "q", "pos": ["p"], "neg": []},
    ],
)
def test_languages_prompts_and_ids_are_kept_of_every_layout(tmp_path, row):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row | {"lang": "ja", "prompt": "Task: ", "query_id": "7"}) + "\n")
    (record,) = read_source(path)
    assert (record.lang, record.prompt, record.query_id) == ("ja", "Task: ", "7")


def test_deep_nesting_is_a_bad_row(tmp_path):
    path = tmp_path / "x.jsonl"
    deep = '"x": ' + "[" * 900 + "]" * 900
    path.write_text('{"query": "q", "positive_passages": [{"text": "p", ' + deep + "}]}\n")
    with pytest.raises(UserError, match=r"x\.jsonl:1: (a value is nested|invalid JSON: nested)"):
        list(read_source(path))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None, None, None)),
        ("org/name:pairs", ("org/name", None, "pairs", None)),
        ("org/name@v1.0:pairs:dev", ("org/name", "v1.0", "pairs", "dev")),
        ("hf://datasets/org/name:pairs", ("org/name", None, "pairs", None)),
    ],
)
def test_names_on_the_hub(text, parts):
    match = HUB_NAME.fullmatch(text)
    assert tuple(match[key] for key in ("name", "revision", "config", "split")) == parts
    assert HUB_NAME.fullmatch("hf://datasets/org/name/data/x.parquet") is None
