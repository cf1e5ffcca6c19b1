"""ONNX graphs give our embeddings, whatever the batch, and are refused where they do not."""

import json
import sys

import numpy as np
import pytest
import torch

from drama import export_onnx
from drama.encoder import Encoder, RetrieverSettings
from drama.equality import compare
from drama.errors import UserError
from drama.export import export
from drama.export_onnx import INT8, PLAIN, OnnxModel
from drama.testing import tiny_llama

ROWS = [[5, 6, 7], list(range(3, 90)), [9], list(range(200, 230))]


def tiny(tmp_path, **settings):
    given = {"matryoshka_dims": (16, 64), "max_tokens": 300, **settings}
    source = tiny_llama(tmp_path / "source", num_hidden_layers=2)
    return Encoder.from_pretrained(source, settings=RetrieverSettings(**given))


@pytest.mark.parametrize(
    ("attention", "pooling", "dim", "architecture"),
    [("bidirectional", "last", 16, "llama"), ("causal", "mean", None, None)],
)
def test_the_graph_gives_our_embeddings(tmp_path, attention, pooling, dim, architecture):
    encoder = tiny(tmp_path, attention=attention, pooling=pooling)
    folder = export(encoder, tmp_path / "out", dim=dim, architecture=architecture, onnx="int8")
    want_BD = encoder.embed(ROWS, dim=dim)
    model = OnnxModel(folder / PLAIN)
    np.testing.assert_allclose(model(ROWS), want_BD, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([model([row]) for row in ROWS]), want_BD, atol=1e-5)
    # padding on the left, as a server may do: rows that see nothing must not spoil the others
    longest = max(map(len, ROWS))
    ids_BL = np.array([[0] * (longest - len(row)) + row for row in ROWS])
    mask_BL = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in ROWS])
    states_BLD, left_BD = model.session.run(
        ["last_hidden_state", "sentence_embedding"],
        {"input_ids": ids_BL, "attention_mask": mask_BL},
    )
    np.testing.assert_allclose(left_BD, want_BD, atol=1e-5)
    assert np.isfinite(states_BLD).all()
    assert {one.library for one in compare(folder, lengths=(33,))} >= {"onnxruntime"}
    # the one of 8 bits is near, is another, and is smaller
    int8_BD = OnnxModel(folder / INT8)(ROWS)
    cosine_B = (int8_BD * want_BD).sum(1)
    assert 0.95 < cosine_B.min() < 0.99999
    assert (folder / INT8).stat().st_size < (folder / PLAIN).stat().st_size
    card = (folder / "README.md").read_text()
    assert "## ONNX" in card and "cosine of its vectors" in card
    assert str(tmp_path).encode() not in (folder / PLAIN).read_bytes()


def test_a_wrong_graph_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    """The graph is traced with the other mask: only the check can notice."""
    encoder = tiny(tmp_path)
    real = export_onnx._Graph.__init__

    def broken(self, backbone, encoder):
        real(self, backbone, encoder)
        self.causal = not self.causal

    monkeypatch.setattr(export_onnx._Graph, "__init__", broken)
    with pytest.raises(UserError, match=r"model.onnx gives other embeddings than the model, by"):
        export(encoder, tmp_path / "out", onnx="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_beyond_a_protobuf_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "EMBEDDED_BYTES", 1000)
    encoder = tiny(tmp_path)
    folder = export(encoder, tmp_path / "out", onnx="float32")
    beside = folder / "onnx" / "model.onnx_data"
    assert beside.stat().st_size > 0.9 * (folder / "model.safetensors").stat().st_size
    np.testing.assert_allclose(OnnxModel(folder / PLAIN)(ROWS), encoder.embed(ROWS), atol=1e-5)


def test_the_weights_may_be_rounded_and_the_graph_is_float32(tmp_path):
    encoder = tiny(tmp_path)
    folder = export(encoder, tmp_path / "out", dtype=torch.bfloat16, onnx="float32")
    rounded = Encoder.from_pretrained(folder)
    np.testing.assert_allclose(OnnxModel(folder / PLAIN)(ROWS), rounded.embed(ROWS), atol=1e-5)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(
        export_onnx.importlib.util,
        "find_spec",
        lambda name: None if sys.modules.get(name, 1) is None else object(),
    )
    with pytest.raises(UserError, match=r"--onnx needs onnxscript; pip install 'drama-retriever"):
        export(tiny(tmp_path), tmp_path / "out", onnx="float32")
