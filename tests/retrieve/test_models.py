"""One face for both kinds of folders, held against the libraries that made them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from drama.encoder import Encoder
from drama.errors import UserError
from drama.export import export
from drama.folder import RetrieverSettings
from drama.hf import model_sha256
from drama.retrieve.models import OtherModel, OurModel, open_model
from drama.testing import byte_tokenizer, tiny_llama

TEXTS = ["tides", "bees store honey " * 9, "x", "the moon pulls the water", "yeast " * 30, ""]
PROMPTS = {"query": "ask: ", "document": "text: "}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder that sentence-transformers wrote: BERT, mean pooling, prompts, 64 tokens."""
    library = pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("other")
    config = BertConfig(
        vocab_size=260, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "bert")
    byte_tokenizer().save_pretrained(folder / "bert")
    model = library.SentenceTransformer(str(folder / "bert"), device="cpu", prompts=PROMPTS)
    model.max_seq_length = 64
    model.save(str(folder / "model"))
    return folder / "model"


@pytest.fixture
def copied(tmp_path, model):
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_a_folder_of_ours_gives_the_encoders_vectors(model):
    opened = open_model(model)
    assert isinstance(opened, OurModel)
    assert (opened.dim, opened.max_tokens, opened.longest) == (64, 512, 512)
    for kind in ("query", "document"):
        want = Encoder.from_pretrained(model).encode(TEXTS, kind, dim=16)
        np.testing.assert_allclose(opened.encode(TEXTS, kind, dim=16), want, atol=1e-6)
    assert opened.count_tokens("abc") == len("abc") + 1  # EOS
    assert opened.encode([], "query").shape == (0, 64)


def test_a_folder_of_sentence_transformers_gives_its_own_vectors(other):
    library = pytest.importorskip("sentence_transformers")
    opened, theirs = open_model(other), library.SentenceTransformer(str(other), device="cpu")
    assert isinstance(opened, OtherModel)
    assert (opened.dim, opened.max_tokens, opened.longest) == (24, 64, 128)
    for kind, prompt in PROMPTS.items():
        want = theirs.encode([prompt + text for text in TEXTS], normalize_embeddings=True)
        np.testing.assert_allclose(opened.encode(TEXTS, kind), want, atol=1e-6)
        cut = want[:, :8] / np.linalg.norm(want[:, :8], axis=1, keepdims=True)
        np.testing.assert_allclose(opened.encode(TEXTS, kind, dim=8), cut, atol=1e-6)
    short = opened.encode(["abcdefgh", "abcdxxxxxxx"], "document", max_tokens=10)
    assert np.abs(short[0] - short[1]).max() < 1e-6  # "text: abcd" is all they see
    assert opened.count_tokens("abc") == len(theirs.tokenizer("text: abc")["input_ids"])


@pytest.mark.parametrize("prepack", [False, True], ids=["plain", "prepacked"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_bits_depend_neither_on_threads_nor_on_the_batch(tmp_path, pooling, prepack):
    """On one CPU. Grouped heads, both poolings, texts of very different lengths, one token among
    them; all together in any budget, and some alone."""
    folder = tiny_llama(
        tmp_path / "m", hidden_size=512, num_attention_heads=8, intermediate_size=2048,
        num_hidden_layers=1, initializer_range=0.05,
    )  # fmt: skip
    texts = [*TEXTS, *("moon " * (1 + n % 9) for n in range(14)), "long " * 60]
    encoder = Encoder.from_pretrained(folder, settings=RetrieverSettings(pooling=pooling))
    if prepack:
        encoder.prepack()
        if encoder.prepacked is None:
            pytest.skip("no oneDNN for x86")
    opened, found = OurModel(encoder, folder), {}
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for budget in (1, 200, 100_000):
                found[number, budget] = opened.encode(texts, "document", token_budget=budget)
            assert torch.get_num_threads() == number
            some = [0, 2, 3, 5, len(texts) - 1]
            alone = np.concatenate([opened.encode([texts[i]], "document") for i in some])
            found[number, "alone"] = found[number, 1].copy()
            found[number, "alone"][some] = alone
            if prepack:  # all threads in every operation, whatever the number of texts
                rows = encoder.tokenize(texts, "document")
                found[number, "shared"] = encoder.embed(rows, token_budget=100_000)
    finally:
        torch.set_num_threads(threads)
    first = found[1, 1]
    for vectors in found.values():
        assert np.abs(vectors - first).max() < 1e-6  # what any library may promise
        if torch.backends.mkl.is_available():
            np.testing.assert_array_equal(vectors, first)


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 3e-2), ("fp16", 4e-3), ("fp32", 1e-6)])
def test_precision_is_what_the_model_computes_in(model, other, precision, bound):
    for folder in (model, other):
        opened, exact = open_model(folder, precision=precision), open_model(folder)
        name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
        assert opened.compute_dtype == name
        vectors, want = (m.encode(TEXTS, "document") for m in (opened, exact))
        assert vectors.dtype == np.float32
        difference = np.abs(vectors - want).max()
        assert difference < bound
        assert precision == "fp32" or difference > 1e-5


