from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from drama.errors import UserError
from drama.prune.merges import BytePairs
from drama.prune.vocabulary import choose_tokens, cut_tokenizer, cut_vocabulary, parse_size

FAMILIES = (
    (LlamaForCausalLM, LlamaConfig),
    (MistralForCausalLM, MistralConfig),
    (Qwen2ForCausalLM, Qwen2Config),
    (Qwen3ForCausalLM, Qwen3Config),
)
KEEP = {"byte_level": 512, "byte_fallback": 640, "smollm2": 1024}


class Cut:
    """A tokenizer and what a corpus of a few sentences leaves of it."""

    def __init__(self, tokenizer: Any, keep: int, texts: list[str]) -> None:
        self.old, self.pairs = tokenizer, BytePairs(tokenizer)
        self.counts = counts(self.pairs, tokenizer, texts)
        self.kept = choose_tokens(self.pairs, self.counts, keep)
        self.new = cut_tokenizer(tokenizer, self.pairs, self.kept)
        self.number = {old: new for new, old in enumerate(self.kept)}


def counts(pairs: BytePairs, tokenizer: Any, texts: list[str]) -> np.ndarray:
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return np.bincount(ids, minlength=1 + max(pairs.ids.values()))


@pytest.fixture(scope="module", params=KEEP)
def cut(request: pytest.FixtureRequest, sentences: dict[str, str]) -> Cut:
    kind = request.param
    tokenizer = request.getfixturevalue({"smollm2": "smollm2_tokenizer"}.get(kind, kind))
    return Cut(tokenizer, KEEP[kind], [*sentences.values()][:9])


