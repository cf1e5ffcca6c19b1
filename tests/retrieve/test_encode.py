from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig, BertModel

from drama.encoder import Encoder
from drama.errors import UserError
from drama.retrieve import fill
from drama.retrieve.corpus import Corpus
from drama.retrieve.encode import encode_corpus
from drama.retrieve.vectors import read_vectors
from drama.testing import byte_tokenizer


def test_vectors_equal_each_text_encoded_alone(dataset, model, tmp_path):
    vectors = encode_corpus(dataset, model, tmp_path / "v", window=3, token_budget=64)
    encoder = Encoder.from_pretrained(model)
    rows = [json.loads(line) for line in (dataset / "corpus.jsonl").read_text().splitlines()]
    assert vectors.ids == [row["_id"] for row in rows]
    for vector, row in zip(vectors.vectors_ND, rows, strict=True):
        text = (row["title"] + " " + row["text"]).strip()
        np.testing.assert_allclose(vector, encoder.encode([text], "document")[0], atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors.vectors_ND, axis=1), 1, atol=1e-5)
    assert not (tmp_path / "v" / "progress.json").exists()


def test_options_reach_the_vectors(dataset, model, tmp_path):
    encoder = Encoder.from_pretrained(model)
    vectors = encode_corpus(
        dataset, model, tmp_path / "v", kind="query", max_tokens=12, dim=16, dtype="float16"
    )
    assert vectors.vectors_ND.dtype == np.float16
    assert vectors.vectors_ND.shape == (8, 16)
    tokens = encoder.tokenize(["Vaccines Vaccination trains the"], "query", 12)
    expected = encoder.embed(tokens, dim=16)[0]
    np.testing.assert_allclose(vectors.vectors_ND[0], expected, atol=1e-3)
    assert (vectors.manifest.dim, vectors.manifest.max_tokens) == (16, 12)


def test_jsonl_and_gzip_give_the_folder_s_vectors(dataset, model, tmp_path):
    folder = encode_corpus(dataset, model, tmp_path / "a").vectors_ND
    copy = tmp_path / "texts.jsonl.gz"
    copy.write_bytes(gzip.compress((dataset / "corpus.jsonl").read_bytes()))
    np.testing.assert_array_equal(encode_corpus(copy, model, tmp_path / "b").vectors_ND, folder)


SCRIPT = """
import sys, torch
from drama.retrieve.encode import encode_corpus
torch.set_num_threads(1)
encode_corpus(*sys.argv[1:4], window=8)
"""


def test_a_killed_run_resumes_to_the_same_bits(jsonl, model, tmp_path):
    corpus = many(jsonl)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(model), str(killed)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and windows_done(killed) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    done = windows_done(killed)
    assert 3 <= done < 80
    with pytest.raises(UserError, match=r"killed is half-written: start the same encoding again"):
        read_vectors(killed)

    # a finished window is not encoded again: what stands in its place stays
    stored = np.load(killed / "vectors.npy", mmap_mode="r+")
    marked = stored[0].copy()
    stored[0] = marked[::-1]
    stored.flush()
    encode_corpus(corpus, model, killed, window=8)
    resumed = np.load(killed / "vectors.npy", mmap_mode="r+")
    np.testing.assert_array_equal(resumed[0], marked[::-1])
    resumed[0] = marked
    resumed.flush()

    encode_corpus(corpus, model, whole, window=8)
    assert_same(whole, killed)


def windows_done(folder: Path) -> int:
    try:
        return sum((folder / "done.bin").read_bytes())
    except FileNotFoundError:
        return 0


def test_a_finished_folder_is_taken_over_and_not_encoded_again(
    dataset, model, tmp_path, monkeypatch
):
    encode_corpus(dataset, model, tmp_path / "v")
    before = (tmp_path / "v" / "vectors.npy").stat().st_mtime_ns
    monkeypatch.setattr(Encoder, "embed", None)  # calling it would raise
    assert len(encode_corpus(dataset, model, tmp_path / "v").ids) == 8
    assert (tmp_path / "v" / "vectors.npy").stat().st_mtime_ns == before


def test_other_inputs_are_refused_or_replaced(dataset, model, tmp_path):
    encode_corpus(dataset, model, tmp_path / "v")
    with pytest.raises(UserError, match=r"v holds vectors of other inputs \(dim 64, not 32\)"):
        encode_corpus(dataset, model, tmp_path / "v", dim=32)
    replaced = encode_corpus(dataset, model, tmp_path / "v", dim=32, overwrite=True)
    assert replaced.vectors_ND.shape == (8, 32)


