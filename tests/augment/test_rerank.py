"""The orders of a model over what a teacher finds: ranks, windows, repairs, resuming."""

import json

import numpy as np
import pytest

from drama.augment import rerank as module
from drama.augment.asking import Asking
from drama.augment.corpus import Corpus
from drama.augment.llm import IncompleteError
from drama.augment.patience import Limits
from drama.augment.rerank import RerankOptions, rerank
from drama.augment.teacher import Retrieval
from drama.augment.testing import answer_batch, held_answers, pretend, served
from drama.augment.windows import Windows
from drama.data.sources import Source, read_source
from drama.encoder import Encoder
from drama.errors import UserError

NOWHERE = "http://127.0.0.1:9/v1"
RECORDS = 30


@pytest.fixture
def run(llm_world, tmp_path):
    def call(url, out="out.jsonl", rerank_options=None, records="pairs.jsonl", **options):
        retrieval = Retrieval(
            (Source.parse(llm_world / "c.jsonl"),), str(llm_world / "model"), tmp_path / "work"
        )
        options.setdefault("limits", Limits(16))
        asking = Asking("tiny", url, tmp_path / "answers.sqlite", 256, 0.0, **options)
        sources = [Source.parse(llm_world / records)]
        given = rerank_options or RerankOptions()
        return rerank(sources, retrieval, tmp_path / out, asking, given)

    return call


@pytest.fixture
def teachers(llm_world, tmp_path):
    """For a query, the documents of the corpus and their scores, best first."""

    def ranked(query):
        items = list(Corpus(tmp_path / "work" / "corpus").read())
        encoder = Encoder.from_pretrained(llm_world / "model")
        vectors = encoder.encode([item.document.full_text for item in items], "document")
        scores = vectors.astype(np.float16).astype(np.float32) @ encoder.encode([query], "query")[0]
        order = np.argsort(-scores, kind="stable")
        return [(items[n].document.id, float(scores[n])) for n in order]

    return ranked


def test_the_first_of_the_models_order_is_the_positive(run, server, teachers, llm_world, tmp_path):
    report = run(server.url)
    given = list(read_source(llm_world / "pairs.jsonl"))
    records = list(read_source(tmp_path / "out.jsonl"))
    assert [record.query for record in records] == [record.query for record in given]
    ranked = teachers(records[3].query)[:20]
    turned = ranked[::-1]  # the pretended model turns the order round
    assert records[3].positives[0].id == turned[0][0]
    assert [document.id for document in records[3].negatives] == [id_ for id_, _ in turned[9:20]]
    for id_, score in records[3].scores.items():
        assert score == pytest.approx(dict(ranked)[id_], abs=1e-3)
    assert report["llm"]["calls"] == RECORDS
    assert report["llm"].get("orders repaired", 0) == 0
    assert report["own_ranks"] == {}


def test_the_document_that_a_query_was_made_from_is_no_negative(run, server, llm_world, tmp_path):
    """It is the teacher's first; the pretended model puts it last, among the negatives' ranks."""
    corpus = [json.loads(x) for x in (llm_world / "c.jsonl").read_text().splitlines()][:12]
    ids = [row.get("_id") or row["id"] for row in corpus]
    rows = [
        {"query": f"{row.get('title', '')} {row['text']}".strip(), "query_id": f"{kind}:{id_}",
         "positives": [{"id": id_, "text": row["text"]}], "negatives": []}
        for row, id_, kind in zip(corpus, ids, ["query", "crop", "mine"] * 4, strict=True)
    ]  # fmt: skip
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(server.url, records=path)
    counted = {"kept": 0, "others": 0}
    for record in read_source(tmp_path / "out.jsonl"):
        kind, _, own = record.query_id.partition(":")
        found = own in {document.id for document in record.negatives}
        assert found == (kind == "mine")
        counted["others" if kind == "mine" else "kept"] += 1
    assert counted == {"kept": 8, "others": 4}
    assert sum(report["own_ranks"].values()) == 8
    assert report["own_ranks"]["1"] == 8


