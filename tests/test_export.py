"""Exported folders give the same embeddings elsewhere and cannot go causal unnoticed."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from drama.encoder import Encoder
from drama.equality import TOLERANCE, compare
from drama.errors import UserError
from drama.export import export
from drama.folder import RetrieverSettings
from drama.hf import SUMS
from drama.retrieve.models import open_model
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
    differences = compare(folder, lengths=(32, 700))
    assert len(differences) == 2 * 2 * 2 * 2  # libraries, ways, lengths, dims
    assert max(one.value for one in differences) <= TOLERANCE
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
    (folder / SUMS).unlink()  # which would notice
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
        compare(folder, lengths=(32,))  # the others went causal: it is noticed
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


def test_the_probe_catches_a_folder_whose_mask_was_broken(tmp_path):
    """Both keys of a EuroBERT turned: it declares a mask that its architecture does not have."""
    _, folder = exported(tmp_path)
    (folder / SUMS).unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"is_causal": True, "use_bidirectional_attention": False}))
    with pytest.raises(UserError, match="declared causal, but the p.* forward is bidirectional"):
        Encoder.from_pretrained(folder)


def test_the_tokenizer_is_named_as_transformers_4_knows_it(tmp_path):
    _, folder = exported(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_a_baked_truncation_holds_for_every_consumer(tmp_path, attention):
    from sentence_transformers import SentenceTransformer

    encoder, whole = exported(tmp_path, attention=attention, pooling="mean")
    folder = export(encoder, tmp_path / "cut", dim=16)
    texts = ["one", "a longer text about nothing in particular", "三"]
    want_BD = encoder.encode(texts, "document", dim=16)
    again = Encoder.from_pretrained(folder)
    assert (again.dim, again.matryoshka_dims) == (16, (16,))
    model = open_model(folder)
    assert (type(model).__name__, model.dim) == ("OurModel", 16)
    theirs = SentenceTransformer(str(folder), device="cpu")
    whole_theirs = SentenceTransformer(str(whole), device="cpu", truncate_dim=16)
    found = {
        "ours": again.encode(texts, "document"),
        "open_model": model.encode(texts, "document"),
        "sentence-transformers": theirs.encode(texts, prompt_name="document"),
        "its truncate_dim": whole_theirs.encode(
            texts, prompt_name="document", normalize_embeddings=True
        ),
    }
    for name, got_BD in found.items():
        np.testing.assert_allclose(got_BD, want_BD, atol=TOLERANCE, err_msg=name)
    assert {one.dim for one in compare(folder, lengths=(40,))} == {16}
    with pytest.raises(UserError, match="dim 17 is wider than the model's 16"):
        again.encode(texts, "document", dim=17)
    # and once more: a folder that is cut stays so, and can be cut further
    export(again, tmp_path / "again")
    assert Encoder.from_pretrained(tmp_path / "again").dim == 16


def test_a_dim_that_does_not_fit(tmp_path, capsys):
    encoder, _ = exported(tmp_path)
    for dim in (0, 65):
        with pytest.raises(UserError, match=f"--dim {dim} does not fit: 1 to 64 do, trained were"):
            export(encoder, tmp_path / "cut", dim=dim)
    assert not (tmp_path / "cut").exists()
    export(encoder, tmp_path / "cut", dim=20)
    warning = "--dim 20 is none of the dims that the model was trained for (16, 64)"
    assert warning in capsys.readouterr().err.replace("\n", " ")
    assert Encoder.from_pretrained(tmp_path / "cut").matryoshka_dims == (16, 20)


def test_the_whole_width_needs_no_module(tmp_path):
    encoder, _ = exported(tmp_path)
    folder = export(encoder, tmp_path / "cut", dim=64)
    assert not (folder / "2_Dense").exists()
    assert Encoder.from_pretrained(folder).settings.dim is None


def test_dtype(tmp_path):
    encoder, _ = exported(tmp_path)
    folder = export(encoder, tmp_path / "half", dtype=torch.bfloat16)
    assert AutoModel.from_pretrained(folder).dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
