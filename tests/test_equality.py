"""The table of equality: all libraries, padded and not, to 8,192 tokens, and a version apart."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from drama import equality
from drama.encoder import Encoder
from drama.equality import LENGTHS, TOLERANCE, compare, table
from drama.errors import UserError
from drama.export import export
from drama.folder import RetrieverSettings
from drama.testing import tiny_llama
from tests.environments import environment_with

OLDER = "sentence-transformers==5.3.*"
SHOW = """
import json, sys
from dataclasses import asdict
import sentence_transformers
from drama.equality import compare
found = [asdict(one) for one in compare(sys.argv[1], lengths=json.loads(sys.argv[2]))]
print(json.dumps([sentence_transformers.__version__, found]))
"""


def exported(tmp_path, attention="bidirectional", pooling="last", **options):
    source = tiny_llama(tmp_path / "source", max_position_embeddings=8192)
    settings = RetrieverSettings(
        attention=attention, pooling=pooling, matryoshka_dims=(16, 32, 64), max_tokens=8192
    )
    encoder = Encoder.from_pretrained(source, settings=settings)
    return export(encoder, tmp_path / "out", **options)


def test_the_texts_have_the_lengths(tmp_path):
    encoder = Encoder.from_pretrained(exported(tmp_path))
    for length in (32, 512, 2048):
        texts = equality._texts(encoder, length)
        longest = max(len(row) for row in encoder.tokenize(texts, "document"))
        assert length - 4 <= longest <= length  # a letter is up to three bytes here, a token each
        assert all(text == text.strip() for text in texts)


def test_a_table(tmp_path):
    found = compare(exported(tmp_path), lengths=(32, 100), dims=(64, 16))
    assert {(one.way, one.length, one.dim) for one in found} == {
        (way, length, dim) for way in ("padded", "unpadded") for length in (32, 100)
        for dim in (64, 16)
    }  # fmt: skip
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(found))
    text = console.export_text()
    assert "sentence-transformers" in text
    assert text.count("unpadded") == 4


def test_a_difference_is_named(tmp_path, monkeypatch):
    folder = exported(tmp_path)
    real = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *a, **k: real(*a, **k) + np.float32(1e-3))
    with pytest.raises(UserError, match=r"transformers, padded, 40 tokens, 16 dims differs from"):
        compare(folder, lengths=(40,))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_all_libraries_to_8192_tokens(tmp_path, attention, pooling):
    found = compare(exported(tmp_path, attention, pooling, onnx="float32"))
    assert len({one.library for one in found}) == 3
    assert len(found) == 3 * 2 * len(LENGTHS) * 3
    assert max(one.value for one in found) <= TOLERANCE  # ONNX too, though 1e-4 is allowed


@pytest.mark.slow
def test_sentence_transformers_5_3(tmp_path):
    """In an environment of its own with our torch and transformers; needs a package index."""
    python = environment_with(OLDER)
    for attention, pooling, dim in (
        ("bidirectional", "last", None), ("causal", "mean", None), ("causal", "last", None),
        ("bidirectional", "mean", None), ("bidirectional", "mean", 16),
    ):  # fmt: skip
        place = tmp_path / f"{attention}-{pooling}-{dim}"
        folder = exported(place, attention, pooling, dim=dim)
        shown = subprocess.run(
            [str(python), "-c", SHOW, str(folder), "[32, 512, 8192]"],
            capture_output=True, text=True, timeout=600, check=False,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
        assert shown.returncode == 0, shown.stderr[-3000:]
        version, found = json.loads(shown.stdout.splitlines()[-1])
        assert version.startswith("5.3.")
        theirs = [one for one in found if one["library"] == f"sentence-transformers {version}"]
        assert len(theirs) == 2 * 3 * (1 if dim else 3)
        assert max(one["value"] for one in theirs) <= TOLERANCE
