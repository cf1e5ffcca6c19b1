"""Shards read from afar: a real HTTP server that misbehaves, a real S3 server, a bounded cache."""

import gzip
import json
import os
import re
import socket
import socketserver
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context

import pytest

from drama.data import remote
from drama.data.records import Document, Record
from drama.data.remote import PIECE, PieceCache, RemoteFile
from drama.data.stream import ShardSet
from drama.data.writer import write_shards
from drama.errors import UserError

COUNT = 900


class Server(ThreadingHTTPServer):
    """Serves a folder. `fault(handler, number)` may answer the n-th request itself."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.requests, self.fault, self.ranges = [], None, True
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # connections that a fault has cut


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        with self.server.lock:
            asked = self.headers.get("Range", "")
            self.server.requests.append((self.path, asked))
            number = len(self.server.requests)
        path = self.translate_path(self.path)
        if not os.path.isfile(path):
            self.send_error(404)
            return
        with open(path, "rb") as file:
            content = file.read()
        status, match = 200, re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if match and self.server.ranges:
            start, end = int(match[1]), int(match[2]) + 1
            if start >= len(content):
                self.send_error(416)
                return
            status, content = 206, content[start:end]
        if self.server.fault and self.server.fault(self, number, content):
            return
        self.answer(status, content)

    def answer(self, status, content, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)


def sample():
    return [
        Record(
            f"query {i}",
            (Document(f"text {i} " + "long words " * (i % 400)),),
            source="ab"[i % 2],
        )
        for i in range(COUNT)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four shards of about 0.6 and 1.5 MiB."""
    out = tmp_path_factory.mktemp("remote") / "out"
    write_shards(sample(), out, shard_bytes=1_500_000)
    return out


@pytest.fixture(scope="module")
def records(folder):
    shards = ShardSet([folder])
    return [shards.read(index) for index in range(len(shards))]


@pytest.fixture
def server(folder):
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(remote, "READ_TIMEOUT_S", 0.5)


@pytest.fixture
def cache(tmp_path):
    return PieceCache(tmp_path / "cache")


def read_all(shards):
    return [shards.read(index) for index in range(len(shards))]


def pieces(cache):
    return [path for path in cache.folder.rglob("*") if path.is_file()]


