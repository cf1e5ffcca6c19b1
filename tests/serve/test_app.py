"""The endpoints of a real server: OpenAI's client, searches, refusals, many clients."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import openai
import pytest
from click.testing import CliRunner

from drama.cli import main
from drama.retrieve.index import Index
from drama.retrieve.models import open_model
from drama.retrieve.vectors import read_vectors
from tests.serve.conftest import DOCUMENTS, World

TEXTS = ["what makes bread rise?", "bees \U0001f41d", "\u05dc\u05d7\u05dd \u202eabc"]


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(
    address: str, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON and headers; a body that is no string is sent as JSON."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    given = {"Content-Type": "application/json"} | names

    async def asking() -> tuple[int, dict[str, Any], dict[str, str]]:
        data = body if isinstance(body, str | bytes) or body is None else json.dumps(body)
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"{address}{path}", data=data, headers=given) as answer,
        ):
            return answer.status, await answer.json(), dict(answer.headers)

    return asyncio.run(asking())


# -- embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["float", "base64", None])  # None: base64, decoded by it
@pytest.mark.parametrize("kind", ["query", "document"])
@pytest.mark.parametrize("dim", [None, 16])
def test_openai_s_client_gets_the_vectors_of_encode(
    client: openai.OpenAI, world: World, format_: Any, kind: Any, dim: int | None
) -> None:
    options: dict[str, Any] = {"extra_body": {"input_type": kind}, "user": "me"}
    options |= {"encoding_format": format_} if format_ else {}
    options |= {"dimensions": dim} if dim else {}
    answer = client.embeddings.create(input=TEXTS, model="tiny", **options)
    model = open_model(world.model)
    got = [item.embedding for item in answer.data]
    if format_ == "base64":
        import base64

        got = [np.frombuffer(base64.b64decode(str(text)), "<f4") for text in got]  # type: ignore
    want_BD = model.encode(TEXTS, kind, dim=dim)
    np.testing.assert_allclose(np.array(got), want_BD, atol=1e-6, rtol=0)
    assert [item.index for item in answer.data] == [0, 1, 2]
    tokens = sum(map(len, model.prepare(TEXTS, kind, model.max_tokens)))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
    assert answer.model == "tiny"


def test_a_text_alone_is_taken_as_a_document(address: str, world: World) -> None:
    _, answer, _ = ask(address, "POST", "/embed", {"input": "bread"})
    (item,) = answer["data"]
    want_BD = open_model(world.model).encode(["bread"], "document")
    np.testing.assert_allclose([item["embedding"]], want_BD, atol=1e-6, rtol=0)


def test_more_texts_than_a_step_takes_stay_in_order(client: openai.OpenAI, world: World) -> None:
    texts = [f"{'bread ' * (i % 5)}{i}" for i in range(40)]
    answer = client.embeddings.create(input=texts, model="tiny")
    want_BD = open_model(world.model).encode(texts, "document")
    np.testing.assert_allclose([d.embedding for d in answer.data], want_BD, atol=1e-6, rtol=0)


def test_openai_s_client_knows_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; 'tiny' is"):
        client.embeddings.create(input="a", model="other")
    with pytest.raises(openai.UnprocessableEntityError, match="1 to 64 do"):
        client.embeddings.create(input="a", model="tiny", dimensions=65)
    with pytest.raises(openai.UnprocessableEntityError, match="token ids"):
        client.embeddings.create(input=[1, 2, 3], model="tiny")
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, "the body is no JSON"),
        ("[" * 100_000, 400, "the body is no JSON"),
        (b"\xff\xfe", 400, "the body is no JSON"),
        ('{"input": NaN}', 400, "NaN is no number of JSON"),
        ("[]", 400, "must be a JSON object"),
        ({}, 422, "'input' is missing"),
        ({"input": 1}, 422, "must be a text or a list of texts"),
        ({"input": []}, 422, "an empty list"),
        ({"input": ["a", " "]}, 422, "'input[1]' is empty"),
        ({"input": ["a", None]}, 422, "'input[1]' must be a text"),
        ('{"input": "\\ud800"}', 422, "'input[0]' is not valid UTF-8"),
        ({"input": "a", "dimensions": 0}, 422, "whole number above 0, not 0"),
        ({"input": "a", "dimensions": True}, 422, "whole number above 0, not True"),
        ({"input": "a", "encoding_format": "hex"}, 422, "there are float, base64"),
        ({"input": "a", "input_type": "passage"}, 422, "there are query, document"),
        ({"input": "a", "input_typ": "query"}, 422, "did you mean 'input_type'?"),
        ({"input": ["a"] * 65}, 413, "65 texts; 64 are the most (--max-texts)"),
        ({"input": "a" * 1_000_001}, 413, "1,000,001 characters; 1,000,000 are the most"),
        ({"input": "a" * 5_000_000}, 413, "4,194,304 bytes are the most (--max-bytes)"),
    ],
)
def test_what_is_refused(address: str, body: Any, status: int, message: str) -> None:
    got, answer, _ = ask(address, "POST", "/v1/embeddings", body)
    assert (got, set(answer["error"])) == (status, {"message", "type", "param", "code"})
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


# -- search ---------------------------------------------------------------------------------------


def test_a_search_is_that_of_the_command(address: str, world: World) -> None:
    done = CliRunner().invoke(
        main, ["search", "--index", str(world.index), "-k", "4", "--json", "bread"]
    )
    want = json.loads(done.stdout)
    for method, path, body in (
        ("GET", "/search?q=bread&k=4", None),
        ("POST", "/search", {"q": "bread", "k": 4}),
    ):
        status, answer, _ = ask(address, method, path, body)
        assert status == 200
        rows = [hit.pop("row") for hit in answer["hits"]]
        assert (answer["query"], answer["hits"]) == (want["query"], want["hits"])
        assert [DOCUMENTS[row][0] for row in rows] == [hit["id"] for hit in answer["hits"]]
        assert list(answer["ms"]) == ["tokenise", "encode", "search", "snippet"]
        assert (answer["dim"], all(ms >= 0 for ms in answer["ms"].values())) == (64, True)


def test_a_search_at_a_narrower_width(address: str, world: World) -> None:
    _, answer, _ = ask(address, "GET", "/search?q=bread&dim=16&k=6")
    q_BD = open_model(world.model).encode(["bread"], "query", dim=16)
    index = Index.from_vectors(read_vectors(world.vectors), "flat", dim=16)
    scores_BK, found = index.search(q_BD, 6)
    assert [hit["id"] for hit in answer["hits"]] == found[0]
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], scores_BK[0], atol=1e-6)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/search", 422, "'q' is missing"),
        ("/search?q=%20", 422, "'q' is empty"),
        ("/search?q=a&k=0", 422, "'k' must be a whole number above 0"),
        ("/search?q=a&k=101", 422, "k 101 is too much; 100 is the most"),
        ("/search?q=a&k=" + "9" * 5000, 422, "'k' must be a whole number above 0"),
        ("/search?q=a&dim=17", 422, "'dim' 17 cannot be searched; there are 16, 64"),
        ("/documents/6", 404, "there is no document 6"),
        ("/documents/-1", 404, "'/documents/-1': Not Found"),
        ("/nothing", 404, "'/nothing': Not Found"),
        ("/embed", 405, "/embed takes POST, not GET"),
    ],
)
def test_addresses_that_are_refused(address: str, path: str, status: int, message: str) -> None:
    got, answer, _ = ask(address, "GET", path)
    assert got == status
    assert message in answer["error"]["message"]


def test_whole_documents_and_facts(address: str) -> None:
    id_, title, text = DOCUMENTS[3]
    assert ask(address, "GET", "/documents/3")[1] == {"id": id_, "title": title, "text": text}
    assert ask(address, "GET", "/health")[1]["status"] == "ok"
    (model,) = ask(address, "GET", "/v1/models")[1]["data"]
    facts = model["facts"]
    assert facts["index"] == {"type": "int8", "documents": 6, "dim": 64}
    assert (facts["layers"], facts["mask"], facts["pooling"]) == (1, "bidirectional", "mean")
    assert (facts["query_prefix"], facts["dims"]) == ("Query: ", [16, 64])


# -- who may ask ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
    ],
)
def test_other_sites_are_refused(address: str, headers: dict[str, str]) -> None:
    for method, path, body in (("GET", "/search?q=a", None), ("POST", "/embed", {"input": "a"})):
        status, answer, given = ask(address, method, path, body, **headers)
        assert status == 403, answer
        assert not [name for name in given if name.startswith("Access-Control")]


def test_a_form_of_another_site_cannot_be_sent(address: str) -> None:
    status, answer, _ = ask(address, "POST", "/embed", {"input": "a"}, Content_Type="text/plain")
    assert (status, "application/json" in answer["error"]["message"]) == (415, True)
    assert ask(address, "OPTIONS", "/embed")[0] == 405


def test_localhost_is_this_machine_too(address: str) -> None:
    port = urlsplit(address).port
    assert ask(address, "GET", "/health", Host=f"localhost:{port}")[0] == 200
    assert ask(address, "GET", "/health", Host="[::1]")[0] == 200


# -- many, and bad ones ---------------------------------------------------------------------------


def test_many_clients_at_once(address: str, world: World) -> None:
    """Those beyond the queue are told to come again, the others get what is theirs."""
    texts = [f"text number {i}" for i in range(60)]

    async def one(session: aiohttp.ClientSession, text: str) -> list[float] | None:
        async with session.post(f"{address}/embed", json={"input": text}) as answer:
            value = await answer.json()
            if answer.status == 503:
                assert answer.headers["Retry-After"] == "1"
                assert "16 requests wait already" in value["error"]["message"]
                return None
            assert answer.status == 200, value
            vector: list[float] = value["data"][0]["embedding"]
            return vector

    async def all_of_them() -> list[list[float] | None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(one(session, text) for text in texts))

    vectors = asyncio.run(all_of_them())
    want_BD = open_model(world.model).encode(texts, "document")
    answered = [i for i, vector in enumerate(vectors) if vector is not None]
    assert len(answered) >= 17
    np.testing.assert_allclose([vectors[i] for i in answered], want_BD[answered], atol=1e-6)
    assert ask(address, "GET", "/health")[1]["pending"] == 0


def test_half_a_request_and_no_http_stop_nobody(address: str) -> None:
    place = urlsplit(address)
    head = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    open_ones = []
    for sent in (
        head,
        head + b'Content-Length: 99\r\n\r\n{"input',
        b"\x16\x03\x01\x00",
        b"\0" * 99,
    ):
        connection = socket.create_connection((place.hostname, place.port or 80))
        connection.sendall(sent)
        open_ones.append(connection)
    assert ask(address, "POST", "/embed", {"input": "a"})[0] == 200
    for connection in open_ones:
        connection.close()
    assert ask(address, "GET", "/health")[1] == {"status": "ok", "pending": 0}


def test_work_for_a_client_that_left_is_given_up(address: str) -> None:
    place = urlsplit(address)
    body = json.dumps({"input": ["word " * 10_000] * 64}).encode()
    head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection = socket.create_connection((place.hostname, place.port or 80))
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    deadline = time.monotonic() + 60
    while not ask(address, "GET", "/health")[1]["pending"]:
        assert time.monotonic() < deadline
    connection.close()
    while ask(address, "GET", "/health")[1]["pending"]:
        assert time.monotonic() < deadline
