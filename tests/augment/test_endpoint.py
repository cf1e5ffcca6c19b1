"""The list of models, which is asked for before anything is paid; `test_llm` has the rest."""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from drama.augment.endpoint import Endpoint
from drama.errors import UserError


@pytest.fixture
def serve():
    """`serve(status, body)`: an address that answers every GET so."""
    servers = []

    def start(status, body):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status if self.path == "/v1/models" else 418)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def models(url):
    async def ask():
        endpoint = Endpoint(url, "tiny", "DRAMA_TEST_KEY", 5.0)
        endpoint.open()
        try:
            return await endpoint.models()
        finally:
            await endpoint.close()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("status", "body", "names"),
    [
        (200, '{"object": "list", "data": [{"id": "a/b"}, {"id": "c"}]}', ["a/b", "c"]),
        (200, '{"data": []}', []),
        (200, "no JSON", []),
        (200, "[1]", []),
        (404, '{"error": {"message": "no such page"}}', []),  # a server that has no list
    ],
)
def test_the_names_or_none(serve, status, body, names):
    assert models(serve(status, body)) == names


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "HTTP 401: who are you; no key stands in DRAMA_TEST_KEY, see to it"),
        (403, "HTTP 403: who are you; see to the address"),
        (500, "HTTP 500: who are you"),
    ],
)
def test_a_server_that_lets_nobody_in(serve, status, message):
    url = serve(status, '{"error": {"message": "who are you"}}')
    with pytest.raises(UserError) as caught:
        models(url)
    assert str(caught.value).startswith(f"{url}: {message}")


def test_nobody_there():
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1 cannot be reached \("):
        models("http://127.0.0.1:9/v1")
