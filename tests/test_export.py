"""Exported folders give the same embeddings elsewhere and cannot go causal unnoticed."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from drama.encoder import Encoder, RetrieverSettings
from drama.equality import TOLERANCE, embedding_differences
from drama.errors import UserError
from drama.export import export
from drama.testing import tiny_llama

LLAMA3_ROPE = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def exported(tmp_path, architecture=None, config=None, **settings):
    source = tiny_llama(tmp_path / "source", **(config or {}))
    settings = RetrieverSettings(matryoshka_dims=(16, 64), max_tokens=700, **settings)
    encoder = Encoder.from_pretrained(source, settings=settings)
    return encoder, export(encoder, tmp_path / "out", architecture=architecture)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(
    ("attention", "architecture", "config"),
    [
        ("bidirectional", None, {}),
        ("bidirectional", "llama", {"rope_parameters": LLAMA3_ROPE}),
        ("bidirectional", None, {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
        ("causal", None, {}),
    ],
    ids=["eurobert", "llama", "eurobert-llama3-rope-wide-heads", "causal"],
)
def test_same_embeddings_in_transformers_and_sentence_transformers(
    tmp_path, attention, architecture, config, pooling
):
    encoder, folder = exported(tmp_path, architecture, config, attention=attention, pooling=pooling)
    differences = embedding_differences(folder)
    assert len(differences) == 4
    assert max(differences.values()) <= TOLERANCE
    texts = ["one", "a longer text about nothing in particular", "三"]
    again = Encoder.from_pretrained(folder)
    assert again.settings == encoder.settings
    np.testing.assert_allclose(
        again.encode(texts, "query"), encoder.encode(texts, "query"), atol=1e-6
    )


def test_query_prompt_is_stored(tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder, folder = exported(tmp_path, query_prefix="Frage: ")
    theirs = SentenceTransformer(str(folder), device="cpu").encode(["wer?"], prompt_name="query")
    np.testing.assert_allclose(theirs, encoder.encode(["wer?"], "query"), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("attention", "architecture", "model_type"),
    [("bidirectional", None, "eurobert"), ("bidirectional", "llama", "llama"),
     ("causal", None, "llama")],
)  # fmt: skip
def test_config_keys(tmp_path, attention, architecture, model_type):
    _, folder = exported(
        tmp_path, architecture, {"rope_parameters": LLAMA3_ROPE}, attention=attention
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == model_type
    assert config["is_causal"] == (attention == "causal")
    assert config["use_bidirectional_attention"] == (attention == "bidirectional")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["rope_scaling"]["factor"] == 8.0
    assert config["matryoshka_dimensions"] == [16, 64]
    assert "auto_map" not in config
    assert AutoConfig.from_pretrained(folder).model_type == model_type


def test_a_lost_mask_key_does_not_make_it_causal(tmp_path):
    """Without `is_causal` transformers runs a Llama causally; ours reads the other key as well."""
    encoder, folder = exported(tmp_path, architecture="llama")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["is_causal"]
    path.write_text(json.dumps(config))
    again = Encoder.from_pretrained(folder)
    assert again.settings.attention == "bidirectional"
    np.testing.assert_allclose(
        again.encode(["some text"], "query"), encoder.encode(["some text"], "query"), atol=1e-6
    )
    with pytest.raises(UserError, match="differs from our embeddings"):
        embedding_differences(folder)  # the others went causal: it is noticed
    path.write_text(json.dumps(config | {"is_causal": True}))
    with pytest.raises(UserError, match="contradict"):
        Encoder.from_pretrained(folder)


def test_causal_cannot_be_written_as_eurobert(tmp_path):
    with pytest.raises(UserError, match="eurobert"):
        exported(tmp_path, "eurobert", attention="causal")
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    encoder, folder = exported(tmp_path)
    before = sorted((p.name, p.read_bytes()) for p in folder.rglob("*") if p.is_file())

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoder.tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        export(encoder, folder)
    assert sorted((p.name, p.read_bytes()) for p in folder.rglob("*") if p.is_file()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_dtype(tmp_path):
    encoder, _ = exported(tmp_path)
    folder = export(encoder, tmp_path / "half", dtype=torch.bfloat16)
    assert AutoModel.from_pretrained(folder).dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
