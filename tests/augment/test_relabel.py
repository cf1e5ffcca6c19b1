"""Hard negatives judged by a model: moved, dropped or left, and counted."""

import json
from collections import Counter

import pytest

from drama.augment import relabel as module
from drama.augment.asking import Asking
from drama.augment.llm import IncompleteError
from drama.augment.patience import Limits
from drama.augment.relabel import relabel
from drama.augment.testing import answer_batch, held_answers, killed, served
from drama.data.sources import Source, read_source

NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture
def given(llm_world):
    return list(read_source(llm_world / "pairs.jsonl"))


@pytest.fixture
def run(llm_world, tmp_path):
    def call(url, out="out.jsonl", found="move", limits=Limits(16), **options):  # noqa: B008
        asking = Asking("tiny", url, tmp_path / "answers.sqlite", 256, 0.0, limits=limits,
                        **options)  # fmt: skip
        return relabel([Source.parse(llm_world / "pairs.jsonl")], tmp_path / out, asking, found)

    return call


def hidden(record):
    return [document for document in record.negatives if "in truth" in document.text]


def calls_of(records):
    return sum(-(-len(record.negatives) // 20) for record in records)


def test_what_is_relevant_in_truth_becomes_a_positive(run, server, given, tmp_path):
    report = run(server.url)
    for before, after in zip(given, read_source(tmp_path / "out.jsonl"), strict=True):
        moved = tuple(hidden(before))
        assert after.positives == before.positives + moved
        assert after.negatives == tuple(d for d in before.negatives if d not in moved)
        assert after.scores == before.scores
        assert (after.query, after.lang) == (before.query, before.lang)
    found = sum(len(hidden(record)) for record in given)
    counts = Counter(report["llm"])
    assert counts["negatives that are relevant"] == found > 10
    assert counts["negatives that are right"] == sum(len(r.negatives) for r in given) - found
    assert counts["calls"] == calls_of(given) == sum(server.paid.values())


def test_or_is_dropped_with_its_score(run, server, given, tmp_path):
    report = run(server.url, found="drop")
    for before, after in zip(given, read_source(tmp_path / "out.jsonl"), strict=True):
        assert after.positives == before.positives
        assert not hidden(after)
        assert set(after.scores) == {d.id for d in (*after.positives, *after.negatives)}
    assert report["llm"]["negatives that are relevant"] == sum(len(hidden(r)) for r in given)


def test_without_a_judgement_a_negative_stays(run, given, tmp_path):
    def hostile(prompt):
        number = int(prompt.split("what does thing ")[1].split()[0])
        return ["", "[1] no\n[2] yes and no", "[1] yes\n[2] yes\n[1] no\n[999] yes"][number % 3]

    with served(hostile) as server:
        report = run(server.url)
    assert report["records"] == len(given)
    llm = report["llm"]
    empty = [record for n, record in enumerate(given) if n % 3 == 0]
    assert llm["answers of no use"] == calls_of(empty)
    assert llm["negatives without a judgement"] > sum(len(record.negatives) for record in empty)
    outcomes = [count for name, count in llm.items() if name.startswith("negatives ")]
    assert len(outcomes) == 3
    assert sum(outcomes) == sum(len(record.negatives) for record in given)
    for n, (before, after) in enumerate(
        zip(given, read_source(tmp_path / "out.jsonl"), strict=True)
    ):
        if n % 3 == 0:
            assert after == before


def test_a_killed_job_goes_on_to_the_same_bytes(run, llm_world, given, tmp_path, monkeypatch):
    with served(delay_s=lambda call: 0.05) as server:
        start = killed(
            tmp_path, "relabel", "BATCH = 4", tmp_path / "out.jsonl", "augment", "relabel",
            llm_world / "pairs.jsonl", "--model", "tiny", "--base-url", server.url,
            "--concurrency", "2", "--cache", tmp_path / "answers.sqlite",
        )  # fmt: skip
        assert 0 < start < len(given)
        monkeypatch.setattr(module, "BATCH", 4)
        held, before = held_answers(tmp_path / "answers.sqlite"), sum(server.paid.values())
        run(server.url)
        assert sum(server.paid.values()) - before == calls_of(given) - held
        run(server.url, "whole.jsonl")
        assert sum(server.paid.values()) - before == calls_of(given) - held
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_budget_and_batch_run(run, server, given, tmp_path):
    with pytest.raises(IncompleteError, match="budget of 50 tokens"):
        run(server.url, limits=Limits(1, max_tokens_total=50))
    batch, results = tmp_path / "todo.jsonl", tmp_path / "answers.jsonl"
    with pytest.raises(IncompleteError, match="go into"):
        run(NOWHERE, batch=batch)
    assert answer_batch(batch, results) == calls_of(given) - 5
    report = run(NOWHERE, batch=batch, results=(results,))
    assert report["records"] == len(given)
    assert report["llm_this_run"]["sent"] == 0
    assert json.loads((tmp_path / "out.report.json").read_text())["llm"] == report["llm"]