def cut(handler, number, content):
    """Every other answer ends in its middle, without a word."""
    if number % 2:
        handler.answer(200, content[: len(content) // 2], length=len(content))
        handler.close_connection = True
        return True


def unavailable(handler, number, content):
    if number % 3:
        handler.send_error(503)
        return True


def slow(handler, number, content):
    """Every third answer starts and then says nothing for longer than the limit."""
    if number % 3 == 1:
        handler.answer(200, content[:10], length=len(content))
        time.sleep(1)
        handler.close_connection = True
        return True


def silent(handler, number, content):
    """Every third connection is closed before an answer."""
    if number % 3 == 1:
        handler.close_connection = True
        return True


def too_short(handler, number, content):
    """Now and then a server believes that the file is shorter."""
    if number % 3 == 1:
        handler.answer(206, content[:-1])
        return True


def packing(handler, number, content):
    """A server that packs what it sends, for those who can unpack."""
    if "gzip" in handler.headers.get("Accept-Encoding", ""):
        content = gzip.compress(content)
        handler.send_response(206)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
        return True


@pytest.mark.parametrize("fault", [None, cut, unavailable, silent, too_short, slow, packing])
def test_the_same_records_over_a_bad_line(server, cache, records, fault):
    server.fault = fault
    assert read_all(ShardSet([server.address], cache)) == records
    asked, server.fault = len(server.requests), None
    shards = ShardSet([server.address + "/"], PieceCache(cache.folder))
    assert read_all(shards) == records
    assert len(server.requests) == asked + 1  # the pieces are here now: only the manifest


def test_a_server_without_ranges(server, cache, records):
    server.ranges = False
    assert read_all(ShardSet([server.address], cache)) == records


def test_only_what_is_needed_is_fetched(server, cache, records):
    shards = ShardSet([server.address], cache)
    assert shards.read(3) == records[3]
    assert len(server.requests) == 3  # manifest, index, one piece
    assert shards.read(4) == records[4]
    assert len(server.requests) == 3


@pytest.mark.parametrize("missing", ["manifest.json", "train-000000.idx", "train-000000.tar"])
def test_a_missing_file_is_named_at_once(server, cache, missing, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 60)  # trying again would hang here
    server.fault = lambda handler, *_: (
        handler.path.endswith(missing) and (handler.send_error(404) or True)
    )
    with pytest.raises(UserError, match=f"{server.address}/{missing} cannot be read") as error:
        ShardSet([server.address], cache).read(0)
    assert "\n" not in str(error.value)
    assert Counter(path for path, _ in server.requests)[f"/{missing}"] == 1


def test_a_server_that_stays_ill_or_is_not_there(server, cache):
    server.fault = lambda handler, *_: handler.send_error(503) or True
    with pytest.raises(UserError, match=r"manifest\.json cannot be read, 6 tries: .*503") as error:
        ShardSet([server.address], cache)
    assert "\n" not in str(error.value)
    assert len(server.requests) == 6
    with pytest.raises(UserError, match="cannot be read, 6 tries: "):
        ShardSet(["http://127.0.0.1:9/x"], cache)
    with pytest.raises(UserError, match=r"nonsense://x/manifest\.json cannot be read"):
        ShardSet(["nonsense://x"], cache)


def test_a_truncated_or_changed_remote_file(server, cache):
    def truncated(handler, number, content):
        if handler.path.endswith("0.tar"):
            handler.answer(206, content[:5000])
            return True

    def changed(handler, number, content):
        if handler.path.endswith("0.tar"):
            handler.answer(206, content.replace(b"query 4", b"query 5"))
            return True

    server.fault = truncated
    with pytest.raises(UserError, match=r"0\.tar cannot be read, 6 tries: EOFError 5000 of"):
        ShardSet([server.address], cache).read(0)
    server.fault = changed
    said = r"train-000000\.tar: record 2 at byte \d+: its checksum differs"
    with pytest.raises(UserError, match=said) as error:
        ShardSet([server.address], cache).read(2)
    assert "\n" not in str(error.value)
    server.fault = lambda handler, number, content: (
        handler.path.endswith("1.idx") and (handler.answer(206, content[::-1]) or True)
    )
    with pytest.raises(UserError, match=r"1\.idx: is not the index that the manifest names"):
        read_all(ShardSet([server.address], PieceCache(cache.folder.with_name("other"))))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_piece_in_the_cache_is_fetched_again(server, cache, records, damage):
    read_all(ShardSet([server.address], cache))
    kept = pieces(cache)
    assert len(kept) == 6
    before = {path: path.read_bytes() for path in kept}
    for path, content in before.items():
        middle = len(content) // 2
        flipped = bytes(255 - byte for byte in content)
        path.write_bytes({"flip": flipped, "truncate": content[:middle], "empty": b""}[damage])
    asked = len(server.requests)
    assert read_all(ShardSet([server.address], PieceCache(cache.folder))) == records
    assert {path: path.read_bytes() for path in pieces(cache)} == before
    # and the manifest; both pieces of a record that lies in two are fetched again
    assert len(kept) + 1 <= len(server.requests) - asked <= 2 * len(kept) + 1
    asked = len(server.requests)
    assert read_all(ShardSet([server.address], PieceCache(cache.folder))) == records
    assert len(server.requests) == asked + 1


def test_the_cache_stays_within_its_bound(server, tmp_path, records):
    bound = 2 * PIECE
    cache = PieceCache(tmp_path / "cache", max_bytes=bound)
    shards = ShardSet([server.address], cache)
    most = 0
    for index in range(len(shards)):
        assert shards.read(index) == records[index]
        if index % 10 == 0:
            most = max(most, sum(path.stat().st_size for path in pieces(cache)))
    assert PIECE // 2 < most <= bound
    total = sum(path.stat().st_size for path in shards_files(server, records))
    assert total > bound
    assert not [path for path in pieces(cache) if path.name.startswith(".")]


def shards_files(server, _):
    root = server.RequestHandlerClass.keywords["directory"]
    return [entry for entry in os.scandir(root) if entry.name.endswith(".tar")]


def test_a_bound_below_one_piece_is_said(server, tmp_path):
    with pytest.raises(UserError, match=r"pieces vanish .*; raise data\.cache_gb"):
        read_all(ShardSet([server.address], PieceCache(tmp_path / "cache", max_bytes=PIECE // 8)))


def test_a_cache_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot (keep|read) .*file"):
        ShardSet([server.address], PieceCache(tmp_path / "file" / "cache")).read(0)


def test_what_was_prefetched_is_not_asked_for_again(server, cache, records):
    shards = ShardSet([server.address], cache)
    wanted = [0, 5, 300, 899]
    shards.prefetch(wanted)
    end = time.monotonic() + 20
    while (cache._flying or not cache._waiting.done()) and time.monotonic() < end:
        time.sleep(0.01)
    asked = list(server.requests)
    assert [shards.read(index) for index in wanted] == [records[index] for index in wanted]
    assert server.requests == asked
    assert max(Counter(asked).values()) == 1


def test_a_failed_prefetch_shows_when_it_is_read(server, cache, records):
    shards = ShardSet([server.address], cache)
    last = len(shards) - 1
    shards._open(len(shards.shards) - 1)  # its index is here, its records are not
    server.fault = lambda handler, *_: handler.send_error(404) or True
    shards.prefetch([last])
    with pytest.raises(UserError, match="cannot be read: FileNotFoundError"):
        shards.read(last)
    server.fault = None
    assert shards.read(last) == records[last]  # the fault is not remembered


def test_threads_ask_for_a_piece_once(server, cache, records):
    shards = ShardSet([server.address], cache)
    with ThreadPoolExecutor(16) as pool:
        order = [index % COUNT for index in range(0, 7 * 4 * COUNT, 7)]
        assert list(pool.map(shards.read, order)) == [records[index] for index in order]
    asked = Counter(server.requests)
    del asked[("/manifest.json", "")]
    tars = {key: count for key, count in asked.items() if key[0].endswith(".tar")}
    assert set(tars.values()) == {1}


def test_threads_while_pieces_are_forgotten_and_few_are_open(server, cache, records, monkeypatch):
    """A descriptor must not be closed, or be another file's, under the hands of a reader."""
    monkeypatch.setattr(remote, "OPEN_PIECES", 1)
    shards = ShardSet([server.address], cache)
    done = threading.Event()

    def forget():
        while not done.is_set():
            for number in range(len(shards.shards)):
                shards._open(number).forget(0, 10**6)
                time.sleep(0.01)

    with ThreadPoolExecutor(9) as pool:
        forgetting = pool.submit(forget)
        try:
            order = [(37 * index) % COUNT for index in range(600)]
            assert list(pool.map(shards.read, order)) == [records[index] for index in order]
        finally:
            done.set()
        forgetting.result()


def in_child(shards, indices, queue):
    queue.put([shards.read(index) for index in indices])


def test_forked_workers_after_the_parent_has_read(server, cache, records):
    shards = ShardSet([server.address], cache)
    shards.read(0)  # connections, threads and descriptors of the parent
    shards.prefetch(range(0, COUNT, 50))
    context = get_context("fork")
    queue = context.Queue()
    parts = [range(part, COUNT, 3) for part in range(3)]
    children = [
        context.Process(target=in_child, args=(shards, part, queue), daemon=True) for part in parts
    ]
    for child in children:
        child.start()
    got = [record for _ in children for record in queue.get(timeout=60)]
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert sorted(got, key=lambda r: r.query) == sorted(records, key=lambda r: r.query)
    assert shards.read(COUNT - 1) == records[-1]


def test_local_and_remote_folders_in_one_set(server, cache, folder, records):
    shards = ShardSet([folder, server.address], cache)
    assert read_all(shards) == records * 2


def test_a_file_that_was_replaced_is_not_taken_for_the_old_one(tmp_path, cache):
    """The same address, new contents: the pieces have other names."""
    write_shards(sample()[:20], tmp_path / "out")
    with Server(tmp_path / "out") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        old = read_all(ShardSet([server.address], cache))
        write_shards(sample()[20:40], tmp_path / "new")
        for path in (tmp_path / "new").iterdir():
            os.replace(path, tmp_path / "out" / path.name)
        new = read_all(ShardSet([server.address], cache))
        server.shutdown()
    assert len(old) == len(new) == 20
    assert not {r.query for r in old} & {r.query for r in new}


@pytest.mark.parametrize("start", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 500])
@pytest.mark.parametrize("length", [0, 1, 2, PIECE, 2 * PIECE])
def test_ranges_across_pieces(tmp_path, start, length):
    content = os.urandom(2 * PIECE + 777)
    with Server(tmp_path) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        (tmp_path / "file").write_bytes(content)
        cache = PieceCache(tmp_path / "cache")
        file = RemoteFile(f"{server.address}/file", len(content), "key", cache)
        file.prefetch(start, start + length)
        assert file.pread(start, start + length) == content[start : start + length]
        server.shutdown()


@pytest.fixture(scope="module")
def s3(folder):
    """The shards in a bucket of moto's server."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    import boto3

    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpus")
        for path in folder.iterdir():
            client.upload_file(str(path), "corpus", f"train/{path.name}")
        yield client
    server.stop()


def test_s3(s3, cache, records, monkeypatch):
    monkeypatch.setattr(remote, "READ_TIMEOUT_S", 20.0)
    shards = ShardSet(["s3://corpus/train"], cache)
    shards.prefetch(range(0, COUNT, 100))
    assert read_all(shards) == records
    for address in ("s3://corpus/none", "s3://no-such-bucket/train"):
        with pytest.raises(UserError, match=f"{address}/manifest.json cannot be read") as error:
            ShardSet([address], cache)
        assert "\n" not in str(error.value)


def test_a_changed_object_of_s3(s3, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(remote, "READ_TIMEOUT_S", 20.0)
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.name == "train-000000.tar":
            content = content.replace(b"query 8", b"query 9")
        if path.name == "train-000001.tar":
            content = content[: len(content) // 2]
        s3.put_object(Bucket="corpus", Key=f"changed/{path.name}", Body=content)
    shards = ShardSet(["s3://corpus/changed"], PieceCache(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"changed/train-000000\.tar: record 4 at byte \d+: its ch"):
        shards.read(4)
    with pytest.raises(UserError, match=r"changed/train-000001\.tar cannot be read, 6 tries"):
        shards.read(shards.shard_sizes[0] + shards.shard_sizes[1] - 1)


def test_a_set_with_a_cache_pickles(server, cache, records):
    import pickle

    shards = ShardSet([server.address], cache)
    shards.read(0)
    assert pickle.loads(pickle.dumps(shards)).read(7) == records[7]


def test_sources_over_http(tmp_path):
    """A file of records at an address, from a server with ranges and one without."""
    from drama.data.sharding import ShardingOptions, shard_sources
    from drama.data.sources import Source

    rows = [{"query": f"q {i}", "positives": [{"text": f"p {i} " * 50}]} for i in range(2000)]
    plain = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "plain.jsonl").write_bytes(plain)
    (tmp_path / "www" / "packed.jsonl.gz").write_bytes(gzip.compress(plain))
    with Server(tmp_path / "www") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        for ranges in (True, False):
            server.ranges = ranges
            for name in ("plain.jsonl", "packed.jsonl.gz"):
                source = Source.parse(f"web={server.address}/{name}")
                outcome = shard_sources([source], tmp_path / "out", ShardingOptions())
                assert outcome.manifest.counts("source") == {"web": 2000}
        (tmp_path / "www" / "texts.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo\nlines\n"))
        source = Source.parse(f"{server.address}/texts.txt.gz")
        manifest = shard_sources([source], tmp_path / "out", ShardingOptions()).manifest
        assert (manifest.counts("source"), manifest.num_pairs) == ({"texts": 2}, 0)
        server.ranges = True
        for fault in (cut, unavailable, silent):  # now and then, then always
            server.fault = fault
            source = Source.parse(f"web={server.address}/plain.jsonl")
            outcome = shard_sources([source], tmp_path / "out", ShardingOptions())
            assert outcome.manifest.counts("source") == {"web": 2000}
            server.fault = lambda handler, number, content, f=fault: f(handler, 1, content)
            source = Source.parse(f"{server.address}/plain.jsonl")
            with pytest.raises(UserError, match=r"plain\.jsonl") as error:
                shard_sources([source], tmp_path / "no", ShardingOptions())
            assert "\n" not in str(error.value)
        server.shutdown()


class Proxy(socketserver.ThreadingTCPServer):
    """Hands connections on to another port. The first ones have faults: `cut` after some of the
    answer, `503` in place of one, `slow`."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, port, faults):
        super().__init__(("127.0.0.1", 0), ProxiedConnection)
        self.port, self.faults, self.met = port, list(faults), []

    def handle_error(self, request, client_address):
        pass


class ProxiedConnection(socketserver.BaseRequestHandler):
    def handle(self):
        fault = self.server.faults.pop(0) if self.server.faults else ""
        self.server.met.append(fault)
        if fault == "503":
            self.request.recv(65536)
            self.request.sendall(
                b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            return
        with socket.create_connection(("127.0.0.1", self.server.port)) as behind:
            threading.Thread(target=self.upstream, args=(behind,), daemon=True).start()
            answered = 0
            while part := behind.recv(16384):
                if fault == "slow":
                    time.sleep(0.02)
                self.request.sendall(part)
                answered += len(part)
                if fault == "cut" and answered > 40_000:
                    return

    def upstream(self, behind):
        try:
            while part := self.request.recv(65536):
                behind.sendall(part)
        except OSError:
            pass


def test_s3_with_cuts_503s_and_slow_answers(s3, cache, records, monkeypatch):
    from s3fs import S3FileSystem

    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    faults = ["503", "cut", "slow", "503", "cut", "cut", "slow"]
    with Proxy(port, faults) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        S3FileSystem.clear_instance_cache()
        try:
            shards = ShardSet(["s3://corpus/train"], cache)
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(shards.read, range(COUNT))) == records
            assert proxy.met[: len(faults)] == faults  # all of them were met
        finally:
            S3FileSystem.clear_instance_cache()
            proxy.shutdown()