def test_half_written_folder_of_other_inputs(dataset, model, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "embed", stop)
        with pytest.raises(KeyboardInterrupt):
            encode_corpus(dataset, model, tmp_path / "v")
    with pytest.raises(UserError, match=r"half-written with other inputs \(max_tokens 512, not 9"):
        encode_corpus(dataset, model, tmp_path / "v", max_tokens=9)
    other = encode_corpus(dataset, model, tmp_path / "v", max_tokens=9, overwrite=True)
    assert other.manifest.max_tokens == 9


def test_a_changed_model_is_other_inputs(dataset, make_model, tmp_path):
    model = make_model(1)
    encode_corpus(dataset, model, tmp_path / "v")
    weights = model / "model.safetensors"
    weights.write_bytes(make_model(2).joinpath("model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"other inputs \(model_sha256 "):
        encode_corpus(dataset, model, tmp_path / "v")


def test_empty_corpus(jsonl, model, tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl holds no documents"):
        encode_corpus(jsonl("none.jsonl", []), model, tmp_path / "v")


@pytest.mark.parametrize("name", ["corpus.jsonl", "other.jsonl"])
def test_duplicate_id(jsonl, model, tmp_path, name):
    rows = [{"_id": i, "text": "x"} for i in ("a", "b", "a")]
    with pytest.raises(UserError, match=rf"{name}:3: document 'a' stands in the corpus twice"):
        encode_corpus(jsonl(name, rows), model, tmp_path / "v")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"_id": 3, "text": "x"}, r":1: the line has no string '_id'"),
        ({"_id": "3", "txt": "x"}, r":1: the line has no string 'text'"),
        ({"_id": "3", "text": "x", "title": 1}, r":1: the title is not a string"),
        ({"_id": "a\nb", "text": "x"}, r"bad\.jsonl: the document id 'a\\nb' holds a line break"),
        ({"_id": "a\n", "text": "x"}, r"bad\.jsonl: the document id 'a\\n' holds a line break"),
    ],
)
def test_bad_lines(jsonl, model, tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        encode_corpus(jsonl("bad.jsonl", [row]), model, tmp_path / "v")


def test_no_corpus_and_no_model(dataset, model, tmp_path):
    with pytest.raises(UserError, match=r"nowhere is no corpus; give a BEIR folder"):
        encode_corpus(tmp_path / "nowhere", model, tmp_path / "v")
    with pytest.raises(UserError, match=r"facts: not a model folder"):
        encode_corpus(dataset, dataset, tmp_path / "v")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 65}, r"dim 65 does not fit .*: 1 to 64 do"),
        ({"dim": 0}, r"dim 0 does not fit"),
        ({"max_tokens": 513}, r"max_tokens 513 does not fit .*: 2 to 512 do"),
        ({"dtype": "int8"}, r"dtype int8 is not a storage type; float32 and float16 are"),
        ({"window": 0}, r"window 0 must be at least 1"),
        ({"token_budget": 0}, r"token_budget 0 must be at least 1"),
    ],
)
def test_bad_options(dataset, model, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        encode_corpus(dataset, model, tmp_path / "v", **options)


def test_too_little_disk(dataset, model, tmp_path, monkeypatch):
    usage = fill.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(fill.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"v: the vectors need 0 MiB, 0 MiB are free there"):
        encode_corpus(dataset, model, tmp_path / "v")


def test_too_little_disk_leaves_what_was_to_be_replaced(dataset, model, tmp_path, monkeypatch):
    before = encode_corpus(dataset, model, tmp_path / "v", dim=32)
    size = (tmp_path / "v" / "vectors.npy").stat().st_blocks * 512
    rows = before.manifest.rows
    usage = fill.shutil.disk_usage(tmp_path)._replace(free=rows * 64 * 4 - size - 1)
    monkeypatch.setattr(fill.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"v: the vectors need"):
        encode_corpus(dataset, model, tmp_path / "v", overwrite=True)
    np.testing.assert_array_equal(read_vectors(tmp_path / "v").vectors_ND, before.vectors_ND)
    usage = usage._replace(free=usage.free + 1)  # with the old file's room it is enough
    assert encode_corpus(dataset, model, tmp_path / "v", overwrite=True).manifest.dim == 64


def test_a_second_encoding_into_the_folder_is_refused(dataset, model, tmp_path):
    folder = tmp_path / "v"
    holder = (
        "import sys; from pathlib import Path; from drama.retrieve.fill import filling\n"
        "with filling(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", holder, str(folder)], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"v: another job is writing there; wait for its end"):
            encode_corpus(dataset, model, folder)
        process.stdin.close()
    encode_corpus(dataset, model, folder)
    assert {path.name for path in folder.iterdir()} == {"vectors.npy", "ids.txt", "manifest.json"}


def test_a_model_that_gives_nan(dataset, make_model, tmp_path):
    from transformers import LlamaModel

    broken = make_model(3)
    model = LlamaModel.from_pretrained(broken)
    model.norm.weight.data[5] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(UserError, match=r"model-3 gives a vector with NaN for document 'd1'"):
        encode_corpus(dataset, broken, tmp_path / "v")


