"""Triplets without a corpus: drawn by number, read without trust, resumable."""

from collections import Counter

import pytest
from aiohttp import web

from drama.augment.asking import Asking
from drama.augment.grid import draw, draw_subject
from drama.augment.llm import IncompleteError
from drama.augment.patience import Limits
from drama.augment.testing import ChatServer, answer_batch, completion, pretend, served
from drama.augment.triplets import TripletOptions, make_triplets
from drama.data.sources import read_source
from drama.errors import UserError

NOWHERE = "http://127.0.0.1:9/v1"
NUMBER = 50


@pytest.fixture
def run(tmp_path):
    def call(url, out="out.jsonl", limits=Limits(16), cache="a.sqlite", **options):  # noqa: B008
        about = {"number": NUMBER} | {
            name: options.pop(name) for name in ("number", "languages") if name in options
        }
        asking = Asking("tiny", url, tmp_path / cache, 512, 1.0, limits=limits, **options)
        return make_triplets(tmp_path / out, asking, TripletOptions(**about))

    return call


def test_a_record_for_each_number_in_order(run, server, tmp_path):
    report = run(server.url)
    records = list(read_source(tmp_path / "out.jsonl"))
    assert [record.query_id for record in records] == [f"triplet:{n}" for n in range(NUMBER)]
    for number, record in enumerate(records):
        assert f"about number {number % 20} about" in record.query
        assert draw(0, number).query_length in record.query
        assert len(record.positives) == len(record.negatives) == 1
        assert (record.source, record.lang) == ("triplets", "en")
    forms = [draw(0, number) for number in range(NUMBER)]
    subjects = [draw_subject(0, number // 20) for number in range(NUMBER)]
    assert report["labels"] == {
        "task": Counter(subject.search for subject in subjects),
        "field": Counter(subject.topic for subject in subjects),
        "query length": Counter(form.query_length for form in forms),
        "document length": Counter(form.document_length for form in forms),
        "for whom": Counter(form.difficulty for form in forms),
        "clarity": Counter(form.clarity for form in forms),
    }
    assert report["llm"]["calls"] == NUMBER + 3  # three lists of tasks
    assert report["duplicate_queries"]["exact"] == 0
    tasks = [b for b in server.calls if "Write 20" in b["messages"][-1]["content"]]
    assert {body["seed"] for body in tasks} == {0, 1, 2}
    rest = [body for body in server.calls if body not in tasks]
    assert {body["seed"] for body in rest} == set(range(NUMBER))
    assert all(body["response_format"]["type"] == "json_schema" for body in rest)


def test_a_triplet_that_was_cut_off_is_none(run):
    async def behave(call):
        body = completion(pretend(call.prompt))
        body["choices"][0]["finish_reason"] = "length"
        return web.json_response(body)

    with ChatServer(behave) as server, pytest.raises(UserError, match=r"\(answer cut off 5\)"):
        run(server.url, number=5)


def test_a_shorter_run_is_the_beginning_of_a_longer_one(run, server, tmp_path):
    run(server.url, "short.jsonl", number=25)
    paid = sum(server.paid.values())
    run(server.url, number=45)
    short = (tmp_path / "short.jsonl").read_text().splitlines()
    assert (tmp_path / "out.jsonl").read_text().splitlines()[:25] == short
    assert sum(server.paid.values()) == paid + 21  # 20 triplets and a list


def test_answers_of_no_use_are_dropped_by_reason(run):
    def hostile(prompt):
        answers = ["", "I cannot help with that.", '{"query": "a', "{}", pretend(prompt)]
        if "Write 20" in prompt:
            return "" if "animals" in prompt else pretend(prompt)
        return answers[int(prompt.split("question number ")[1].split()[0]) % 5]

    with served(hostile) as server:
        report = run(server.url)
    assert report["records"] + sum(report["dropped"].values()) == NUMBER
    assert report["dropped"]["no task: empty answer"] == 20
    assert report["records"] == report["dropped"]["empty answer"] == 6
    assert report["dropped"]["refusal"] == 6


def test_without_a_task_the_whole_list_is_dropped(run):
    nothing = pytest.raises(UserError, match=r"no records to write \(no task: empty answer 50\)")
    with served(lambda p: "" if "Write 20" in p else pretend(p)) as server, nothing:
        run(server.url)
    assert sum(server.paid.values()) == 3


def test_a_batch_run_takes_two_rounds(run, server, tmp_path):
    batch, results = tmp_path / "todo.jsonl", tmp_path / "answers.jsonl"
    for requests in (3, NUMBER):
        with pytest.raises(IncompleteError, match=f"{requests} requests without an answer"):
            run(NOWHERE, batch=batch, results=(results,) if results.exists() else ())
        assert answer_batch(batch, results) == requests
    run(NOWHERE, batch=batch, results=(results,))
    run(server.url, "served.jsonl", cache="b.sqlite")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "served.jsonl").read_bytes()


def test_a_spent_budget_goes_on(run, server):
    with pytest.raises(IncompleteError, match="budget"):
        run(server.url, limits=Limits(2, max_tokens_total=250))
    run(server.url)
    assert sum(server.paid.values()) == NUMBER + 3
    assert max(server.paid.values()) == 1


def test_languages_are_checked_and_drawn():
    with pytest.raises(UserError, match="'germn' is not known"):
        TripletOptions(1, ("en", "germn"))
    with pytest.raises(UserError, match="languages is empty"):
        TripletOptions(1, ())
    with pytest.raises(UserError, match="number 0"):
        TripletOptions(0)
