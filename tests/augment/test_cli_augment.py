"""`drama augment crops` and `drama mine`, from files to shards, and one line for bad input."""

import json
from itertools import islice
from pathlib import Path

import pytest

from drama.data.lines import read_objects
from drama.data.sources import read_source
from drama.data.stream import open_pairs
from drama.testing import tiny_llama

DEMO = Path(__file__).parents[2] / "data" / "demo"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama(folder / "model", num_hidden_layers=1)
    rows = [row for _, row in islice(read_objects(DEMO / "scifact" / "corpus.jsonl.gz"), 60)]
    rows = [{**row, "text": row["text"][:300]} for row in rows]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_from_text_to_shards_and_mined_again(world, tmp_path, said):
    teacher = ("--teacher", world / "model", "--work", tmp_path / "work")
    out = tmp_path / "crops.jsonl.gz"
    crops = ("augment", "crops", f"sci={world / 'c.jsonl'}", *teacher, "--out", out)
    text = said(*crops, "--positives", "1-3", "--negatives", "10-20", "--depth", 20)
    assert "crops.jsonl.gz: 60 records of 60 documents" in text
    assert "the query's own document is first for" in text
    assert f"next: drama shard {out} --out SHARDS" in text
    report = json.loads((tmp_path / "crops.report.json").read_text())
    assert report["about"]["negatives"] == [10, 20]

    said("shard", out, "--out", tmp_path / "shards", "--workers", 1)
    shards = open_pairs([tmp_path / "shards"])
    assert [shards.read(i) for i in range(len(shards))] == list(read_source(out))
    assert shards.sources == ["sci"]

    mined = tmp_path / "mined.jsonl"
    mine = ("mine", tmp_path / "shards", "--corpus", f"sci={world / 'c.jsonl'}",
            *teacher, "--out", mined, "--negatives", "1-5")  # fmt: skip
    text = said(*mine)
    assert "mined.jsonl: 60 records of 60 records" in text
    assert "left out of the negatives, scores near the positive:" in text
    for before, after in zip(read_source(out), read_source(mined), strict=True):
        assert after.positives == before.positives
        assert len(after.negatives) <= 5
    assert len(list((tmp_path / "work").glob("vectors-*"))) == 1  # encoded once for both
    assert "mined.jsonl is there already" in said(*mine)


def test_reports_of_two_jobs_on_one_page(world, tmp_path, said, refused):
    teacher = ("--teacher", world / "model", "--work", tmp_path / "work")
    outs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    for seed, out in enumerate(outs):
        made = said("augment", "crops", world / "c.jsonl", *teacher, "--seed", seed, "--out", out)
        page = out.name.replace("jsonl", "report").removesuffix(".gz") + ".html"
        assert f"more, with examples: {page} beside it" in made
        assert "<svg" in (tmp_path / page).read_text()
    page = tmp_path / "run" / "augment.html"
    text = said("augment", "report", *outs, "--out", page)
    assert f"{page}: open it in a browser; {page.with_suffix('.json')} has the same" in text
    assert 'href="#job-1"' in page.read_text()
    assert len(json.loads(page.with_suffix(".json").read_text())["jobs"]) == 2
    line = refused("augment", "report", tmp_path / "c.jsonl", "--out", page)
    assert "c.jsonl has no report: " in line


def test_the_defaults_are_the_papers(world, tmp_path, said):
    out = tmp_path / "crops.jsonl"
    said("augment", "crops", world / "c.jsonl", "--teacher", world / "model", "--out", out)
    about = json.loads((tmp_path / "crops.report.json").read_text())["about"]
    assert (about["depth"], about["positives"], about["negatives"]) == (50, [1, 10], [30, 50])
    assert (about["share"], about["own"]) == (None, "ranked")
    record = next(read_source(out))
    assert len(record.positives) == 10
    assert 20 <= len(record.negatives) <= 21
    assert (tmp_path / "crops.work" / "corpus" / "corpus.json").is_file()


def test_pairs_are_mined_among_their_own_documents(world, tmp_path, said):
    rows = [
        {"anchor": f"what do {thing} do", "positive": f"{thing} make {other}"}
        for thing, other in (("bees", "honey"), ("bakers", "bread"), ("moons", "tides"))
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "mined.jsonl"
    said("mine", tmp_path / "p.jsonl", "--teacher", world / "model", "--out", out,
         "--positive-aware", 0)  # fmt: skip
    for record in read_source(out):
        texts = {document.text for document in record.negatives}
        assert texts == {row["positive"] for row in rows} - {record.positives[0].text}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--negatives 30-60", "negatives 30-60: ranks ascend from 1 to the depth, which is 50"),
        ("--positives a-b", "'a-b' is no range; write FIRST-LAST, for example 30-50"),
        ("--chars 50-20", "chars 50-20: the lengths must ascend from 1"),
        ("--teacher gone", "gone: not a model folder"),
        ("--text body", "no column 'body' for the text"),
        ("--out x.json", "x.json: the name must end in .jsonl or .jsonl.gz"),
    ],
)
def test_bad_input_is_one_line_and_no_records(
    world, tmp_path, arguments, message, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    base = ["augment", "crops", world / "c.jsonl", "--teacher", world / "model", "--out", "o.jsonl"]
    assert message in refused(*base, *arguments.split())
    left = {path.name for path in tmp_path.iterdir()} - {"o.work"}
    assert not left


def test_help_teaches(world, drama):
    for command in (("augment",), ("augment", "crops"), ("mine",)):
        shown = drama(*command, "--help")
        assert shown.exit_code == 0
        assert "--teacher ./" in shown.stdout
    assert "crops" in drama("augment", "--help").stdout