@pytest.mark.parametrize(
    "left", [("progress.json", "done.bin", ".lock"), ("done.bin",), (".lock",)]
)
def test_what_is_left_by_a_kill_after_the_last_window_goes(dataset, model, tmp_path, left):
    """The manifest vouches for the vectors; nothing of the work may lie beside them."""
    folder = tmp_path / "v"
    encode_corpus(dataset, model, folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in left:
        (folder / name).write_bytes(b"\x01")
    encode_corpus(dataset, model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def many(jsonl) -> Path:
    words = ["tide", "moon", "honey", "yeast", "magma", "virus", "leaf", "ocean", "bread", "bee"]
    rows = [
        {"_id": f"d{i}", "text": " ".join(words[(i * j) % 10] for j in range(1, 3 + i % 60))}
        for i in range(640)
    ]
    return jsonl("many.jsonl", rows)


def assert_same(one: Path, other: Path) -> None:
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_what_a_killed_run_left_damaged_is_refused_or_replaced(jsonl, model, tmp_path, monkeypatch):
    corpus, folder = many(jsonl), tmp_path / "v"
    embed, calls = Encoder.embed, []

    def stopping(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return embed(*arguments, **options)

    def leave(name: str) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "embed", stopping)
            with pytest.raises(KeyboardInterrupt):
                encode_corpus(corpus, model, folder, window=64, token_budget=10**6)
        assert 0 < windows_done(folder) <= 3
        return folder / name

    faults = {
        "vectors.npy": r"v/vectors\.npy cannot be read .*encode again with --overwrite",
        "ids.txt": r"v/ids\.txt holds \d+ ids for 640 vectors; encode again with --overwrite",
        "done.bin": r"v/done\.bin is damaged; encode again with --overwrite",
        "progress.json": r"v/progress\.json is not readable JSON",
    }
    for name, message in faults.items():
        path = leave(name)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(UserError, match=message):
            encode_corpus(corpus, model, folder, window=64, token_budget=10**6)
        if name != "progress.json":
            path.unlink()
            with pytest.raises(UserError, match=rf"v/{name} "):
                encode_corpus(corpus, model, folder, window=64, token_budget=10**6)
    encode_corpus(corpus, model, tmp_path / "w", window=64, token_budget=10**6)
    encode_corpus(corpus, model, folder, window=64, token_budget=10**6, overwrite=True)
    assert_same(tmp_path / "w", folder)


def test_a_finished_folder_that_is_damaged_is_refused_or_replaced(dataset, model, tmp_path):
    folder, whole = tmp_path / "v", tmp_path / "whole"
    encode_corpus(dataset, model, whole)

    def put_nan(path: Path) -> None:
        stored = np.load(path, mmap_mode="r+")
        stored[3] = np.nan
        stored.flush()

    def flip(path: Path) -> None:
        path.write_text(path.read_text().replace('"dim": 64', '"dim": 65'))

    for name, damage, message in (
        ("vectors.npy", lambda path: os.truncate(path, 900), "cannot be read"),
        ("vectors.npy", put_nan, "vector of document 'd4' is not finite; encode again with --over"),
        ("ids.txt", Path.unlink, "ids.txt cannot be read .*encode again with --overwrite"),
        ("manifest.json", flip, r"vectors of other inputs \(dim 65, not 64\)"),
        ("manifest.json", lambda path: os.truncate(path, 40), "is not readable JSON"),
    ):
        shutil.copytree(whole, folder)
        damage(folder / name)
        with pytest.raises(UserError, match=message):
            encode_corpus(dataset, model, folder)
        encode_corpus(dataset, model, folder, overwrite=True)
        assert_same(whole, folder)
        shutil.rmtree(folder)


def test_a_corpus_that_changes_meanwhile(jsonl, model, tmp_path, monkeypatch):
    corpus, scan = many(jsonl), Corpus.scan

    def cut(path):
        found = scan(path)
        lines = corpus.read_text().splitlines(keepends=True)
        corpus.write_text("".join(lines[:30]))
        return found

    monkeypatch.setattr(Corpus, "scan", cut)
    with pytest.raises(UserError, match=r"many\.jsonl has changed since it was read"):
        encode_corpus(corpus, model, tmp_path / "v", window=16)


def test_a_model_of_sentence_transformers(dataset, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    config = BertConfig(
        vocab_size=260, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    model = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    model.save(str(tmp_path / "st"))
    vectors = encode_corpus(dataset, tmp_path / "st", tmp_path / "v", window=3, dim=8)
    rows = [json.loads(line) for line in (dataset / "corpus.jsonl").read_text().splitlines()]
    want = model.encode([f"{row['title']} {row['text']}".strip() for row in rows])[:, :8]
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors.vectors_ND, want, atol=1e-6)
