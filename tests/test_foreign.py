"""Retrievers that others made: our vectors of a folder against sentence-transformers' of the same.

Folders are written by transformers and sentence-transformers themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from drama.attention import ATTENTION_NAME
from drama.blocks import Execution
from drama.data.packing import pack
from drama.encoder import Encoder
from drama.equality import compare
from drama.errors import UserError
from drama.export import export
from drama.folder import RetrieverSettings, read_settings
from drama.hf import SUMS
from drama.memory import GraphBytes
from drama.plan import graph_bytes
from drama.retrieve.models import OtherModel, OurModel, open_model
from drama.testing import byte_tokenizer

library = pytest.importorskip("sentence_transformers")
models = pytest.importorskip("sentence_transformers.models")
TEXTS = ["tides", "bees store honey " * 9, "x", "the moon pulls the water", "yeast " * 20]
PROMPTS = {"query": "Instruct: find what answers\nQuery:", "document": "text: "}
SHAPE = {
    "vocab_size": 260, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=None, head_dim=12),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}


def language_model(folder: Path, family: str, template: str | None = None, **config) -> Path:
    """A random XForCausalLM, its biases and norms not those of an untrained one."""
    torch.manual_seed(0)
    settings = type(FAMILIES[family])(**FAMILIES[family].to_dict() | config)
    model = AutoModelForCausalLM.from_config(settings)
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(weight, float("norm" in name), 0.3)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if template:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return folder


def retriever(folder: Path, model: Path, pooling: str = "lasttoken", *, normalize=True, **options):
    """What sentence-transformers 6 writes."""
    transformer = models.Transformer(str(model))
    modules = [transformer, models.Pooling(48, pooling, **options)]
    modules += [models.Normalize()] * normalize
    made = library.SentenceTransformer(modules=modules, prompts=PROMPTS, device="cpu")
    made.save(str(folder))
    return folder


def old_layout(folder: Path) -> None:
    """As sentence-transformers before 5.4 wrote it."""
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        module["type"] = f"sentence_transformers.models.{kind}"
    (folder / "modules.json").write_text(json.dumps(modules))
    path = folder / "1_Pooling" / "config.json"
    pooling = json.loads(path.read_text())
    switches = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False,
                "pooling_mode_lasttoken": False}  # fmt: skip
    switches[{"mean": "pooling_mode_mean_tokens", "lasttoken": "pooling_mode_lasttoken"}[
        pooling["pooling_mode"]]] = True  # fmt: skip
    path.write_text(json.dumps({"word_embedding_dimension": 48, **switches}))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 64, "do_lower_case": False})
    )


def edit(path: Path, **values) -> None:
    """Change keys of a JSON file, as an owner would; None removes one."""
    (path.parent / SUMS).unlink(missing_ok=True)
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def assert_same_vectors(folder: Path, tolerance: float = 1e-5) -> None:
    """Padded batches on their side, both kinds, and one text alone."""
    ours, theirs = open_model(folder), library.SentenceTransformer(str(folder), device="cpu")
    assert isinstance(ours, OurModel)
    assert ours.max_tokens == theirs.max_seq_length
    for kind, call in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        got = ours.encode(TEXTS, kind)
        for texts, rows in ((TEXTS, got), (TEXTS[3:4], got[3:4])):
            want = call(texts, normalize_embeddings=True)
            assert np.abs(rows - want).max() < tolerance
    queries = ours.encode(TEXTS, "query")
    assert np.abs(queries - got).max() > 1e-2  # the prompts count


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_both_masks_both_poolings(tmp_path, family, pooling, is_causal):
    model = language_model(tmp_path / "lm", family, "$A </s>", is_causal=is_causal)
    folder = retriever(tmp_path / "st", model, pooling)
    settings = read_settings(folder)
    assert settings.attention == ("causal" if is_causal else "bidirectional")
    assert settings.query_prefix == PROMPTS["query"]
    assert_same_vectors(folder)


@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_the_folders_tokenizer_decides_what_ends_a_text(tmp_path, template):
    """Nothing, BOS alone, EOS once; also where texts are cut, and before the old layout's names."""
    model = language_model(tmp_path / "lm", "qwen3", template)
    folder = retriever(tmp_path / "st", model)
    assert_same_vectors(folder)
    old_layout(folder)
    assert_same_vectors(folder)
    tokens = Encoder.from_pretrained(folder).tokenize(["ab", "c" * 200], "query")
    tokenizer = byte_tokenizer()
    begins, ends = (bool(template and name in template) for name in ("<s>", "</s>"))
    whole = "<s>" * begins + PROMPTS["query"] + "ab" + "</s>" * ends
    assert tokenizer.decode(tokens[0]) == whole
    assert len(tokens[1]) == 64
    assert (tokens[1][-1] == 2) == ends


