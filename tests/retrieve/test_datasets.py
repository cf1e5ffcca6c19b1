"""Test sets in the layouts that upstream uses, built small, and what is read from them."""

from __future__ import annotations

import gzip
import lzma
import shutil
from pathlib import Path

import pytest

from drama.data.beir import read_corpus, read_qrels, read_queries
from drama.errors import UserError
from drama.retrieve.datasets import beir_folder, check_names, find_datasets, read_facts
from drama.retrieve.evaluate import evaluate


def test_a_beir_folder_is_one_set(dataset: Path):
    (found,) = find_datasets(dataset)
    assert (found.name, found.layout, found.split, found.lang) == ("facts", "beir", "test", "")
    assert beir_folder(found, dataset / "nowhere") == dataset


def test_a_folder_of_beir_folders_is_a_set_a_language(dataset: Path, tmp_path: Path):
    for lang in ("de", "zh-Hans", "notes"):
        shutil.copytree(dataset, tmp_path / "xquad" / lang)
    (tmp_path / "xquad" / "README.md").write_text("no set")
    found = find_datasets(tmp_path / "xquad")
    assert [(d.name, d.group, d.lang) for d in found] == [
        ("xquad-de", "xquad", "de"),
        ("notes", "xquad", ""),
        ("xquad-zh-Hans", "xquad", "zh-Hans"),
    ]


@pytest.mark.parametrize("packing", ["gz", "xz"])
def test_packed_files(dataset: Path, packing: str):
    pack = {"gz": gzip.compress, "xz": lzma.compress}[packing]
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        path = dataset / name
        path.with_name(f"{path.name}.{packing}").write_bytes(pack(path.read_bytes()))
        path.unlink()
    plain = evaluate(dataset, {"bm25": "bm25"})
    assert plain.systems["bm25"].metrics["MRR@10"] == 1.0


@pytest.mark.parametrize(
    ("layout", "argument", "split", "name", "lang"),
    [
        ("miracl", "sw", "dev", "miracl-sw", "sw"),
        ("mldr", "hi", "test", "mldr-hi", "hi"),
        ("parquet", "facts", "test", "facts", ""),
    ],
)
def test_upstreams_layouts(upstream, layout, argument, split, name, lang, tmp_path: Path):
    folder = getattr(upstream, layout)(tmp_path / "root", argument)
    (found,) = find_datasets(folder)
    assert (found.name, found.split, found.lang) == (name, split, lang)
    beir = beir_folder(found, tmp_path / "out")
    documents = list(read_corpus(beir))
    assert [d.id for d in documents] == [row[0] for row in upstream.documents]
    expected = [f"{title} {text}".strip() for _, title, text in upstream.documents]
    assert [d.full_text for d in documents] == expected
    positive = {q: {d: g for d, g in grades.items() if g} for q, grades in upstream.qrels.items()}
    if found.layout == "mldr":
        assert read_queries(beir) == upstream.judged
        assert read_qrels(beir, split) == {q: dict.fromkeys(g, 1) for q, g in positive.items()}
    else:
        assert read_queries(beir) == upstream.queries
        assert read_qrels(beir, split) == upstream.qrels
    # rewritten once, and again when the source changes
    before = (beir / "corpus.jsonl.gz").stat().st_mtime_ns
    assert beir_folder(found, tmp_path / "out") == beir
    assert (beir / "corpus.jsonl.gz").stat().st_mtime_ns == before
    for file in (*folder.rglob("*.jsonl.gz"), *folder.rglob("*.tsv")):
        file.touch()
    beir_folder(found, tmp_path / "out")
    assert (beir / "corpus.jsonl.gz").stat().st_mtime_ns != before


def test_a_root_of_upstreams_layout_is_a_set_a_language(upstream, tmp_path: Path):
    for lang in ("sw", "ar"):
        upstream.miracl(tmp_path / "root", lang)
    found = find_datasets(tmp_path / "root")
    assert [(d.name, d.group, d.lang) for d in found] == [
        ("miracl-ar", "miracl", "ar"),
        ("miracl-sw", "miracl", "sw"),
    ]
    results = evaluate(tmp_path / "root", {"bm25": "bm25"})
    assert list(results.datasets) == ["miracl-ar", "miracl-sw"]
    assert results.split == "dev"
    assert results.systems["bm25"].metrics["MRR@10"] == 1.0


def test_facts_are_read_once_and_count_unknown_documents(dataset: Path, tmp_path: Path, capsys):
    cache = tmp_path / "facts.json"
    facts = read_facts(dataset, "test", cache)
    assert (facts.num_documents, facts.num_queries, facts.num_judgements) == (8, 3, 6)
    assert (facts.num_unknown, facts.unknown) == (1, "gone")
    text = cache.read_text()
    cache.write_text(text.replace('"num_documents": 8', '"num_documents": 9'))
    assert read_facts(dataset, "test", cache).num_documents == 9  # taken from the cache
    (dataset / "queries.jsonl").write_text(
        (dataset / "queries.jsonl").read_text().replace("bread", "dough")
    )
    changed = read_facts(dataset, "test", cache)
    assert changed.num_documents == 8
    assert changed.sha256 != facts.sha256
    line = "1 judgements name documents that the corpus lacks ('gone' first); they count as missed"
    assert line in " ".join(capsys.readouterr().err.split())


def test_faults_are_one_clear_line(dataset: Path, tmp_path: Path):
    with pytest.raises(UserError, match="nowhere is no test set; give a BEIR folder"):
        find_datasets(tmp_path / "nowhere")
    with pytest.raises(UserError, match="two test sets are called facts, .*facts and .*facts"):
        check_names(find_datasets(dataset) * 2)
    corpus = dataset / "corpus.jsonl"
    text = corpus.read_text()
    corpus.write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"corpus.jsonl:9: document 'd1' stands in the corpus tw"):
        read_facts(dataset, "test", None)
    corpus.write_text("")
    with pytest.raises(UserError, match=r"facts holds no documents"):
        read_facts(dataset, "test", None)


def test_faults_of_upstreams_layouts(upstream, jsonl_gz, tmp_path: Path):
    miracl = upstream.miracl(tmp_path, "yo")
    (found,) = find_datasets(miracl)
    qrels = next((miracl / "qrels").iterdir())
    qrels.write_text("q1 Q0 d1\n")
    with pytest.raises(UserError, match=r"yo-dev.tsv:1: 3 columns, expected query, Q0, document"):
        beir_folder(found, tmp_path / "out")
    assert not (tmp_path / "out" / "beir").exists()
    with pytest.raises(UserError, match=r"topics has 0 files \*-tset.tsv, expected one; it has to"):
        beir_folder(find_datasets(miracl, "tset")[0], tmp_path / "out")
    for path in (tmp_path / "miracl-corpus-v1.0-yo").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"no passages; put miracl-corpus-v1.0-yo/docs-\*.jsonl.gz"):
        beir_folder(found, tmp_path / "out")
    mldr = upstream.mldr(tmp_path, "th")
    jsonl_gz(mldr / "test.jsonl.gz", [{"query_id": "q", "query": "x"}])
    with pytest.raises(UserError, match=r"test.jsonl.gz:1: the line has no list 'positive_pass"):
        beir_folder(find_datasets(mldr)[0], tmp_path / "out")
    (parquet,) = find_datasets(upstream.parquet(tmp_path, "p"))
    (tmp_path / "p" / "corpus" / "corpus-00001-of-00002.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"corpus-00001-of-00002.parquet cannot be read"):
        beir_folder(parquet, tmp_path / "out")
