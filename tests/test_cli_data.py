"""The data commands on real files: what they write and say, and one line for each bad input."""

import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from click.testing import CliRunner

from drama.cli import main
from drama.data.beir import read_corpus
from drama.data.manifest import read_manifest
from drama.data.records import Document, Record
from drama.data.sources import read_source
from drama.data.stream import ShardSet
from drama.data.writer import write_shards
from drama.testing import tiny_llama

ROOT = Path(__file__).resolve().parents[1]
SCIFACT = ROOT / "data" / "demo" / "scifact"


def drama(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def said(result):
    assert result.exit_code == 0, result.stderr
    return " ".join(result.stderr.split())


def refused(*arguments):
    """The one line of an error, of a command that ends with exit code 2."""
    result = drama(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("drama: error:")]
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    assert lines[0] == result.stderr.splitlines()[-1]
    return lines[0]


def sample(count, source="s", lang="en"):
    return [
        Record(
            f"query number {i} of {source}",
            (Document(f"positive {i} " + "long " * (i % 50), "title"),),
            (Document(f"negative {i} 日本"), Document("other", id=f"n{i}")),
            query_id=f"q{i}",
            prompt="Find: " if i % 2 else "",
            source=source,
            lang=lang,
            scores={f"n{i}": 0.5} if i % 3 == 0 else None,
        )
        for i in range(count)
    ]


def write(path, records):
    Path(path).write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    return path


def read_all(folder):
    shards = ShardSet([folder])
    return [shards.read(index) for index in range(len(shards))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a.jsonl", sample(40, "a"))
    write("b.jsonl", sample(7, "b", "ja"))
    return tmp_path


def test_shard_with_all_its_options(here, model):
    query = json.loads((SCIFACT / "queries.jsonl").read_text().splitlines()[0])["text"]
    bad = [Record(query, (Document("fresh"),)), *sample(3, "c")]
    write("c.jsonl", bad)
    with open("c.jsonl", "a") as file:
        file.write("broken\n")
    options = ["--name", "mixed", "--shard-size", "20KB", "--workers", "2", "--on-bad", "skip"]
    options += ["--tokenizer", model, "--query-prefix", "Q: ", "--document-prefix", "D: "]
    options += ["--max-tokens", "30", "--decontaminate", SCIFACT]
    text = said(drama("shard", "a.jsonl", "jp:2=b.jsonl", "c.jsonl", *options, "--out", "out"))
    assert "50 records in" in text
    assert "(a 40, c 3, jp 7)" in text
    assert "left out, in scifact: 1 left out, invalid JSON: 1" in text
    assert "each one is listed in out/bad.jsonl" in text
    manifest = read_manifest("out")
    assert manifest.weights == {"jp": 2.0}
    assert manifest.tokens.query_prefix == "Q: "
    assert manifest.tokens.document_prefix == "D: "
    assert manifest.tokens.max_tokens == 30
    assert {shard.file.split("-")[0] for shard in manifest.shards} == {"mixed"}
    assert all(shard.bytes <= 20 * 1024 + 10240 for shard in manifest.shards)
    assert len(Path("out/bad.jsonl").read_text().splitlines()) == 2
    assert "50 records, all sound" in said(drama("verify", "out"))


def test_queries_that_come_twice_are_shown(here):
    records = [*sample(3), *sample(1), Record("query number 0 of ss", (Document("p"),), source="s")]
    write("twice.jsonl", records)
    text = said(drama("shard", "twice.jsonl", "--out", "out"))
    assert "queries that come twice: 1 exactly, " in text
    assert "nearly (all kept)" in text
    assert read_manifest("out").num_records == 5
    assert "queries that come twice: 1 exactly" in said(drama("shards", "out"))


def test_a_lone_test_split_is_warned_of(here):
    told = said(drama("shard", SCIFACT, "--out", here / "test-set"))
    assert f"warning: {SCIFACT} has no train split, so its test split is taken" in told
    write(here / "pairs.jsonl", sample(3))
    assert "warning" not in said(drama("shard", here / "pairs.jsonl", "--out", here / "pairs"))


def test_texts(here, model):
    """Shard, look, check, join and turn back, with and without token ids."""
    long = "the bees of the north carry honey over the hills"
    rows = [{"text": long, "title": "Bees", "url": "u"}, {"text": long, "title": "BEES"}]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open("book.txt.gz", "wt") as file:
        file.write("one\n\ntwo [/b]\n")
    text = said(drama("shard", "web:2=t.jsonl", "book.txt.gz", "--out", "out", "--workers", "2"))
    assert "out: 4 records in 2 shards (book 2, web 2)" in text
    assert "texts that come twice: 1 exactly, 0 nearly (all kept)" in text
    assert "4 records, all sound" in said(drama("verify", "out"))
    text = said(drama("shards", "out", "--examples", "4"))
    assert "texts without a query: 4" in text
    assert "texts that come twice: 1 exactly" in text
    assert f'record 0 text "Bees {long}"' in text
    assert 'record 3 text "two [/b]"' in text
    assert "documents by characters" in text
    assert "quer" not in text.replace("texts without a query", "")
    tokenised = ["--tokenizer", model, "--document-prefix", "D: "]
    drama("shard", "t.jsonl", "--out", "tokens", *tokenised)
    lengths = ShardSet(["tokens"]).read_tokens(0).lengths.tolist()
    assert lengths[0] == 0
    assert f"tokens [{lengths[1]}]" in said(drama("shards", "tokens", "--examples", "1"))
    said(drama("shard", SCIFACT, "--text", "text", "--out", "scifact"))
    assert read_manifest("scifact").num_records == len(list(read_corpus(SCIFACT)))
    drama("shard", "a.jsonl", "--text", "query", "--out", "queries")
    assert read_all("queries")[3].positives[0].text == "query number 3 of a"
    drama("shard", "a.jsonl", "--out", "pairs")
    drama("merge", "pairs", "out", "--out", "both")
    text = said(drama("shards", "both", "--examples", "44"))
    for part in (
        "44 records",
        "texts without a query: 4",
        "queries by characters",
        "record 43 text",
    ):
        assert part in text
    drama("convert", "both", "--out", "both.jsonl")
    assert (
        list(read_source("both.jsonl")) == read_all("both") == read_all("pairs") + read_all("out")
    )
    assert "no column 'txt' for the text (did you mean 'text'?)" in refused(
        "shard", "t.jsonl", "--text", "txt", "--out", "x"
    )
    assert "out: 4 of its 4 records are texts without a query" in refused(
        "teach", "out", "--model", model, "--out", "x"
    )
    assert not Path("x").exists()


def test_shards_shows_what_is_inside(here, model):
    drama("shard", "a.jsonl", "jp:2=b.jsonl", "--tokenizer", model, "--out", "out")
    text = said(drama("shards", "out", "--examples", "2"))
    for part in ("out: 47 records in 2 shards", "token ids of tokenizer", "85.1%", "█", "ja"):
        assert part in text
    assert "record 0 " in text
    assert "record 23 " in text
    assert "record 46" not in text
    assert '"query number 0 of a"' in text
    assert "tokens [" in text
    assert "record 0" not in said(drama("shards", "out", "--examples", "0"))


def test_shards_shows_strange_names_as_they_are(here):
    """Brackets are markup for the library that draws the tables."""
    write_shards(sample(2, "[/b]", "[red]"), "out")
    text = said(drama("shards", "out"))
    assert "[/b]" in text
    assert "[red]" in text


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_convert_and_back(here, suffix):
    drama("shard", "a.jsonl", "b.jsonl", "--out", "out", "--shard-size", "10KB")
    path = Path(f"back.jsonl{suffix}")
    assert "47 records" in said(drama("convert", "out", "--out", path))
    unpack = {
        "": bytes,
        ".gz": gzip.decompress,
        ".xz": lzma.decompress,
        ".zst": lambda content: pyarrow.CompressedInputStream(
            pyarrow.BufferReader(content), "zstd"
        ).read(),
    }[suffix]
    rows = [json.loads(line) for line in unpack(path.read_bytes()).splitlines()]
    assert [Record.from_json(row) for row in rows] == read_all("out")
    assert list(read_source(path)) == read_all("out")
    first = path.read_bytes()
    drama("convert", "out", "--out", path)
    assert path.read_bytes() == first
    drama("shard", path, "--out", "again", "--shard-size", "10KB")
    assert read_all("again") == read_all("out") == sample(40, "a") + sample(7, "b", "ja")
    assert sorted(p.name for p in here.iterdir() if p.name.startswith(".")) == []


def test_merge(here, model):
    drama("shard", "a:2=a.jsonl", "--out", "one", "--shard-size", "10KB")
    drama("shard", "b.jsonl", "--out", "two", "--name", "other")
    text = said(drama("merge", "one", "two", "--out", "both", "--name", "all"))
    assert "both: 47 records in" in text
    assert read_all("both") == read_all("one") + read_all("two")
    manifest = read_manifest("both")
    assert manifest.weights == {"a": 2.0}
    for key in ("query_chars", "document_chars"):
        parts = [getattr(read_manifest(name), key) for name in ("one", "two")]
        assert sum(getattr(manifest, key).values()) == sum(sum(p.values()) for p in parts)
    assert "all sound" in said(drama("verify", "both"))
    drama("shard", "b.jsonl", "--out", "tokens", "--tokenizer", model)
    assert "tokenised in different ways" in refused("merge", "one", "tokens", "--out", "x")
    assert "is one of the folders to be merged" in refused("merge", "one", "two", "--out", "one")
    drama("shard", "a:3=b.jsonl", "--out", "three")
    assert "source 'a' has weight 2 and 3" in refused("merge", "one", "three", "--out", "x")
    os.truncate("two/other-000000.tar", 1000)
    assert "truncated: two/other-000000.tar" in refused("merge", "one", "two", "--out", "x")
    assert not Path("x").exists()


@pytest.fixture
def bad(here):
    """A working folder with bad inputs."""
    Path("broken.jsonl").write_text(Path("a.jsonl").read_text() + '{"query": \n')
    Path("empty.jsonl").write_text("")
    Path("cut.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes())[:-20])
    Path("random").write_bytes(random.Random(0).randbytes(5000))
    Path("bad.parquet").write_bytes(b"PAR1" + random.Random(1).randbytes(3000) + b"PAR1")
    Path("array.json").write_text('[{"anchor": "q", "positive": "p"}, 3]')
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("x")
    write_shards(sample(5), "good")
    write_shards(sample(5), "flipped")
    tar = Path("flipped/train-000000.tar")
    tar.write_bytes(tar.read_bytes().replace(b"query number 3", b"query number 4"))
    write_shards(sample(5), "old")
    text = Path("old/manifest.json").read_text()
    Path("old/manifest.json").write_text(text.replace('"schema_version": 2', '"schema_version": 1'))
    write_shards(sample(5), "edited")
    text = Path("edited/manifest.json").read_text()
    Path("edited/manifest.json").write_text(text.replace('"lang": "en"', '"lang": "de"'))
    return here


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("shard none.jsonl --out x", "none.jsonl does not exist"),
        ("shard broken.jsonl --out x", "broken.jsonl:41: invalid JSON"),
        ("shard broken.jsonl --out x --workers 2", "broken.jsonl:41: invalid JSON"),
        ("shard empty.jsonl --out x", "empty.jsonl holds no records"),
        ("shard cut.gz --out x", "cut.gz: the compressed file is cut or damaged"),
        ("shard random --out x", "random:1: invalid UTF-8"),
        ("shard bad.parquet --out x", "bad.parquet: damaged parquet after row 0"),
        ("shard array.json --out x", "array.json: after item 0: an item must be a JSON object"),
        ("shard mine --out x", "mine is neither a BEIR folder"),
        ("shard q:0=a.jsonl --out x", "the weight must be a positive number"),
        ("shard q:x=a.jsonl --out x", "q:x=a.jsonl does not exist"),
        ("shard a.jsonl a.jsonl --out x", "are both called 'a'"),
        ("shard a.jsonl --out mine", "mine exists and is no folder of shards"),
        ("shard a.jsonl --out x --name ../y", "shard name '../y'"),
        ("shard a.jsonl --out x --shard-size 256", "size '256': write a number with"),
        ("shard a.jsonl --out x --shard-size 0MB", "size '0MB'"),
        ("shard a.jsonl --out x --tokenizer none", "none: no tokenizer"),
        ("shard a.jsonl --out x --decontaminate mine", "mine is no BEIR folder"),
        ("shard a.jsonl --out x --max-tokens 9", "--max-tokens is for token ids; give --tokenizer"),
        ("shard http://127.0.0.1:9/x.jsonl --out x", "http://127.0.0.1:9/x.jsonl"),
        ("shard nonsense://x.jsonl --out x", "nonsense://x.jsonl"),
        ("shards none", "none is no folder of shards"),
        ("shards mine", "mine has no manifest.json"),
        ("shards old", "old/manifest.json: has schema version 1; this program reads version 2"),
        ("shards edited", "edited/manifest.json: was changed since it was written"),
        ("shards flipped --examples 5", "record 3 at byte"),
        ("shards http://127.0.0.1:9/x", "http://127.0.0.1:9/x/manifest.json cannot be read"),
        ("verify none", "none is no folder of shards"),
        ("verify flipped", "flipped/train-000000.tar: record 3 at byte"),
        ("merge good --out mine", "mine exists and is no folder of shards"),
        ("merge good none --out x", "none is no folder of shards"),
        ("merge good --out x --name /", "shard name '/'"),
        ("convert flipped --out x.jsonl", "record 3 at byte"),
        ("convert none --out x.jsonl", "none is no folder of shards"),
        ("convert good --out mine", "mine is a folder"),
    ],
)
def test_one_line_and_exit_code_2(bad, monkeypatch, command, message):
    monkeypatch.setattr("drama.data.remote.FIRST_PAUSE_S", 0.001)
    before = sorted(path.name for path in bad.iterdir())
    assert message in refused(*command.split())
    assert sorted(path.name for path in bad.iterdir()) == before


def test_as_a_program(here):
    """In a process of its own: exit code, one line on stderr, nothing on stdout."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "drama.cli", "verify", "none"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    want = "drama: error: none is no folder of shards: there is no such folder\n"
    assert done.stderr == want