def test_more_passages_go_through_windows(run, teachers, tmp_path):
    def best_first(prompt):
        """Puts the passage with the least text first, and leaves the others to the repair."""
        lines = [x for x in prompt.splitlines() if x.startswith("[")]
        lengths = {line.split("]")[0] + "]": len(line.split("] ")[1]) for line in lines}
        return min(lengths, key=lengths.get)

    windows = Windows(depth=45, positives=(1, 1), negatives=(30, 45))
    with served(best_first) as server:
        report = run(server.url, rerank_options=RerankOptions(windows))
    assert report["llm"]["calls"] == RECORDS * 4  # 26-45, 16-35, 6-25, 1-20
    assert report["llm"]["orders repaired"] == RECORDS * 4
    texts = {x.document.id: x.document for x in Corpus(tmp_path / "work" / "corpus").read()}
    for record in list(read_source(tmp_path / "out.jsonl"))[:3]:
        found = [texts[id_] for id_, _ in teachers(record.query)[:45]]
        shortest = min(len(" ".join(document.full_text.split())) for document in found)
        assert len(" ".join(record.positives[0].full_text.split())) == shortest


def test_orders_that_cannot_be_read_are_dropped(run):
    def hostile(prompt):
        answers = ["I cannot help with that.", "", "[77] > [99]", "[3] > [3] > [1]"]
        return answers[int(prompt.split("what does thing ")[1].split()[0]) % 4]

    with served(hostile) as server:
        report = run(server.url)
    kept = sum(n % 4 == 3 for n in range(RECORDS))
    assert report["records"] == report["llm"]["orders repaired"] == kept
    assert report["dropped"] == {
        "no ranking found": sum(n % 4 in (0, 2) for n in range(RECORDS)),
        "empty answer": sum(n % 4 == 1 for n in range(RECORDS)),
    }


def test_a_window_without_an_order_keeps_the_teachers(run):
    with served(lambda p: "" if "[13]" not in p else pretend(p)) as server:
        windows = Windows(depth=22, positives=(1, 1), negatives=(10, 22))
        options = RerankOptions(windows, window=13, step=10)
        report = run(server.url, rerank_options=options)
    assert report["records"] == RECORDS
    assert report["llm"]["calls"] == RECORDS * 2
    assert report["dropped"] == {}


def test_a_spent_budget_keeps_the_position_and_goes_on(run, server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 5)
    windows = Windows(depth=45, positives=(1, 1), negatives=(30, 45))  # four calls a query
    options = {"rerank_options": RerankOptions(windows)}
    with pytest.raises(IncompleteError, match="the budget of 700 tokens is spent") as fault:
        run(server.url, **options, limits=Limits(1, max_tokens_total=700))
    assert "\n" not in str(fault.value)
    assert len(server.calls) == held_answers(tmp_path / "answers.sqlite") == 70
    # eight queries are under way at a time, so the budget ended in the middle of some
    state = json.loads((tmp_path / ".out.jsonl.partial" / "journal.json").read_text())
    assert state["start"] in (5, 10, 15)
    with pytest.raises(IncompleteError, match="0 were paid"):
        run(server.url, **options, limits=Limits(max_tokens_total=0))
    assert len(server.calls) == 70
    report = run(server.url, **options)
    assert report["llm_this_run"]["sent"] == RECORDS * 4 - 70
    assert report["llm"]["calls"] == len(server.calls) == RECORDS * 4
    run(NOWHERE, "whole.jsonl", **options)  # all from the cache
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_windows_need_a_batch_run_each(run, tmp_path):
    windows = Windows(depth=30, positives=(1, 1), negatives=(10, 30))
    batch, results = tmp_path / "todo.jsonl", tmp_path / "answers.jsonl"
    options = {"rerank_options": RerankOptions(windows), "batch": batch}
    with pytest.raises(IncompleteError):
        run(NOWHERE, **options)
    for _ in range(1):
        assert answer_batch(batch, results) == RECORDS
        with pytest.raises(IncompleteError):
            run(NOWHERE, **options, results=(results,))
    assert answer_batch(batch, results) == RECORDS
    assert run(NOWHERE, **options, results=(results,))["records"] == RECORDS


def test_bad_input_is_named(run, llm_world, tmp_path):
    with pytest.raises(UserError, match=r"c\.jsonl:1: a text without a query; give pairs"):
        run(NOWHERE, records="c.jsonl")
    with pytest.raises(UserError, match="window 10, step 20: a window has 2 passages or more"):
        RerankOptions(window=10, step=20)
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"version": 1, "user": "{{query}}"}))
    with pytest.raises(UserError, match="passages"):
        run(NOWHERE, prompt=path)
