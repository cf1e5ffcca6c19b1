"""ONNX graphs give our embeddings, whatever the batch, and are refused where they do not."""

import sys

import numpy as np
import pytest
import torch

from drama import export_onnx
from drama.encoder import Encoder
from drama.equality import compare
from drama.errors import UserError
from drama.export import export
from drama.export_onnx import INT8, PLAIN, OnnxModel
from drama.folder import RetrieverSettings
from drama.hf import SUMS, write_sums
from drama.retrieve.models import GRAPH_TOKENS, open_model
from drama.testing import tiny_llama

ROWS = [[5, 6, 7], list(range(3, 90)), [9], list(range(200, 230))]


def tiny(tmp_path, **settings):
    given = {"matryoshka_dims": (16, 64), "max_tokens": 300, **settings}
    source = tiny_llama(tmp_path / "source", num_hidden_layers=1)
    return Encoder.from_pretrained(source, settings=RetrieverSettings(**given))


@pytest.mark.parametrize(
    ("attention", "pooling", "options", "beside"),
    [
        ("bidirectional", "last", {"dim": 16, "architecture": "llama"}, False),
        ("causal", "mean", {"dtype": torch.bfloat16}, True),
    ],
    ids=["bidirectional-last-cut", "causal-mean-rounded-large"],
)
def test_the_graph_gives_our_embeddings(tmp_path, monkeypatch, attention, pooling, options, beside):
    """beside: as if the weights were too many for one protobuf."""
    if beside:
        monkeypatch.setattr(export_onnx, "EMBEDDED_BYTES", 1000)
    source = tiny(tmp_path, attention=attention, pooling=pooling)
    folder = export(source, tmp_path / "out", onnx="int8", **options)
    encoder = Encoder.from_pretrained(folder)  # the graph is of the weights as they are written
    want_BD = encoder.embed(ROWS)
    assert (folder / "onnx" / "model.onnx_data").is_file() == beside
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
    sizes = {
        name: sum(path.stat().st_size for path in (folder / "onnx").glob(f"{name}.onnx*"))
        for name in ("model", "model_quint8")
    }
    assert sizes["model_quint8"] < sizes["model"]
    card = (folder / "README.md").read_text()
    assert "## ONNX" in card
    assert "cosine of its vectors" in card
    assert str(tmp_path).encode() not in (folder / PLAIN).read_bytes()


def test_a_wrong_graph_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    """The graph is traced with the other mask: only the check can notice."""
    encoder = tiny(tmp_path, pooling="mean")  # the last token of one layer sees all anyhow
    real = export_onnx._Graph.__init__

    def broken(self, backbone, encoder):
        real(self, backbone, encoder)
        self.causal = not self.causal

    monkeypatch.setattr(export_onnx._Graph, "__init__", broken)
    with pytest.raises(UserError, match=r"model.onnx gives other embeddings than the model, by"):
        export(encoder, tmp_path / "out", onnx="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(
        export_onnx.importlib.util,
        "find_spec",
        lambda name: None if sys.modules.get(name, 1) is None else object(),
    )
    with pytest.raises(UserError, match=r"--onnx needs onnxscript; pip install 'drama-retriever"):
        export(tiny(tmp_path), tmp_path / "out", onnx="float32")


def test_a_short_query_alone_takes_the_graph(tmp_path, monkeypatch):
    folder = export(tiny(tmp_path), tmp_path / "out", onnx="float32")
    runs = []
    real = OnnxModel.__call__
    monkeypatch.setattr(
        OnnxModel, "__call__", lambda self, rows: runs.append(rows) or real(self, rows)
    )
    with_graph, without = open_model(folder, graph=True), open_model(folder)
    assert len(runs) == 1  # held against the model once
    short, long = "when do tides turn?", "tide " * GRAPH_TOKENS
    for texts, kind, dim, taken in [
        ([short], "query", None, True),
        ([short], "query", 16, True),
        ([short], "document", None, False),
        ([short, short], "query", None, False),
        ([long], "query", None, False),
    ]:
        runs.clear()
        found_BD = with_graph.encode(texts, kind, dim=dim)
        assert bool(runs) == taken
        want_BD = without.encode(texts, kind, dim=dim)
        assert (found_BD.dtype, found_BD.shape) == (np.float32, want_BD.shape)
        np.testing.assert_allclose(found_BD, want_BD, atol=1e-5 if taken else 0)
    assert open_model(folder, graph=True, precision="bf16").graph is None
    assert without.graph is None
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(export_onnx.importlib.util, "find_spec", lambda name: None)
    assert open_model(folder, graph=True).graph is None


def test_a_graph_that_is_not_the_models_is_refused(tmp_path):
    """Another model's, a damaged one; without the graph both load."""
    folder = export(tiny(tmp_path), tmp_path / "out", onnx="float32")
    torch.manual_seed(1)
    source = tiny_llama(tmp_path / "other", num_hidden_layers=2)
    other = export(Encoder.from_pretrained(source), tmp_path / "out2", onnx="float32")
    good = (folder / PLAIN).read_bytes()
    (folder / PLAIN).write_bytes((other / PLAIN).read_bytes())
    with pytest.raises(UserError, match=r"onnx/model.onnx is cut or changed since it was written"):
        open_model(folder, graph=True)
    write_sums(folder)
    with pytest.raises(UserError, match=r"gives other embeddings than the model, by .*; export ag"):
        open_model(folder, graph=True)
    (folder / PLAIN).write_bytes(good[: len(good) // 2])
    write_sums(folder)
    with pytest.raises(UserError, match=r"model.onnx: onnxruntime cannot run the graph: .*export"):
        open_model(folder, graph=True)
    open_model(folder)


@pytest.mark.parametrize("listed", [False, True])
def test_a_graph_that_is_not_in_the_list_is_left_alone(tmp_path, listed):
    """As models come from elsewhere: no list at all, or a graph that somebody put there later."""
    folder = export(tiny(tmp_path), tmp_path / "out")
    (folder / PLAIN).parent.mkdir()
    (folder / PLAIN).write_bytes(b"token states, a past, half the precision: who knows")
    if not listed:
        (folder / SUMS).unlink()
    assert open_model(folder, graph=True).graph is None
