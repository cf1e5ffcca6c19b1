"""Suites: which sets, where they are, and how they are fetched from a hub of our own."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from drama.errors import UserError
from drama.retrieve.datasets import beir_folder
from drama.retrieve.evaluate import evaluate
from drama.retrieve.suite import (
    download,
    load_suite,
    published_sizes,
    shipped_suites,
    suite_datasets,
)


def test_the_shipped_suites_are_the_papers():
    assert shipped_suites() == ["beir-13", "miracl-18", "mldr-13"]
    suites = {name: load_suite(name) for name in shipped_suites()}
    for name, suite in suites.items():
        assert suite.name == name
        assert len(suite.datasets) == int(name.rpartition("-")[2])
        assert suite.metric == "nDCG@10"
        assert all(entry.queries and entry.documents for entry in suite.datasets)
    languages = {entry.lang for entry in suites["miracl-18"].datasets}
    assert len(languages) == 18
    assert {"de", "yo"} < languages  # the two without training data
    assert "msmarco" not in published_sizes()
    assert published_sizes()["scifact"] == (300, 5183)
    # the total of MLDR's data card
    assert sum(entry.documents for entry in suites["mldr-13"].datasets) == 493_709


def write_suite(path: Path, **changes: object) -> Path:
    value = {
        "name": "small",
        "split": "test",
        "folders": ["{lang}", "mldr-v1.0-{lang}"],
        "datasets": [
            {"name": "one", "lang": "hi", "group": "asia"},
            {"name": "two", "lang": "sw", "path": "miracl-v1.0-sw", "split": "dev"},
        ],
    }
    path.write_text(yaml.safe_dump({**value, **changes}), encoding="utf-8")
    return path


def test_a_suite_of_ones_own(upstream, tmp_path: Path):
    upstream.mldr(tmp_path / "root", "hi")
    upstream.miracl(tmp_path / "root", "sw")
    suite = load_suite(write_suite(tmp_path / "small.yaml"))
    found = suite_datasets(suite, tmp_path / "root")
    assert [(d.name, d.layout, d.lang, d.group, d.split) for d in found] == [
        ("one", "mldr", "hi", "asia", "test"),
        ("two", "miracl", "sw", "", "dev"),
    ]
    results = evaluate(found, {"bm25": "bm25"}, name=suite.name)
    assert results.dataset == "small"
    assert list(results.groups) == ["asia"]
    one = results.datasets["one"].systems["bm25"].metrics["nDCG@10"]
    two = results.datasets["two"].systems["bm25"].metrics["nDCG@10"]
    assert results.systems["bm25"].metrics["nDCG@10"] == pytest.approx((one + two) / 2)
    assert results.groups["asia"]["bm25"].metrics["nDCG@10"] == pytest.approx(one)


def test_upstreams_folder_names_are_found(upstream, tmp_path: Path):
    suite = load_suite("miracl-18")
    for entry in suite.datasets:
        upstream.miracl(tmp_path, entry.lang)
    found = suite_datasets(suite, tmp_path)
    assert [d.name for d in found] == [entry.name for entry in suite.datasets]
    assert found[0].queries == 2896


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nmae": 1}, r"small.yaml: nmae: Extra inputs are not permitted"),
        ({"datasets": []}, r"small.yaml: datasets: List should have at least 1 item"),
        ({"datasets": [{"name": "../x"}]}, r"small.yaml: datasets.0.name: String should match"),
        ({"datasets": [{"name": "a"}, {"name": "a"}]}, r"two datasets are called a"),
        ({"metric": "ndgc@10"}, r"unknown metric 'ndgc@10' \(did you mean 'nDCG@10'\?\)"),
    ],
)
def test_a_faulty_suite(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        load_suite(write_suite(tmp_path / "small.yaml", **changes))


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no suite 'beir13' \(did you mean 'beir-13'\?\); there"):
        load_suite("beir13")
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(UserError, match=r"broken.yaml is not valid YAML"):
        load_suite(tmp_path / "broken.yaml")
    message = (
        r"suite beir-13: trec-covid and 12 more not found; looked for .*/trec-covid; --download "
        r"fetches what is missing"
    )
    with pytest.raises(UserError, match=message):
        suite_datasets(load_suite("beir-13"), tmp_path)
    with pytest.raises(UserError, match=r"suite small names no repositories of the hub"):
        download(load_suite(write_suite(tmp_path / "small.yaml")), tmp_path)


# -- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A server that speaks what `snapshot_download` needs: its address, its folder of
    repositories, and the files that were asked for."""
    home, served = tmp_path / "hub", []
    commit = "0" * 40

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, body: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "datasets"]:
                repo = home / parts[2] / parts[3]
                files = sorted(p for p in repo.rglob("*") if p.is_file())
                rows = [
                    {"type": "file", "path": str(p.relative_to(repo)), "size": p.stat().st_size,
                     "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
                    for p in files
                ]  # fmt: skip
                value: object = rows
                if parts[4] == "revision":
                    siblings = [{"rfilename": row["path"]} for row in rows]
                    value = {"id": "/".join(parts[2:4]), "sha": commit, "siblings": siblings}
                status = 200 if rows else 404
                self.answer(json.dumps(value).encode(), "application/json", status)
                return
            file = home.joinpath(*parts[1:3], *parts[5:])
            served.append(file.name)
            self.answer(file.read_bytes(), "application/octet-stream")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", home, served
    server.shutdown()
    server.server_close()


def test_download_a_suite(hub, upstream, tmp_path: Path):
    address, home, served = hub
    upstream.mldr(home / "Shitao" / "MLDR", "hi")
    parquet = upstream.parquet(home / "BeIR", "facts")
    (home / "BeIR" / "facts-qrels").mkdir()
    (parquet / "qrels" / "test.tsv").rename(home / "BeIR" / "facts-qrels" / "test.tsv")
    (parquet / "README.md").write_text("not asked for")
    beir = load_suite("beir-13")
    mldr = load_suite("mldr-13")
    facts = beir.datasets[0].model_copy(update={"name": "facts", "queries": 0, "documents": 0})
    hindi = next(entry for entry in mldr.datasets if entry.lang == "hi")
    suites = [
        beir.model_copy(update={"datasets": [facts]}),
        mldr.model_copy(update={"datasets": [hindi]}),
    ]
    options = {"endpoint": address, "cache_dir": tmp_path / "cache", "token": False}
    for suite in suites:
        download(suite, tmp_path / "root", **options)
    found = [d for suite in suites for d in suite_datasets(suite, tmp_path / "root")]
    assert [(d.name, d.layout) for d in found] == [("facts", "parquet"), ("mldr-hi", "mldr")]
    assert {"README.md", "train.jsonl.gz"}.isdisjoint(served)
    for dataset in found:
        assert (beir_folder(dataset, tmp_path / "out" / dataset.name) / "corpus.jsonl.gz").is_file()
    results = evaluate(found, {"bm25": "bm25"})
    assert results.systems["bm25"].metrics["MRR@10"] == 1.0
    # a repository that is not there
    entry = facts.model_copy(update={"name": "nosuch"})
    with pytest.raises(UserError, match=r"nosuch: cannot download BeIR/nosuch \("):
        download(beir.model_copy(update={"datasets": [entry]}), tmp_path / "root", **options)
