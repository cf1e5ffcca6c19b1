"""Needles in haystacks: exact lengths and places, chance for a blind model, resumption."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from drama.encoder import Encoder
from drama.errors import UserError
from drama.folder import RetrieverSettings
from drama.retrieve import needle as module
from drama.retrieve.haystack import (
    CITIES,
    FIRST,
    LAST,
    THINGS,
    beginning_at_random,
    draw_needles,
    make_haystacks,
    read_text,
)
from drama.retrieve.models import OurModel, open_model
from drama.retrieve.needle import expected_ranks, find_needles

WORDS = "river stone cloud winter market window garden bridge letter paper silver morning"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    random = Random(0)
    sentences = [
        " ".join(random.choices(WORDS.split(), k=random.randint(4, 12))) for _ in range(900)
    ]
    path = tmp_path_factory.mktemp("text") / "text.txt.gz"
    documents = [". ".join(sentences[i : i + 30]) + "." for i in range(0, 900, 30)]
    path.write_bytes(gzip.compress("\n\n".join(documents).encode()))
    return path


def word_model(folder: Path, *, sees: bool, max_tokens: int = 512) -> OurModel:
    """A real Llama with one token a word. With attention and feed-forward turned off, the mean over
    its tokens is a bag of words, which sees everything; the last token's state is EOS, blind."""
    words = [*WORDS.split(), *FIRST.split(), *LAST.split(), *CITIES.split(), *THINGS.split()]
    vocabulary = {word: n for n, word in enumerate(["<unk>", "<eos>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=256, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        initializer_range=1.0,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder)
    settings = RetrieverSettings(pooling="mean" if sees else "last", max_tokens=max_tokens)
    encoder = Encoder.from_pretrained(folder, settings=settings)
    with torch.no_grad():
        encoder.backbone.embed_tokens.weight[0] = 0  # unknown words
        for layer in encoder.backbone.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return OurModel(encoder, folder)


def test_a_model_that_sees_finds_and_a_blind_one_guesses(text, tmp_path):
    options = {"lengths": [64, 128], "depths": [0, 50, 100], "num_documents": 12}
    for kind in ("needle", "passkey"):
        seeing = find_needles(word_model(tmp_path / "m", sees=True), [text], kind=kind, **options)
        assert min(cell.accuracy for cell in seeing.cells) > 0.9
        assert all(cell.tokens == (cell.length, cell.length) for cell in seeing.cells)
        blind = find_needles(word_model(tmp_path / "m", sees=False), [text], kind=kind, **options)
        for cell in blind.cells:  # all texts are one vector: each query draws from 12
            assert (cell.accuracy, cell.mrr) == pytest.approx(blind.chance)
    assert blind.chance == pytest.approx((1 / 12, sum(1 / r for r in range(1, 13)) / 12))


def test_queries_that_have_nothing_to_do_with_the_texts_are_at_chance(text, make_model):
    """Texts by one random model, queries by another. One random model for both is above chance:
    what it does with a name it does on both sides."""

    class Strangers(OurModel):
        def embed(self, prepared, kind, *arguments):
            encoder = self.encoder
            self.encoder = other if kind == "query" else encoder
            try:
                return super().embed(prepared, kind, *arguments)
            finally:
                self.encoder = encoder

    folders = make_model(1), make_model(2)
    own, other = (Encoder.from_pretrained(folder) for folder in folders)
    results = find_needles(Strangers(own, folders[0]), [text], lengths=[256], num_documents=40)
    accuracy = np.mean([cell.accuracy for cell in results.cells])
    # 200 queries, 1 in 40 by chance: 5 standard deviations are 0.055
    assert abs(accuracy - 1 / 40) < 0.055


def test_what_is_cut_off_cannot_be_found(text, tmp_path):
    model = word_model(tmp_path / "m", sees=True, max_tokens=100)
    results = find_needles(model, [text], lengths=[90, 200], num_documents=10)
    found = {(cell.length, cell.depth): cell.accuracy for cell in results.cells}
    assert min(found[90, depth] for depth in (0, 25, 50, 75, 100)) > 0.8
    assert min(found[200, depth] for depth in (0, 25)) > 0.8
    assert [found[200, depth] for depth in (75, 100)] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_haystacks_differ_in_the_needle_alone_and_are_exact(text, model, depth):
    opened, random = open_model(model), Random(1)
    filler = beginning_at_random(read_text([text]), random)
    sentences = [n.sentence for n in draw_needles("passkey", 5, random)]
    for length in (130, 1000):
        texts = make_haystacks(filler, sentences, length, depth, opened.count_tokens)
        for sentence, found in zip(sentences, texts, strict=True):
            assert opened.count_tokens(found) == length  # EOS is one of them
            before, after = found.split(sentence)
            assert filler.startswith(before.strip())
            assert after.strip() in filler
            place = len(before) / (len(found) - len(sentence))
            assert depth - 200 / length <= place <= depth + 0.02
            if 0 < depth < 1 and length == 1000:  # not far before it a sentence ends
                assert before.rstrip()[-1] == "."


def test_a_text_without_spaces_is_cut_at_the_depth(model):
    opened = open_model(model)
    filler = "長い文章" * 400
    sentences = ["The key of Ada Weber is 12345."]
    (found,) = make_haystacks(filler, sentences, 600, 0.5, opened.count_tokens)
    assert 598 <= opened.count_tokens(found) <= 600  # a character is three tokens
    before, after = found.split(sentences[0])
    assert abs(len(before) - len(after)) <= 2


def test_needles_are_about_different_persons_and_answer_their_queries():
    for kind in ("needle", "passkey"):
        needles = draw_needles(kind, 60, Random(3))
        assert needles == draw_needles(kind, 60, Random(3)) != draw_needles(kind, 60, Random(4))
        names = set()
        for needle in needles:
            people = re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", needle.query)
            (name,) = (p for p in people if p.split()[1] in LAST.split())
            assert name in needle.sentence
            names.add(name)
        assert len(names) == 60
    with pytest.raises(UserError, match="1 documents: 2 to"):
        draw_needles("needle", 1, Random(0))


def test_ties_count_as_drawn_by_chance():
    scores = np.array([[2.0, 1, 0], [1, 1, 1], [3, 0, 0]])
    accuracy, mrr = expected_ranks(scores)
    assert accuracy == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert mrr == pytest.approx((1 + (1 + 1 / 2 + 1 / 3) / 3 + (1 / 2 + 1 / 3) / 2) / 3)


def test_a_stopped_run_goes_on_to_the_same_files(text, tmp_path, monkeypatch):
    model = word_model(tmp_path / "m", sees=True)
    options = {"lengths": [64, 100], "depths": [0, 100], "num_documents": 4}
    find_needles(model, [text], out=tmp_path / "whole", **options)
    measure, calls = module._measure, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(module, "_measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        find_needles(model, [text], out=tmp_path / "out", **options)
    assert len(json.loads((tmp_path / "out" / "needle.json").read_text())["cells"]) == 2
    find_needles(model, [text], out=tmp_path / "out", **options)
    assert len(calls) == 3 + 2
    for name in ("needle.json", "needle.md", "needle.svg"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "| 64 | 1.00 |" in (tmp_path / "out" / "needle.md").read_text()
    assert (tmp_path / "out" / "needle.svg").read_text().count("1.00") >= 4

    find_needles(model, [text], out=tmp_path / "out", **options | {"lengths": [64, 80]})
    assert len(calls) == 5 + 2  # a new length is added to what is there
    with pytest.raises(UserError, match=r"holds results of another seed \(0, not 1\)"):
        find_needles(model, [text], out=tmp_path / "out", seed=1, **options)
    (tmp_path / "out" / "needle.json").write_text('{"cells": [{}]}')
    with pytest.raises(UserError, match=r"needle\.json is damaged"):
        find_needles(model, [text], out=tmp_path / "out", **options)


def test_default_lengths_are_those_that_the_model_takes(monkeypatch, text, tmp_path):
    monkeypatch.setattr(module, "_measure", lambda *a: module.Cell(a[3], a[4], 1, 1, (1, 1)))
    for limit, want in ((2048, [256, 512, 1024, 2048]), (100, [100])):
        model = word_model(tmp_path / "m", sees=True, max_tokens=limit)
        assert find_needles(model, [text]).lengths == want


def test_any_text_or_records(text, tmp_path):
    (tmp_path / "plain").write_text("One.\n\nTwo\nlines.")
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "title": "T"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"query": "q", "positives": [{"text": "p"}]}\n')
    paths = [tmp_path / name for name in ("plain", "texts.jsonl", "pairs.jsonl")]
    assert read_text(paths) == ["One.", "Two\nlines.", "T a", "p"]
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="empty: no text"):
        read_text([tmp_path / "empty"])
    with pytest.raises(UserError, match="cannot read .*gone"):
        read_text([tmp_path / "gone"])


def test_bad_input(text, model, tmp_path):
    for options, message in (
        ({"kind": "neddle"}, r"kind 'neddle' is none \(did you mean 'needle'\?\)"),
        ({"depths": [50, 101]}, "depth 101 is no share of a text"),
        ({"num_documents": 10**6}, "1000000 documents: 2 to 2,304"),
        ({"lengths": [10**6]}, "tokens, 1,000,000 are needed; give more --text"),
        ({"lengths": [20]}, "a length of 20 tokens holds no needle"),
        ({"max_tokens": 10**6}, "max_tokens 1000000 does not fit"),
    ):
        with pytest.raises(UserError, match=message):
            find_needles(model, [text], **options)
    broken = open_model(model)
    with torch.no_grad():
        broken.encoder.backbone.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="gives a vector with NaN; the weights are broken"):
        find_needles(broken, [text], lengths=[128])
    with pytest.raises(UserError, match="the text is too short for 50 tokens"):
        make_haystacks("a b", ["x"], 50, 0.5, len)
