"""The benchmarks of latency and encoding: their launchers dry, their gate, the texts they draw."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drama.bench.encoding import floor
from drama.bench.indexing import draw
from drama.bench.retrievers import GATE, NO_GRAPH, Way, check, exact_texts, read_texts, reference
from drama.bench.rows import COLUMNS, interleaved, whole_numbers
from drama.encoder import Encoder
from drama.errors import UserError
from drama.metrics import forward_flops
from drama.testing import tiny_llama

ROOT = Path(__file__).parents[2]
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"
CPU = torch.device("cpu")
WAYS = {"ours"}
if importlib.util.find_spec("sentence_transformers"):
    WAYS.add("sentence-transformers")
if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
    WAYS |= {"onnxruntime", "onnxruntime int8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "m")


def _run(out: Path, *arguments: str) -> list[dict[str, str]]:
    command = [sys.executable, *arguments, "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == COLUMNS
        return list(reader)


@pytest.mark.slow  # half a minute each, most of it for the graphs
def test_latency_has_every_way_batch_and_length(tmp_path):
    rows = _run(tmp_path / "out.csv", str(ROOT / "launchers" / "bench_latency.py"))
    found = {(r["provider"], r["mode"], r["metric"], r["x"]) for r in rows}
    cases = {f"B={batch}, {tokens} tokens" for batch in (1, 3) for tokens in (8, 32)}
    alone = {NO_GRAPH} if "onnxruntime" in WAYS else set()
    for way in WAYS | alone:
        for x in {x for x in cases if "B=1" in x} if way in alone else cases:
            for mode, metric in (
                ("gate", "largest difference"), ("whole", "ms"), ("whole", "ms p95"),
                ("whole", "ms p99"), ("tokenise", "ms"), ("embed", "ms"),
            ):  # fmt: skip
                assert (way, mode, metric, x) in found
    assert {r["provider"] for r in rows} == WAYS | alone
    for row in rows:
        if row["metric"] == "largest difference" and row["provider"] != "onnxruntime int8":
            assert float(row["median"]) < 1e-5, row


@pytest.mark.slow
def test_encoding_has_every_way_and_index(tmp_path):
    launcher = str(ROOT / "launchers" / "bench_throughput.py")
    rows = _run(tmp_path / "out.csv", launcher, "--encode")
    rates = {(r["provider"], r["mode"], r["x"]) for r in rows if r["metric"] == "tokens/s"}
    for x in ("32 tokens", "128 tokens", "mix of documents", "mix of queries and documents"):
        ways = (
            WAYS | {"ours bf16"}
            if x.startswith("mix")
            else WAYS & {"ours", "sentence-transformers"}
        )
        assert {way for way, mode, at in rates if (mode, at) == ("texts", x)} == ways
        assert {("ours", "tokens", x), ("floor", "matrix products", x)} <= rates
    shares = [float(r["median"]) for r in rows if r["metric"] == "fraction of floor"]
    assert shares
    assert all(0 < share < 1.5 for share in shares)
    recall = {(r["provider"], r["x"]): float(r["median"]) for r in rows
              if r["metric"] == "recall@10"}  # fmt: skip
    assert {provider for provider, _ in recall} == {
        "flat", "hnsw", "ivf", "int8", "rabitq", "binary"
    }  # fmt: skip
    assert recall["flat", "N=1,500, D=64, effort 1.0"] == 1.0
    assert min(recall.values()) > 0.5


def test_a_way_that_is_off_is_not_passed(model):
    """By either of its faces."""
    encoder, exact = Encoder.from_pretrained(model), reference(model, CPU)
    texts = ["tides", "bees store honey", "x"]

    def way(off_encode=0.0, off_embed=0.0, dtype="float32"):
        def encode(some):
            return encoder.encode(some, "query") + off_encode

        def embed(rows):
            return encoder.embed(rows) + off_embed

        return Way("w", dtype, lambda some: encoder.tokenize(some, "query"), embed, encode)

    want = exact(texts)
    np.testing.assert_allclose(want, encoder.encode(texts, "query"), atol=1e-6)
    off = 2 * GATE["float32"]
    assert check(way(), texts, want).passed
    assert not check(way(off_encode=off), texts, want).passed
    assert not check(way(off_embed=off), texts, want).passed
    assert not check(way(off_embed=float("nan")), texts, want).passed
    assert check(way(off_embed=off, dtype="bfloat16"), texts, want).passed
    swapped = Way("w", "int8", way().tokenize, way().embed, lambda some: way().encode(some)[::-1])
    assert not check(swapped, texts, want).passed


def test_texts_have_exactly_the_length(model):
    encoder = Encoder.from_pretrained(model)  # a byte a token
    documents = read_texts(PAIRS, 5)
    texts = exact_texts(lambda t: encoder.tokenize(t, "query"), documents, 40, 3)
    assert [len(row) for row in encoder.tokenize(texts, "query")] == [40] * 3
    assert len(set(texts)) == 3
    with pytest.raises(UserError, match=r"too short for 3 of 400 tokens"):
        exact_texts(lambda t: encoder.tokenize(t, "query"), documents[:1], 400, 3)
    with pytest.raises(UserError, match=r"different documents, 1000000 are asked for"):
        read_texts(PAIRS, 1_000_000)


def test_the_floor_is_the_models_matrix_products(model):
    config = Encoder.from_pretrained(model).backbone.config
    lengths = [5, 9, 8192 + 3]
    products = floor(config, lengths, CPU, torch.float32)
    with FlopCounterMode(display=False) as counter:
        products()
    attention = 4 * config.hidden_size * (
        (config.num_hidden_layers - 1) * sum(n * n for n in lengths) + sum(lengths)
    )  # fmt: skip
    want = forward_flops(config, lengths, last_token_only=True) - attention
    assert counter.get_total_flops() == want


def test_single_calls_are_timed_one_by_one_for_a_while():
    spent = []

    def run() -> None:
        spent.append(0.03 if len(spent) % 7 else 0.06)
        time.sleep(spent[-1])

    times = interleaved({"a": run}, CPU, seconds=0.0, rounds=5, single=True)["a"]
    assert len(times) == len(spent) - 2  # two that find out how long it takes
    assert len(times) >= 3 * 2
    np.testing.assert_array_less(spent[2:], times)


def test_drawn_vectors_have_norm_one_and_neighbours():
    vectors, q_BD = draw(500, 32)
    np.testing.assert_allclose(np.linalg.norm(q_BD, axis=1), 1, atol=1e-6)
    cosines = q_BD @ vectors.vectors_ND.T
    assert (cosines.max(1) > 0.7).all()
    assert np.median(cosines) < 0.3


def test_sizes_are_whole_numbers():
    assert whole_numbers("1, 8,32", "--batches") == [1, 8, 32]
    for text, word in (("1,x", "x"), ("8,", ""), ("0", "0"), ("-1", "-1"), ("1.5", "1.5")):
        with pytest.raises(UserError, match=f"--batches {text}: '{word}' is no whole number"):
            whole_numbers(text, "--batches")
