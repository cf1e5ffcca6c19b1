from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from drama.encoder import Encoder
from drama.errors import UserError
from drama.retrieve import fill
from drama.retrieve.encode import encode_corpus
from drama.retrieve.vectors import read_vectors


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
    words = ["tide", "moon", "honey", "yeast", "magma", "virus", "leaf", "ocean", "bread", "bee"]
    corpus = jsonl(
        "many.jsonl",
        [
            {"_id": f"d{i}", "text": " ".join(words[(i * j) % 10] for j in range(1, 3 + i % 60))}
            for i in range(640)
        ],
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(model), str(killed)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and _windows_done(killed) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    done = _windows_done(killed)
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
    for name in ("vectors.npy", "ids.txt", "manifest.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def _windows_done(folder: Path) -> int:
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


def test_a_model_that_gives_nan(dataset, make_model, tmp_path):
    from transformers import LlamaModel

    broken = make_model(3)
    model = LlamaModel.from_pretrained(broken)
    model.norm.weight.data[5] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(UserError, match=r"model-3 gives a vector with NaN for document 'd1'"):
        encode_corpus(dataset, broken, tmp_path / "v")


def _edit_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_read_vectors_is_strict(dataset, model, tmp_path):
    folder = tmp_path / "v"
    with pytest.raises(UserError, match=r"v is no vectors folder \(manifest.json is missing\)"):
        read_vectors(folder)
    encode_corpus(dataset, model, folder)
    good = (folder / "manifest.json").read_text()

    _edit_manifest(folder, dim=32)
    with pytest.raises(UserError, match=r"of shape \(8, 64\), the manifest says .*\(8, 32\)"):
        read_vectors(folder)
    _edit_manifest(folder, dim="64")
    with pytest.raises(UserError, match=r"manifest\.json: 'dim' is missing, unknown or of the"):
        read_vectors(folder)
    _edit_manifest(folder, format_version=2)
    with pytest.raises(UserError, match=r"manifest\.json: format version 2, this version of"):
        read_vectors(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is not readable JSON"):
        read_vectors(folder)
    (folder / "manifest.json").write_text(good)

    stored = np.load(folder / "vectors.npy", mmap_mode="r+")
    stored[2, 7] = np.nan
    stored.flush()
    with pytest.raises(UserError, match=r"the vector of document 'd3' is not finite"):
        read_vectors(folder)
    stored[2, 7] = 0
    stored.flush()
    (folder / "ids.txt").write_text("d1\nd2\n")
    with pytest.raises(UserError, match=r"ids\.txt holds 2 ids for 8 vectors"):
        read_vectors(folder)
    with (folder / "vectors.npy").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(UserError, match=r"vectors\.npy cannot be read"):
        read_vectors(folder)