def test_a_module_that_the_encoder_does_not_run_goes_to_sentence_transformers(copied, tmp_path):
    """Else its weights would be left out without a word."""
    library = pytest.importorskip("sentence_transformers")
    export(Encoder.from_pretrained(copied), tmp_path / "ours")
    assert isinstance(open_model(tmp_path / "ours"), OurModel)
    model = library.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    model.append(library.models.Dense(64, 8))
    model.save(str(tmp_path / "dense"))
    opened = open_model(tmp_path / "dense")
    assert isinstance(opened, OtherModel)
    assert opened.dim == 8

    before = model_sha256(tmp_path / "dense")
    (weights,) = (tmp_path / "dense").glob("*_Dense/*.safetensors")
    changed = {name: 2 * weight for name, weight in load_file(weights).items()}
    save_file(changed, weights)
    assert model_sha256(tmp_path / "dense") != before


def test_without_sentence_transformers(other, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"not for our encoder; pip install sentence-tr"):
        open_model(other)


def test_bad_folders_are_one_line(copied, other, tmp_path):
    with pytest.raises(UserError, match=r"gone: not a model folder"):
        open_model(tmp_path / "gone")
    with pytest.raises(UserError, match=r"precision 'bf61' is none \(did you mean 'bf16'\?\)"):
        open_model(copied, precision="bf61")
    for path in copied.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"copy: no tokenizer \(tokenizer.json is missing\)"):
        open_model(copied)
    bare = Path(shutil.copytree(other, tmp_path / "bare"))
    for path in bare.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match=r"bare: no tokenizer \(tokenizer.json is missing\)"):
        open_model(bare)
    shutil.copy(other / "tokenizer.json", bare)
    (bare / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"bare: sentence-transformers cannot load the model") as e:
        open_model(bare)
    assert "\n" not in str(e.value)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"copy/config\.json holds no object"):
        open_model(copied)
    (copied / "config.json").write_text(json.dumps(config))
    for modules in ([{"path": ""}], [1], {"type": "x"}, 3):
        (copied / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(UserError, match=r"copy/modules\.json is no list of modules"):
            open_model(copied)
    (copied / "modules.json").unlink()
    (copied / "config.json").write_text(json.dumps(config)[:50])
    with pytest.raises(UserError, match=r"copy/config\.json: not valid JSON"):
        open_model(copied)


def test_a_causal_model_that_is_declared_bidirectional(copied, tmp_path, monkeypatch):
    """As under a transformers that does not know the key `is_causal`: its mask is always causal."""
    from transformers.models.llama import modeling_llama

    encoder = Encoder.from_pretrained(copied)
    export(encoder, tmp_path / "declared", architecture="llama")
    assert open_model(tmp_path / "declared").encode(["a"], "query").shape == (1, 64)
    causal = modeling_llama.create_causal_mask
    for name in ("create_causal_mask", "create_bidirectional_mask"):
        if hasattr(modeling_llama, name):
            monkeypatch.setattr(modeling_llama, name, _always_causal(causal))
    with pytest.raises(UserError, match="declared bidirectional, but the padded forward is"):
        open_model(tmp_path / "declared")


def _always_causal(make_mask):
    def mask(config, *arguments, **options):
        held, config.is_causal = config.is_causal, True
        try:
            return make_mask(config, *arguments, **options)
        finally:
            config.is_causal = held

    return mask
