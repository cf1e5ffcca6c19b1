"""Without a server: requests into a file, the results of a batch run back into the cache."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drama.augment.batch import BatchFile, Results, read_results
from drama.augment.cache import Cache
from drama.augment.chat import Answer, Refusal, Request
from drama.augment.llm import LLM, IncompleteError
from drama.augment.testing import ChatServer, completion
from drama.errors import UserError

NOWHERE = "http://127.0.0.1:9/v1"  # nothing is to be sent
SCHEMA = {"type": "object"}


def request(text: str) -> Request:
    return Request(({"role": "user", "content": text},), 16, temperature=0.5, seed=3, schema=SCHEMA)


def run(
    texts: list[str], folder: Path, url: str = NOWHERE, *, offline: bool = True
) -> tuple[dict[str, Answer | Refusal], LLM, Exception | None]:
    batch = folder / "batch.jsonl" if offline else None
    llm = LLM(url, "tiny", folder / "answers.sqlite", batch=batch)
    got: dict[str, Answer | Refusal] = {}

    async def stream() -> None:
        async with llm:
            async for text, outcome in llm.stream((text, request(text)) for text in texts):
                got[text] = outcome

    try:
        asyncio.run(stream())
    except UserError as error:
        return got, llm, error
    return got, llm, None


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_vllm(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What `vllm run-batch` writes."""
    for row in rows:
        body = completion("echo: " + row["body"]["messages"][0]["content"])
        response = {"status_code": 200, "request_id": "vllm-batch-1", "body": body}
        line = {"id": "vllm-1", "custom_id": row["custom_id"], "response": response, "error": None}
        yield json.dumps(line, ensure_ascii=False)


def taken(path: Path, folder: Path) -> Results:
    cache = Cache(folder / "answers.sqlite")
    try:
        return read_results(path, cache)
    finally:
        cache.close()


def test_a_job_runs_to_its_end_without_a_server(tmp_path: Path) -> None:
    texts = [f"Größe 大きさ 🐝 {number}" for number in range(30)]
    with ChatServer() as server:
        run(texts[:10], tmp_path, server.url, offline=False)

    got, llm, error = run(texts + texts, tmp_path)
    assert got.keys() == set(texts[:10])
    assert isinstance(error, IncompleteError)
    assert "20 requests without an answer go into" in str(error)
    assert f"vllm run-batch -i {tmp_path / 'batch.jsonl'} -o RESULTS --model tiny" in str(error)
    assert (llm.usage.sent, llm.usage.unanswered) == (0, 40)

    written = lines(tmp_path / "batch.jsonl")
    assert [row["body"]["messages"][0]["content"] for row in written] == texts[10:]
    assert {(row["method"], row["url"]) for row in written} == {("POST", "/v1/chat/completions")}
    assert [row["custom_id"] for row in written] == [request(t).key("tiny") for t in texts[10:]]
    assert written[0]["body"] == request(texts[10]).body("tiny")

    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(as_vllm(written)) + "\n", encoding="utf-8")
    for _ in range(2):  # reading twice changes nothing
        read = taken(results, tmp_path)
        assert read == Results(answers=20, prompt_tokens=140, completion_tokens=60)

    (tmp_path / "batch.jsonl").unlink()
    got, llm, error = run(texts, tmp_path)
    assert error is None
    assert {t: a.text for t, a in got.items() if isinstance(a, Answer)} == {
        text: f"echo: {text}" for text in texts
    }
    assert llm.usage.cached_prompt_tokens == 30 * 7
    assert not (tmp_path / "batch.jsonl").exists()  # there was nothing to be asked


def refused(key: str, status: int, body: Any, error: Any) -> dict[str, Any]:
    response = {"status_code": status, "request_id": "1", "body": body}
    return {"custom_id": key, "response": response, "error": error}


def test_bad_lines_are_counted_by_reason_and_asked_again(tmp_path: Path) -> None:
    keys = [request(f"text {number}").key("tiny") for number in range(10)]
    too_long = {"error": {"message": "too long", "code": 400}}
    rows: list[Any] = [
        {"custom_id": keys[0], "response": {"status_code": 200, "body": completion("fine")}},
        refused(keys[1], 400, None, too_long),  # vLLM
        refused(keys[2], 400, too_long, None),  # OpenAI
        refused(keys[3], 400, None, "EngineDeadError"),  # any fault of vLLM's own
        refused(keys[4], 500, None, {"message": "boom"}),
        refused(keys[5], 404, None, {"message": "no such model"}),
        {"custom_id": keys[6], "response": None, "error": {"code": "batch_expired"}},
        {"custom_id": keys[7], "response": {"status_code": 200, "body": {"choices": []}}},
        {"custom_id": "request-1", "response": {"status_code": 200, "body": completion("x")}},
        [],
    ]
    path = tmp_path / "results.jsonl"
    cut = json.dumps({"custom_id": keys[8], "response": {"status_code": 200}})[:-20]
    path.write_text("\n".join([*map(json.dumps, rows), "", cut]), encoding="utf-8")
    read = taken(path, tmp_path)
    assert (read.answers, read.refused) == (1, 2)
    assert read.bad == {
        "HTTP 400": 3, "HTTP 500": 1, "HTTP 404": 1, "no response": 1, "no answer in it": 1,
        "custom_id is not one of ours": 1, "not a JSON object": 1, "not JSON": 1,
    }  # fmt: skip
    assert read.first_bad == f"{path}:2: HTTP 400: too long"

    got, llm, error = run([f"text {number}" for number in range(10)], tmp_path)
    assert isinstance(error, IncompleteError)
    assert got["text 1"] == got["text 2"] == Refusal("HTTP 400", "too long")
    assert set(got) == {"text 0", "text 1", "text 2"}
    assert [row["custom_id"] for row in lines(tmp_path / "batch.jsonl")] == keys[3:]
    assert llm.usage.refused == 2

    with ChatServer() as server:  # which may have room for what the batch run refused
        got, _, error = run(["text 1"], tmp_path, server.url, offline=False)
    assert isinstance(got["text 1"], Answer)
    assert run(["text 1"], tmp_path)[0]["text 1"] == Answer(
        "echo: text 1", 7, 3, "stop", cached=True
    )


def fail_halfway(path: Path) -> None:
    with BatchFile(path) as batch:
        batch.add("0" * 64, {})
        raise ZeroDivisionError


def test_an_error_leaves_no_half_batch_file(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_text("of before")
    with pytest.raises(ZeroDivisionError):
        fail_halfway(path)
    assert path.read_text() == "of before"
    assert [p.name for p in tmp_path.iterdir()] == ["batch.jsonl"]


def test_a_results_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.jsonl"):
        taken(tmp_path / "results.jsonl", tmp_path)
