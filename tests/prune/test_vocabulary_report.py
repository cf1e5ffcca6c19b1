from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drama import cli
from drama.errors import UserError
from drama.prune import run
from drama.prune.calibration import read_calibration
from drama.prune.loss import lm_loss
from drama.prune.run import prune
from drama.prune.vocabulary_report import bits_per_byte, plan_vocabulary, vocabulary_table

TARGET = "layers=2,hidden=36,heads=4,ffn=20"


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROW_LENGTH", 64)


@pytest.fixture
def corpus(tmp_path: Path, sentences: dict[str, str]) -> Path:
    """400 paragraphs of three sentences in random order."""
    rng = random.Random(0)
    texts = [" ".join(rng.sample([*sentences.values()], 3)) for _ in range(400)]
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path, byte_level: Any) -> Path:
    """A Llama of 928 rows with the byte-level tokenizer of 905 tokens."""
    torch.manual_seed(0)
    ids = {x: byte_level.convert_tokens_to_ids(x) for x in ("<|begin|>", "<|end|>", "<|pad|>")}
    config = LlamaConfig(
        vocab_size=928, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, intermediate_size=40, head_dim=8, max_position_embeddings=4096,
        initializer_range=0.2, tie_word_embeddings=True, bos_token_id=ids["<|begin|>"],
        eos_token_id=ids["<|end|>"], pad_token_id=ids["<|pad|>"],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [ids["<|end|>"], ids["<|begin|>"]]
    model.save_pretrained(tmp_path / "source")
    byte_level.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_the_plan_s_figures(byte_level: Any, corpus: Path) -> None:
    plan = plan_vocabulary(byte_level, [corpus], "500", rows=928)
    assert plan.report.entries == (905, 512)
    assert plan.report.rows == (928, 512)
    paragraphs = corpus.read_text(encoding="utf-8").split("\n\n")
    held_out = [f"{text}\n\n" for text in paragraphs[1::20]]
    old, new = (
        [i for text in held_out for i in x(text, add_special_tokens=False)["input_ids"]]
        for x in (byte_level, plan.tokenizer)
    )
    num_characters, num_words = (sum(map(len, x)) for x in (held_out, map(str.split, held_out)))
    report = plan.report
    assert report.tokens_per_character == (len(old) / num_characters, len(new) / num_characters)
    assert report.tokens_per_word == (len(old) / num_words, len(new) / num_words)
    names = byte_level.convert_ids_to_tokens(old)
    kept = set(plan.tokenizer.get_vocab())
    assert report.kept_share == pytest.approx(sum(x in kept for x in names) / len(names))
    assert 0.3 < report.kept_share < 1
    assert plan.texts == tuple(text[:512] for text in held_out)

    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(vocabulary_table(report, hidden=1000, tied=False))
    text = console.export_text()
    assert "905" in text
    assert "1.86" in text  # 928 rows, twice, in millions
    assert "0.83" in text  # (928 - 512) * 2 * 1000


def test_bits_per_byte_are_the_model_s_own_loss(byte_level: Any, folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder).double().eval()
    texts = ["The baker opened.", "Пекарь!"]
    nats = 0.0
    for text in texts:
        ids = torch.tensor([byte_level(text)["input_ids"]])  # with BOS
        loss = model(ids, labels=ids).loss.item()
        nats += loss * (ids.shape[1] - 1)
    bits = nats / math.log(2) / (17 + 13)
    assert bits_per_byte(model, byte_level, texts) == pytest.approx(bits, rel=1e-6)
    nameless = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer)
    with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
        bits_per_byte(model, nameless, texts)


def test_prune_cuts_the_vocabulary_alone(folder: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "small"
    report = prune(folder, None, None, out, vocab_from=[corpus], keep="512")
    assert report.vocabulary is not None
    assert report.target == report.source
    assert report.plan is report.loss_after is None
    model = LlamaForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == 512
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.bos_token_id]
    facts = json.loads((out / "pruning.json").read_text())
    assert facts["vocabulary"]["entries"] == [905, 512]
    assert facts["vocabulary"]["corpus"] == {
        str(corpus): hashlib.sha256(corpus.read_bytes()).hexdigest()
    }
    assert facts["vocabulary"]["bits_per_byte"] == list(report.vocabulary.bits_per_byte)
    old = LlamaForCausalLM.from_pretrained(folder)
    old_tokenizer = AutoTokenizer.from_pretrained(folder)
    plan = plan_vocabulary(old_tokenizer, [corpus], "512", rows=928)
    expected = [
        bits_per_byte(x, t, plan.texts) for x, t in ((old, old_tokenizer), (model, tokenizer))
    ]
    assert report.vocabulary.bits_per_byte == pytest.approx(expected, rel=0.01)
    assert str(tmp_path) not in (out / "tokenizer_config.json").read_text()