def test_checkpoints_of_every_form(tmp_path):
    """bf16 shards of a language model with its own head, beside sentence-transformers' files."""
    lm = language_model(tmp_path / "lm", "qwen2", "$A </s>")
    folder = retriever(tmp_path / "st", lm, normalize=False)
    (folder / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    got = Encoder.from_pretrained(folder).encode(TEXTS, "document")
    theirs = library.SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"dtype": torch.float32}
    )
    want = theirs.encode_document(TEXTS, normalize_embeddings=True)
    assert np.abs(got - want).max() < 1e-5


def test_tied_embeddings(tmp_path):
    lm = language_model(tmp_path / "lm", "qwen3", tie_word_embeddings=True)
    assert_same_vectors(retriever(tmp_path / "st", lm))


def test_prompts_of_other_names(tmp_path):
    folder = retriever(tmp_path / "st", language_model(tmp_path / "lm", "llama"), "mean")
    for name in ("passage", "corpus"):
        prompts = {"query": "q: ", name: "p: ", "document": ""}
        edit(folder / "config_sentence_transformers.json", prompts=prompts)
        theirs = library.SentenceTransformer(str(folder), device="cpu")
        want = theirs.encode(TEXTS, prompt_name=name, normalize_embeddings=True)
        for opened in (open_model(folder), OtherModel(folder, None, torch.device("cpu"))):
            assert np.abs(opened.encode(TEXTS, "document") - want).max() < 1e-5
            assert opened.count_tokens("abc") == len("p: abc")


def test_a_sliding_window_limits_the_text(tmp_path):
    """Up to the window every token sees what it would see without one."""
    window = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 100}
    lm = language_model(tmp_path / "lm", "qwen2", "$A </s>", **window, layer_types=None)
    folder = retriever(tmp_path / "st", lm)
    with pytest.raises(UserError, match=r'256 tokens go beyond its sliding window of 100; write "'):
        Encoder.from_pretrained(folder)
    assert isinstance(open_model(folder), OtherModel)  # which has windows
    edit(folder / "sentence_bert_config.json", max_seq_length=100)
    assert_same_vectors(folder)
    opened = open_model(folder)
    assert (opened.max_tokens, opened.longest) == (100, 100)
    with pytest.raises(UserError, match="120 tokens go beyond the sliding window of 100"):
        Encoder.from_pretrained(folder).embed([[5] * 120])
    with pytest.raises(UserError, match="max_tokens 101 does not fit"):
        opened.encode(["a"], "query", max_tokens=101)


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "cls"}, "neither last token nor mean"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "lasttoken"]}, "neither last token"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt false; the encoder"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case True is nothing"),
        ("sentence_bert_config.json", {"query_length": 8}, "query_length 8 is nothing that"),
    ],
)
def test_what_the_encoder_does_not_follow_goes_to_sentence_transformers(
    tmp_path, file, change, line
):
    folder = retriever(tmp_path / "st", language_model(tmp_path / "lm", "llama"), "mean")
    edit(folder / file, **change)
    with pytest.raises(UserError, match=line):
        Encoder.from_pretrained(folder)
    opened = open_model(folder)
    assert isinstance(opened, OtherModel)
    theirs = library.SentenceTransformer(str(folder), device="cpu")
    want = theirs.encode_query(TEXTS, normalize_embeddings=True)
    assert np.abs(opened.encode(TEXTS, "query") - want).max() < 1e-5


