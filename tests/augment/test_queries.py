"""Queries of a model for a small corpus: in order, counted, paid once, whatever ends the job."""

import json
import threading
from collections import Counter

import pytest
from aiohttp import web

from drama.augment import queries as module
from drama.augment.asking import Asking
from drama.augment.corpus import Corpus
from drama.augment.job import Job
from drama.augment.llm import IncompleteError
from drama.augment.patience import Limits
from drama.augment.queries import make_queries
from drama.augment.teacher import Retrieval
from drama.augment.testing import ChatServer, answer_batch, completion, pretend, served
from drama.augment.windows import PAPER, Windows
from drama.data.sources import Source, read_source
from drama.errors import UserError

WINDOWS = Windows(depth=20, positives=(1, 4), negatives=(8, 20))
NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture
def run(llm_world, tmp_path):
    def call(url, out="out.jsonl", windows=WINDOWS, corpus="c.jsonl", **options):
        source = (Source.parse(llm_world / corpus),)
        retrieval = Retrieval(source, str(llm_world / "model"), tmp_path / f"work-{corpus}")
        options.setdefault("limits", Limits(16))
        cache = options.pop("cache", tmp_path / "answers.sqlite")
        asking = Asking("tiny", url, cache, 256, 0.8, **options)
        return make_queries(retrieval, tmp_path / out, asking, windows)

    return call


def test_records_stand_in_the_corpus_order_with_the_papers_ranks(run, server, tmp_path):
    report = run(server.url, windows=PAPER)
    corpus = list(Corpus(tmp_path / "work-c.jsonl" / "corpus").read())
    records = list(read_source(tmp_path / "out.jsonl"))
    assert [r.query_id for r in records] == [f"query:{x.document.id}" for x in corpus]
    for record, item in zip(records, corpus, strict=True):
        text = " ".join(item.document.full_text.split())
        asked = pretend(f"Task, query (in the language <document>\n{text}\n</document>")
        assert record.query == asked.split("\n")[1].removeprefix("Query: ")
        assert len(record.positives) == 10
        assert 20 <= len(record.negatives) <= 21
        assert (record.lang, record.prompt) == ("en", "")
        assert set(record.scores) == {d.id for d in (*record.positives, *record.negatives)}
    assert report["labels"] == {"task": {"no form named": 60}}  # "find it."
    assert report["llm"] == {"prompt tokens": 420, "completion tokens": 180, "calls": 60}
    assert report["llm_this_run"]["sent"] == 60
    assert max(server.paid.values()) == 1
    assert server.most_in_flight <= 16
    body = server.calls[0]
    assert (body["temperature"], body["max_tokens"]) == (0.8, 256)
    assert len({body["seed"] for body in server.calls}) == 60  # else they would be drawn alike
    run(server.url, windows=PAPER)  # is there already
    assert len(server.calls) == 60


def test_of_answers_that_were_cut_off_those_stay_that_got_beyond_the_query(run):
    async def behave(call):
        text, cut = pretend(call.prompt), len(call.prompt) % 2
        body = completion(text.rpartition("\n")[0] if cut else text)
        body["choices"][0]["finish_reason"] = "length"
        return web.json_response(body)

    with ChatServer(behave) as server:
        report = run(server.url)
        cut = sum(len(body["messages"][-1]["content"]) % 2 for body in server.calls)
    assert 0 < cut < 60
    assert report["dropped"] == {"answer cut off": cut}
    assert report["llm"]["answers cut off"] == 60


def test_answers_of_no_use_are_dropped_by_reason(run, tmp_path):
    def hostile(prompt):
        document = prompt.split("<document>\n")[1].split("\n</document>")[0]
        kinds = [
            pretend(prompt),
            "",
            "I cannot help with that.",
            "<think>for ever",
            f"Query: {document}",
            "Query: " + "\x00\ud7ff[1] > <|im_end|>" * 99,
            '{"query": 7, "task": [[[[',
            "Query: why does my skillet feel gummy after I oiled it in the oven",
        ]
        return kinds[len(document) % len(kinds)]

    with served(hostile) as server:
        report = run(server.url)
    assert report["records"] + sum(report["dropped"].values()) == 60
    assert report["records"] == len(list(read_source(tmp_path / "out.jsonl"))) > 0
    assert {"empty answer", "refusal", "copies the document"} <= set(report["dropped"])
    assert report["dropped"]["copies an example of the prompt"] > 0