def test_prune_cuts_shape_and_vocabulary(folder: Path, corpus: Path, tmp_path: Path) -> None:
    options: Any = {"calibration_tokens": 1000}
    shape_alone = prune(folder, TARGET, corpus, tmp_path / "shape", **options)
    out = tmp_path / "both"
    report = prune(folder, TARGET, corpus, out, vocab_from=[corpus], keep="512", **options)
    assert report.vocabulary is not None
    assert len(report.vocabulary.bits_per_byte) == 3
    assert report.loss_after == shape_alone.loss_after
    model = LlamaForCausalLM.from_pretrained(out)
    assert tuple(model.model.embed_tokens.weight.shape) == (512, 36)
    larger = LlamaForCausalLM.from_pretrained(tmp_path / "shape")
    names = AutoTokenizer.from_pretrained(out).convert_ids_to_tokens(range(512))
    kept = AutoTokenizer.from_pretrained(tmp_path / "shape").convert_tokens_to_ids(names)
    assert torch.equal(model.lm_head.weight, larger.lm_head.weight[kept])
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight,
                       larger.model.layers[1].mlp.up_proj.weight)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "shape")
    text = read_calibration(corpus, tokenizer, num_tokens=1000, held_out_tokens=4096, length=64)
    assert report.loss_after == pytest.approx(lm_loss(larger, text.held_out), rel=0.01)


def test_dry_run_shows_both_plans(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").write_bytes(b"weights are not read")
    report = prune(folder, TARGET, corpus, tmp_path / "x", vocab_from=[corpus], keep="512",
                   calibration_tokens=500, dry_run=True)  # fmt: skip
    shown = capsys.readouterr().err
    assert "pruning plan" in shown
    assert "tokens per character" in shown
    assert report.vocabulary is not None
    assert report.vocabulary.bits_per_byte == ()
    assert not (tmp_path / "x").exists()


def test_half_of_a_task_is_refused(folder: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    for target, calibration, vocab_from, keep, message in (
        (None, None, (), None, "nothing to cut: give a shape .--to"),
        (TARGET, None, (), None, "--to without --calibration"),
        (None, corpus, [corpus], "512", "--calibration without --to"),
        (TARGET, corpus, [corpus], None, "--vocab-from without --keep"),
        (TARGET, corpus, (), "512", "--keep without --vocab-from"),
        (None, None, [corpus], "many", "keep 'many': give a number"),
        (None, None, [corpus], "2k", "keep 2,000: the tokenizer has 905 .* choice is 896"),
        (None, None, [tmp_path / "no.txt"], "512", r"cannot read .*no\.txt"),
    ):
        with pytest.raises(UserError, match=message):
            prune(folder, target, calibration, out, vocab_from=vocab_from, keep=keep)
    assert not out.exists()


def test_a_configuration_that_names_a_token_the_tokenizer_lacks(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    path = folder / "generation_config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"pad_token_id": 910}))
    with pytest.raises(UserError, match="names token 910, which the tokenizer does not have"):
        prune(folder, None, None, tmp_path / "x", vocab_from=[corpus], keep="512")


def test_the_command_takes_several_corpora(folder: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "Bread."}) + "\n")
    out = tmp_path / "small"
    arguments = ["prune", folder, "--vocab-from", corpus, "--vocab-from", other, "--keep", "0.5k"]
    result = CliRunner().invoke(cli.main, [str(x) for x in [*arguments, "--out", out]])
    assert result.exit_code == 2
    arguments[-1] = "450"
    result = CliRunner().invoke(cli.main, [str(x) for x in [*arguments, "--out", out]])
    assert result.exit_code == 0, result.output
    facts = json.loads((out / "pruning.json").read_text())
    assert [*facts["vocabulary"]["corpus"]] == [str(corpus), str(other)]
    state = json.loads((out / "tokenizer.json").read_text())
    assert Tokenizer.from_str(json.dumps(state)).get_vocab_size() == 512