def round_trip(tokenizer: Any, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def check_text(cut: Cut, text: str) -> bool:
    """Whether the text came back before, after asserting that it then does so now, and that it is
    split as before where all of its tokens stayed."""
    before = cut.old(text)["input_ids"]
    after = cut.new(text)["input_ids"]
    assert max(after, default=0) < len(cut.kept)
    if all(i in cut.number for i in before):
        assert after == [cut.number[i] for i in before]
    came_back = round_trip(cut.old, text) == text
    if came_back:
        assert round_trip(cut.new, text) == text
    return came_back


def test_every_text_that_came_back_still_does(cut: Cut, samples: dict[str, str]) -> None:
    came_back = {name for name, text in samples.items() if check_text(cut, text)}
    assert len(came_back) >= 26, set(samples) - came_back
    assert {"emoji", "code", "rare scripts"} <= came_back
    for text in samples.values():
        for word in text.split():
            check_text(cut, word)
            check_text(cut, f"<s>{word}<|end|>")
    lengths = [sum(len(x(text)["input_ids"]) for text in samples.values())
               for x in (cut.old, cut.new)]  # fmt: skip
    assert lengths[1] > lengths[0]


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_unicode_text(cut: Cut, text: str) -> None:
    check_text(cut, text)


def test_kept_tokens_are_the_old_ones_in_order(cut: Cut) -> None:
    assert len(cut.kept) == len(cut.new) in KEEP.values()
    names = {i: token for token, i in cut.pairs.ids.items()}
    assert cut.new.convert_ids_to_tokens(range(len(cut.kept))) == [names[i] for i in cut.kept]
    whole = [i for i in cut.kept if i in cut.pairs.parts]
    assert len(whole) > 200
    model = Tokenizer.from_str(cut.new.backend_tokenizer.to_str()).model
    assert all([x.value for x in model.tokenize(names[i])] == [names[i]] for i in whole)


def test_special_tokens_go_on_working(cut: Cut, tmp_path: Path) -> None:
    old, new = cut.old, cut.new
    assert type(new) is type(old)
    assert new.special_tokens_map == old.special_tokens_map
    assert new.all_special_tokens == old.all_special_tokens
    assert new.all_special_ids == [cut.number[i] for i in old.all_special_ids]
    new.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(old)
    assert again.get_vocab() == new.get_vocab()
    text = "".join(old.all_special_tokens) + "The baker" + str(old.eos_token)
    for tokenizer in (new, again):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        specials = set(old.all_special_tokens)
        wanted = old.convert_ids_to_tokens(old(text)["input_ids"])
        assert [x for x in tokens if x in specials] == [x for x in wanted if x in specials]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == (
            old.decode(old(text)["input_ids"], skip_special_tokens=True)
        )
        assert tokenizer.bos_token_id == cut.number[old.bos_token_id]
    if old.chat_template:
        talk = [{"role": "user", "content": "Good bread?"}]
        assert again.apply_chat_template(talk, tokenize=False) == (
            old.apply_chat_template(talk, tokenize=False)
        )
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for number, token in config.get("added_tokens_decoder", {}).items():
        assert again.convert_tokens_to_ids(token["content"]) == int(number)
    files = "".join(x.read_text() for x in tmp_path.glob("*.json"))
    assert "/tmp" not in files


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_classes_that_build_their_own_backend(
    kind: str, byte_level: Any, byte_fallback: Any, samples: dict[str, str], tmp_path: Path
) -> None:
    """LlamaTokenizer and Qwen2Tokenizer take only vocabulary and merges from tokenizer.json."""
    source, name = (
        (byte_fallback, LlamaTokenizer) if kind == "llama" else (byte_level, Qwen2Tokenizer)
    )
    source.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = name.__name__
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is name
    small = Cut(tokenizer, 640, [*samples.values()][:9])
    assert type(small.new) is name
    assert sum(check_text(small, text) for text in samples.values()) >= 25
    small.new.save_pretrained(tmp_path / "small")
    again = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert type(again) is name
    for text in samples.values():
        assert again(text)["input_ids"] == small.new(text)["input_ids"]


def test_a_class_with_ids_of_its_own_is_refused(byte_level: Any) -> None:
    class Stubborn(PreTrainedTokenizerFast):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_tokens(["one", "more"])

    backend = byte_level.backend_tokenizer
    tokenizer = Stubborn(tokenizer_object=backend, eos_token="<|end|>")
    pairs = BytePairs(byte_level)
    kept = choose_tokens(pairs, np.zeros(len(pairs.ids), np.int64), 320)
    with pytest.raises(UserError, match="Stubborn: this class does not take its ids"):
        cut_tokenizer(tokenizer, pairs, kept)


@pytest.fixture
def letters() -> BytePairs:
    """The alphabet a ... z, and words merged from it."""
    tokens = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", "ab", "abc"]
    tokens += ["de", "xy", "xyz", "wxyz"]
    tokens += [f"{a}{b}" for a, b in itertools.product("JKLMNOPQRSTUV", "JKLMNOPQRSTU")]
    merges = [("a", "b"), ("ab", "c"), ("d", "e"), ("x", "y"), ("xy", "z"), ("w", "xyz")]
    merges += [(x[0], x[1]) for x in tokens[68:]]
    backend = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    return BytePairs(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_uses_are_counted_inside_longer_tokens(letters: BytePairs) -> None:
    """wxyz 5 times, abc 4, ab 3, de 6, JK 5: uses are ab 7, de 6, xy = xyz = wxyz = JK = 5, abc 4.

    By how often they stand alone, the two places behind the characters would go to de and JK.
    """
    counts_V = np.zeros(len(letters.ids), np.int64)
    for token, count in {"wxyz": 5, "abc": 4, "ab": 3, "de": 6, "JK": 5}.items():
        counts_V[letters.ids[token]] = count
    order = [letters.ids[x] for x in ("ab", "de", "xy", "xyz", "wxyz", "JK", "abc")]
    order += [i for i in range(68, len(letters.ids)) if i != letters.ids["JK"]]
    for size in (64, 128):
        kept = choose_tokens(letters, counts_V, size)
        assert kept == tuple(sorted([*range(62), *order[: size - 62]]))
    assert choose_tokens(letters, counts_V, 65) == choose_tokens(letters, counts_V, 128)


def test_what_must_stay_brings_its_parts(letters: BytePairs) -> None:
    counts_V = np.zeros(len(letters.ids), np.int64)
    counts_V[68:] = 1  # more tokens than places
    wanted = {letters.ids[x] for x in ("wxyz", "xyz", "xy")}
    assert not wanted & set(choose_tokens(letters, counts_V, 128))
    assert wanted <= set(choose_tokens(letters, counts_V, 128, required=[letters.ids["wxyz"]]))


def test_a_choice_is_whole_and_no_worse_than_by_frequency(
    smollm2_pairs: BytePairs, smollm2_tokenizer: Any
) -> None:
    """On the demo's text, 4,096 tokens: against the most frequent ones with their parts."""
    path = Path(__file__).parents[2] / "data" / "demo" / "calibration.txt.gz"
    texts = gzip.decompress(path.read_bytes()).decode().split("\n\n")
    train, held_out = texts[::2], texts[1::2]
    pairs = smollm2_pairs
    counts_V = counts(pairs, smollm2_tokenizer, train)
    ours = choose_tokens(pairs, counts_V, 4096)
    assert pairs.closure(ours) == set(ours)
    frequent = pairs.closure(pairs.alphabet() | pairs.special())
    for number in np.argsort(-counts_V, kind="stable").tolist():
        new = pairs.closure([number], frequent)
        if len(frequent) + len(new) <= 4096:
            frequent |= new
    lengths = [
        sum(len(x(text)["input_ids"]) for text in held_out)
        for x in (
            cut_tokenizer(smollm2_tokenizer, pairs, kept) for kept in (ours, sorted(frequent))
        )
    ]
    assert lengths[0] < 0.99 * lengths[1]


def test_with_byte_fallback_a_character_counts_the_bytes_it_saves() -> None:
    """One place for two: 10 times a character of three bytes, or 15 times one of two."""
    characters = [*map(chr, range(0x400, 0x400 + 63)), "店", "é"]
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    pairs = BytePairs(PreTrainedTokenizerFast(tokenizer_object=backend))
    counts_V = np.array([0] * 256 + [100] * 63 + [10, 15])
    assert choose_tokens(pairs, counts_V, 320) == tuple(range(320))


def test_sizes_are_read() -> None:
    assert [parse_size(x) for x in ("32k", "64K", " 8000 ", "65536")] == [32000, 64000, 8000, 65536]
    for text in ("", "k", "0", "-3", "1.5k", "32kb", "many"):
        with pytest.raises(UserError, match=rf"keep '{text}': give a number of tokens, such as"):
            parse_size(text)


def test_sizes_out_of_range_name_the_nearest(byte_level: Any) -> None:
    pairs = BytePairs(byte_level)
    counts_V = np.zeros(1 + max(pairs.ids.values()), np.int64)
    assert len(pairs.ids) == 905
    with pytest.raises(UserError, match="keep 906: the tokenizer has 905 .* is 896 "):
        choose_tokens(pairs, counts_V, 906)
    with pytest.raises(UserError, match="keep 897: .* nearest valid choice is 896 "):
        choose_tokens(pairs, counts_V, 897)
    with pytest.raises(UserError, match="keep 100: 260 tokens must stay .* choice is 320"):
        choose_tokens(pairs, counts_V, 100)
    assert len(choose_tokens(pairs, counts_V, 257)) == 320
    assert len(choose_tokens(pairs, counts_V, 896)) == 896
    tiny = BytePairs(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(
        models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))))  # fmt: skip
    with pytest.raises(UserError, match="keep 2: 2 of the tokenizer's 3 .* nothing to cut"):
        choose_tokens(tiny, counts_V, 2)