def test_kinds_of_tasks_are_counted_for_what_is_kept(run, tmp_path):
    lines = ["Task: Given a claim, find it.", "Task: Given a question, find it.", "", "Task: Bees."]
    kinds = ["claim", "question", "no task given", "not recognised"]

    def model(prompt):
        number = len(prompt.split("<document>\n")[1].split("\n</document>")[0]) % 5
        return "" if number == 4 else f"{lines[number]}\n" + pretend(prompt).split("\n", 1)[1]

    with served(model) as server:
        report = run(server.url)
    corpus = Corpus(tmp_path / "work-c.jsonl" / "corpus").read()
    numbers = [len(" ".join(item.document.full_text.split())) % 5 for item in corpus]
    assert report["dropped"] == {"empty answer": numbers.count(4)}
    assert report["labels"] == {"task": Counter(kinds[n] for n in numbers if n != 4)}


def test_refused_requests_are_dropped_and_counted(run):
    async def refuse(call):
        from aiohttp import web

        if len(call.prompt) % 3 == 0:
            return web.json_response({"error": {"message": "too long"}}, status=400)
        return pretend(call.prompt)

    with ChatServer(refuse) as server:
        report = run(server.url)
    assert report["dropped"] == {"refused by the server, HTTP 400": 60 - report["records"]}


def test_a_spent_budget_is_one_line_and_the_position_is_kept(run, server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 10)
    with pytest.raises(IncompleteError, match="the budget of 300 tokens is spent") as fault:
        run(server.url, limits=Limits(4, max_tokens_total=300))
    assert "\n" not in str(fault.value)
    paid = sum(server.paid.values())
    assert 30 <= paid < 34
    journal = json.loads((tmp_path / ".out.jsonl.partial" / "journal.json").read_text())
    assert journal["start"] in (20, 30)
    with pytest.raises(IncompleteError):
        run(server.url, limits=Limits(max_tokens_total=0))
    assert sum(server.paid.values()) == paid
    run(server.url)
    assert sum(server.paid.values()) == 60
    assert max(server.paid.values()) == 1


def test_without_a_server_the_rest_goes_into_a_batch_file_and_comes_back(run, server, tmp_path):
    with pytest.raises(IncompleteError):
        run(server.url, limits=Limits(1, max_tokens_total=100))
    batch, results = tmp_path / "todo.jsonl", tmp_path / "answers.jsonl"
    with pytest.raises(IncompleteError, match="--batch-results RESULTS"):
        run(NOWHERE, batch=batch)
    assert answer_batch(batch, results) == 50
    report = run(NOWHERE, batch=tmp_path / "more.jsonl", results=(results,))
    assert report["records"] == 60
    assert not (tmp_path / "more.jsonl").exists()
    run(server.url, "served.jsonl", cache=tmp_path / "other.sqlite")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "served.jsonl").read_bytes()
    with pytest.raises(UserError, match="gone.jsonl does not exist"):
        run(NOWHERE, "third.jsonl", results=(tmp_path / "gone.jsonl",))


def test_copies_are_asked_once_and_a_named_language_stays(run, llm_world, server, tmp_path):
    rows = [json.loads(line) for line in (llm_world / "c.jsonl").read_text().splitlines()[:20]]
    rows = [{**row, "lang": "sv"} for row in rows]
    rows.append({**rows[0], "_id": "copy"})
    (llm_world / "copies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    windows = Windows(depth=10, positives=(1, 2), negatives=(4, 10))
    report = run(server.url, corpus="copies.jsonl", windows=windows)
    assert sum(server.paid.values()) == 20
    assert report["duplicate_queries"]["exact"] == 1
    assert report["languages"] == {"sv": 21}


def test_a_fault_while_records_are_written_ends_all_threads(run, server, monkeypatch):
    def broken(self, result):
        raise OSError(28, "no space left")

    monkeypatch.setattr(Job, "_take", broken)
    with pytest.raises(OSError, match="no space"):
        run(server.url)
    assert not [t for t in threading.enumerate() if t.name.startswith("drama")]