def test_a_module_besides(tmp_path):
    folder = retriever(tmp_path / "st", language_model(tmp_path / "lm", "llama"), "mean")
    model = library.SentenceTransformer(str(folder), device="cpu")
    model.append(models.Dense(48, 8))
    model.save(str(tmp_path / "dense"))
    with pytest.raises(UserError, match="Normalize, Dense; the encoder runs Transformer, Pooling"):
        Encoder.from_pretrained(tmp_path / "dense")
    assert open_model(tmp_path / "dense").dim == 8


# -- masks -----------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path):
    """A folder like DRAMA's released ones: a Llama by type, bidirectional by code of the folder."""
    lm = language_model(tmp_path / "lm", "llama", "<s> $A </s>")
    folder = retriever(tmp_path / "st", lm, "mean")
    code = {"AutoModel": "modeling_drama.DramaModel"}
    edit(folder / "config.json", auto_map=code, architectures=["DramaModel"])
    (folder / "modeling_drama.py").write_text("raise SystemExit('this must not run')\n")
    return folder


def bidirectional_vectors(folder: Path) -> np.ndarray:
    """What the code of a released model computes, by transformers' own bidirectional Llama."""
    backbone = AutoModel.from_pretrained(folder, dtype=torch.float64, trust_remote_code=False)
    backbone.config.is_causal = False
    tokenizer = byte_tokenizer()
    rows = []
    for text in TEXTS:
        ids = [1, *tokenizer(PROMPTS["document"] + text)["input_ids"], 2]
        with torch.no_grad():
            states = backbone(torch.tensor([ids]), torch.ones(1, len(ids))).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(states.mean(0), dim=0))
    return torch.stack(rows).numpy()


def test_dramas_released_models_are_bidirectional(released):
    encoder = Encoder.from_pretrained(released)
    assert (encoder.settings.attention, encoder.settings.pooling) == ("bidirectional", "mean")
    got = encoder.encode(TEXTS, "document")
    assert np.abs(got - bidirectional_vectors(released)).max() < 1e-5
    (released / "modules.json").unlink()  # one that has no files of sentence-transformers
    settings = Encoder.from_pretrained(released).settings
    assert settings == RetrieverSettings(pooling="mean")


def test_code_of_a_folder_that_nobody_knows_is_not_taken_for_causal(released):
    code = {"AutoModel": "modeling_qwen.BothWays"}
    edit(released / "config.json", auto_map=code, architectures=["BothWays"])
    line = r'BothWays is code of the folder, .* write "is_causal": false \(or true\) there, or give'
    for opened in (Encoder.from_pretrained, open_model):
        with pytest.raises(UserError, match=line):
            opened(released)
    given = Encoder.from_pretrained(released, attention="bidirectional").encode(TEXTS, "document")
    assert np.abs(given - bidirectional_vectors(released)).max() < 1e-5
    edit(released / "config.json", is_causal=False)
    declared = open_model(released).encode(TEXTS, "document")
    assert np.abs(declared - given).max() < 1e-6


def test_folders_whose_mask_is_broken(tmp_path):
    model = language_model(tmp_path / "lm", "llama")
    encoder = Encoder.from_pretrained(model)
    export(encoder, tmp_path / "eurobert")
    edit(tmp_path / "eurobert" / "config.json", is_causal=True, use_bidirectional_attention=None)
    with pytest.raises(UserError, match="declared causal, but the padded forward is bidirectional"):
        open_model(tmp_path / "eurobert")

    export(encoder, tmp_path / "llama", architecture="llama")
    config = tmp_path / "llama" / "config.json"
    edit(config, use_bidirectional_attention=None)
    assert open_model(tmp_path / "llama").encode(["a"], "query").shape == (1, 48)
    edit(config, is_causal=None)
    with pytest.raises(UserError, match="exported as bidirectional, but is_causal is gone"):
        open_model(tmp_path / "llama")
    edit(config, is_causal=False, use_bidirectional_attention=False)
    with pytest.raises(UserError, match="contradict each other"):
        open_model(tmp_path / "llama")


