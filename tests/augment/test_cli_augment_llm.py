"""`drama augment queries | rerank | triplets | relabel`, from files to shards, and one line for bad
input."""

import json
from pathlib import Path

import pytest

from drama.augment.testing import answer_batch
from drama.data.sources import read_source
from drama.data.stream import open_pairs

KINDS = ("queries", "rerank", "triplets", "relabel")


def out_of(command):
    return Path(command[command.index("--out") + 1])


def test_all_four_kinds_from_text_to_shards(commands, server, tmp_path, said):
    text = {kind: said(*commands[kind], "--base-url", server.url) for kind in KINDS}
    assert "queries.jsonl.gz: 60 records of 60 documents" in text["queries"]
    assert "the query's own document is first for" in text["queries"]
    assert "calls 60" in text["queries"]
    assert "60 calls sent, 0 cached, tokens paid 420 + 180" in text["queries"]
    assert "rerank.jsonl.zst: 60 records of 60 records" in text["rerank"]
    assert "triplets.jsonl: 30 records of 30 triplets" in text["triplets"]
    assert "negatives that are relevant" in text["relabel"]
    outs = [out_of(commands[kind]) for kind in KINDS]
    said("shard", *outs, "--out", tmp_path / "shards", "--workers", 1)
    shards = open_pairs([tmp_path / "shards"])
    assert len(shards) == 60 + 60 + 30 + 30
    assert {"sci", "triplets", "pairs"} <= set(shards.sources)
    reranked = list(read_source(outs[1]))
    assert all(len(record.positives) == 1 for record in reranked)
    assert all(8 <= len(record.negatives) <= 11 for record in reranked)
    assert len(list((tmp_path / "work").glob("vectors-*"))) == 1  # encoded once for both
    assert (tmp_path / "work" / "answers.sqlite").is_file()
    assert (tmp_path / "triplets.answers.sqlite").is_file()
    report = json.loads((tmp_path / "queries.report.json").read_text())
    assert report["llm_this_run"]["prompt_tokens"] == 420
    assert report["about"]["prompts"][0].startswith("queries-1-")
    paid = len(server.calls)
    assert "is there already" in said(*commands["rerank"], "--base-url", server.url)
    assert len(server.calls) == paid


def test_budget_then_batch_then_done(commands, server, tmp_path, said, refused):
    command = (*commands["queries"], "--base-url", server.url)
    line = refused(*command, "--max-tokens-total", 100, "--concurrency", 2)
    assert line.startswith("drama: error: the budget of 100 tokens is spent (1")
    batch, results = tmp_path / "todo.jsonl", tmp_path / "answers.jsonl"
    line = refused(*command, "--offline-batch", batch)
    assert f"vllm run-batch -i {batch} -o RESULTS --model tiny" in line
    assert line.endswith("start the same command again with `--batch-results RESULTS`")
    answered = answer_batch(batch, results)
    paid = len(server.calls)
    assert answered + paid == 60
    text = said(*command, "--batch-results", results)
    assert f"answers.jsonl: {answered} answers, 0 refused" in text
    assert len(server.calls) == paid


def test_parameters_reach_the_server_and_the_report(
    commands, server, tmp_path, monkeypatch, said, refused
):
    monkeypatch.setenv("MY_KEY", "secret")
    extra = '{"chat_template_kwargs": {"enable_thinking": false}}'
    said(*commands["relabel"], "--base-url", server.url, "--temperature", 0.3, "--top-p", 0.7,
         "--seed", 9, "--max-tokens", 77, "--extra", extra, "--api-key-env", "MY_KEY",
         "--cache", tmp_path / "mine.sqlite", "--concurrency", 3)  # fmt: skip
    body = server.calls[0]
    assert [body[key] for key in ("model", "temperature", "top_p", "seed", "max_tokens")] == [
        "tiny", 0.3, 0.7, 9, 77,
    ]  # fmt: skip
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.keys[0] == "Bearer secret"
    assert server.most_in_flight <= 3
    assert (tmp_path / "mine.sqlite").is_file()
    about = json.loads((tmp_path / "relabel.report.json").read_text())["about"]
    assert (about["temperature"], about["extra"]) == (0.3, json.loads(extra))
    line = refused(*commands["relabel"], "--base-url", server.url, "--seed", 1)
    assert "made otherwise" in line
    assert "seed 9, not 1" in line


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("queries", "--base-url ftp://x", "'ftp://x' is no address of an LLM"),
        ("queries", "--extra [1]", "extra '[1]' is no JSON object"),
        ("relabel", '--extra {"model":"x"}', "model cannot be set as an extra field"),
        ("triplets", "--languages en,xx", "'xx' is not known"),
        ("triplets", "--prompt gone.yaml", "prompt gone.yaml does not exist"),
        ("relabel", "--batch-results gone.jsonl", "gone.jsonl does not exist"),
        ("rerank", "--step 30", "window 20, step 30"),
        ("queries", "--negatives 3-60", "ranks ascend from 1 to the depth"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_left(
    commands, llm_world, tmp_path, monkeypatch, kind, arguments, message, refused
):
    monkeypatch.chdir(tmp_path)
    command = list(commands[kind])
    if kind == "rerank":
        command[2] = llm_world / "pairs.jsonl"
    assert message in refused(*command, *arguments.split())
    left = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in left if "partial" in name or name == out_of(command).name]


def test_help_teaches(drama):
    for kind in KINDS:
        shown = drama("augment", kind, "--help")
        assert shown.exit_code == 0
        assert "vllm serve" in shown.stdout
        assert f"drama augment {kind}" in shown.stdout
        assert "--offline-batch" in shown.stdout
        assert kind in drama("augment", "--help").stdout