def tiny_model(kind: Any, configuration: Any, rows: int, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings_: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "pad_token_id": None,
    }
    return kind(configuration(**(settings_ | changes))).double().eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "configuration"), FAMILIES)
def test_logits_are_the_old_ones_rows(
    kind: Any, configuration: Any, tied: bool, byte_level: Any, sentences: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    text = sentences["English"]
    small_tokenizer = Cut(byte_level, 640, [text] * 5)
    names = small_tokenizer.pairs.ids
    end, pad = names["<|end|>"], names["<|pad|>"]
    model = tiny_model(  # 1,000 rows for 905 tokens
        kind, configuration, 1000, tie_word_embeddings=tied, pad_token_id=pad,
        bos_token_id=names["<|begin|>"], eos_token_id=[end, names["<|user|>"]],
    )  # fmt: skip
    model.generation_config.eos_token_id = end
    before = {name: x.clone() for name, x in model.state_dict().items()}
    small = cut_vocabulary(model, small_tokenizer.kept)

    assert type(small) is kind
    number = small_tokenizer.number
    assert small.config.vocab_size == 640
    assert small.config.eos_token_id == [number[end], number[names["<|user|>"]]]
    assert (
        small.config.bos_token_id == number[names["<|begin|>"]] == small_tokenizer.new.bos_token_id
    )
    assert small.config.pad_token_id == number[pad] == small.model.embed_tokens.padding_idx
    assert small.generation_config.eos_token_id == number[end]
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    assert small.model.embed_tokens.weight.shape == (640, 48)
    kept = torch.tensor(small_tokenizer.kept)

    old = torch.tensor([byte_level(text)["input_ids"]])
    new = torch.tensor([small_tokenizer.new(text)["input_ids"]])
    assert torch.equal(kept[new], old)
    assert torch.equal(small.lm_head.weight, model.lm_head.weight[kept])
    with torch.inference_mode():
        # on some CPUs the order of a sum depends on the number of columns and on the address
        torch.testing.assert_close(
            small(new).logits, model(old).logits[..., kept], rtol=0, atol=1e-12
        )
    small.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    torch.testing.assert_close(again(new).logits, small(new).logits, rtol=0, atol=1e-12)
    # the old one is as it was
    assert model.config.vocab_size == 1000
    assert model.config.eos_token_id[0] == end
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_ids_that_are_no_rows_become_none_and_missing_ones_are_refused() -> None:
    model = tiny_model(LlamaForCausalLM, LlamaConfig, 128, bos_token_id=5, eos_token_id=7)
    model.config.pad_token_id = -1
    small = cut_vocabulary(model, range(5, 69))
    assert (small.config.bos_token_id, small.config.eos_token_id) == (0, 2)
    assert small.config.pad_token_id is None
    with pytest.raises(UserError, match="kept ids: 7 is missing, .* special token"):
        cut_vocabulary(model, [5, 6, 8])
    for kept in ([5, 7, 128], [7, 5], [5, 5, 7], [-1, 5, 7], []):
        with pytest.raises(UserError, match="kept ids: must rise, and lie between 0 and 127"):
            cut_vocabulary(model, kept)