def test_an_override_that_this_transformers_never_calls(tmp_path, monkeypatch):
    """The pattern of models that were made before transformers 4.53: the mask is built elsewhere
    now, and only where nothing is padded the attention still sees both sides."""
    from transformers.models.llama import modeling_llama

    causal_mask = modeling_llama.create_causal_mask

    def today(config, *arguments, **options):
        return causal_mask(LlamaConfig(**config.to_dict() | {"is_causal": True},
                                       attn_implementation=config._attn_implementation),
                           *arguments, **options)  # fmt: skip

    class OldStyle(modeling_llama.LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.layers:
                layer.self_attn.is_causal = False

        def _update_causal_mask(self, attention_mask, *_, **__):
            return attention_mask

    monkeypatch.setattr(modeling_llama, "create_causal_mask", today)
    monkeypatch.setattr(modeling_llama, "LlamaModel", OldStyle)
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    MODEL_MAPPING.register(LlamaConfig, OldStyle, exist_ok=True)
    try:
        model = language_model(tmp_path / "lm", "llama", is_causal=False)
        with pytest.raises(UserError, match="declared bidirectional, but the padded forward is ca"):
            Encoder.from_pretrained(model)
    finally:
        MODEL_MAPPING._extra_content.pop(LlamaConfig)


def test_the_mask_of_a_folder_that_sentence_transformers_runs(tmp_path, released):
    """A Dense keeps it from the encoder; the plain Llama inside is causal, the folder is not."""
    for name in ("st", "fine"):
        folder = released if name == "st" else retriever(tmp_path / "f", tmp_path / "lm", "mean")
        model = library.SentenceTransformer(str(folder), device="cpu")
        model.append(models.Dense(48, 8))
        model.save(str(tmp_path / f"{name}-dense"))
    edit(tmp_path / "st-dense" / "config.json", architectures=["DramaModel"])
    with pytest.raises(
        UserError, match="declared bidirectional, but sentence-transformers runs it"
    ):
        open_model(tmp_path / "st-dense")
    for declared in (False, True):
        edit(tmp_path / "fine-dense" / "config.json", is_causal=declared)
        assert isinstance(open_model(tmp_path / "fine-dense"), OtherModel)


# -- what is trained from them ---------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exports_give_the_same_vectors_everywhere(tmp_path, family, attention):
    model = language_model(tmp_path / "lm", family)
    settings = RetrieverSettings(attention=attention, matryoshka_dims=(48,), max_tokens=200)
    encoder = Encoder.from_pretrained(model, settings=settings)
    folder = export(encoder, tmp_path / "out")
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    as_llama = {"causal": "llama", "bidirectional": "eurobert"}[attention]
    assert kind == (family if family.startswith("qwen") else as_llama)
    assert max(one.value for one in compare(folder, lengths=(32, 200))) < 1e-5
    again = Encoder.from_pretrained(folder)
    assert again.settings == settings
    got, want = (e.encode(TEXTS, "query") for e in (again, encoder))
    assert np.abs(got - want).max() < 1e-6
    if family.startswith("qwen"):
        with pytest.raises(UserError, match=f"a {family} cannot be written as eurobert; use qwen"):
            export(encoder, tmp_path / "no", architecture="eurobert")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_last_block_at_the_last_token(tmp_path, family):
    """Every weight's, biases and norms of heads included, against the whole block's in float64."""
    model = language_model(tmp_path / "lm", family)
    gradients = []
    for at_last in (True, False):
        encoder = Encoder.from_pretrained(model, dtype=torch.float64)
        encoder.execution = Execution(pooled_last_block=at_last)
        out = encoder(pack(encoder.tokenize(TEXTS, "query")))
        out.square().sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_their_graph(tmp_path, family):
    """By running two and three blocks it foretells five, biases and norms of heads included."""
    settings, counted = RetrieverSettings(), []
    for layers in (2, 5):
        config = type(FAMILIES[family])(
            **FAMILIES[family].to_dict() | {"num_hidden_layers": layers, "layer_types": None}
        )
        counted.append(
            graph_bytes(config, byte_tokenizer(), settings, Execution(), torch.float32, 32)
        )
    config.vocab_size, config.pad_token_id = 64, None
    backbone = AutoModel.from_config(config, attn_implementation=ATTENTION_NAME)
    encoder = Encoder(backbone, byte_tokenizer(), settings).train()
    counter = GraphBytes(encoder.parameters())
    with counter.watch():
        encoder(pack([[5] * 32] * 2))
    assert counted[1] == pytest.approx(counter.total / 64)
    assert counted[1] > counted[0]
