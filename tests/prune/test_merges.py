from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from drama.errors import UserError
from drama.prune.merges import BytePairs

KINDS = ("byte_level", "byte_fallback", "smollm2")


@pytest.fixture
def pairs(request: pytest.FixtureRequest) -> BytePairs:
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2_pairs")
    return BytePairs(request.getfixturevalue(request.param))


def fast(model: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>")


def library_model(state: dict[str, Any], ignore_merges: bool = False) -> Any:
    """The library's BPE, which then knows whole words by their merges only."""
    state = json.loads(json.dumps(state))
    state["model"]["ignore_merges"] = ignore_merges
    return Tokenizer.from_str(json.dumps(state)).model


@pytest.mark.parametrize("pairs", KINDS, indirect=True)
def test_what_merges_make_is_what_the_library_makes(pairs: BytePairs) -> None:
    model = library_model(pairs.state)
    tokens = list(pairs.vocab.items())[:: 1 if len(pairs.vocab) < 5000 else 7]
    num_merged = 0
    for token, number in tokens:
        if number in pairs.added or len(token) == 1 or number in pairs.byte_ids:
            continue
        whole = [x.id for x in model.tokenize(token)] == [number]
        assert (number in pairs.parts) == whole, token
        num_merged += whole
    assert num_merged > 500


@pytest.mark.parametrize("pairs", KINDS, indirect=True)
def test_a_closure_is_enough_and_nothing_of_it_is_too_much(pairs: BytePairs) -> None:
    names = {number: token for token, number in pairs.ids.items()}
    base = pairs.alphabet() | pairs.special()
    deepest = sorted(pairs.parts, key=lambda i: (-len(names[i]), i))
    deepest = [i for i in deepest if not names[i].startswith("ĠĠ")][:2]
    for number in deepest:
        needed = pairs.closure([number])
        assert len(needed) >= 4
        small = library_model(pairs.cut(base | needed))
        assert [x.value for x in small.tokenize(names[number])] == [names[number]]
        for part in needed - base - {number}:
            less = library_model(pairs.cut((base | needed) - {part}))
            assert len(less.tokenize(names[number])) > 1, names[part]


def test_of_several_merges_the_one_that_runs_counts() -> None:
    """a+bc has the better rank than ab+c, but bc is merged after ab: so ab+c makes abc."""
    vocab = {token: number for number, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "x"])}
    merges = [("a", "bc"), ("a", "b"), ("b", "c"), ("ab", "c")]
    pairs = BytePairs(fast(models.BPE(vocab=vocab, merges=merges)))
    assert pairs.parts == {3: (0, 1), 4: (1, 2), 5: (3, 2)}
    kept = pairs.cut(pairs.alphabet() | pairs.special() | pairs.closure([5]))
    assert kept["model"]["merges"] == [["a", "b"], ["ab", "c"]]


def test_tokens_that_only_whole_words_yield(byte_level: Any, smollm2_pairs: BytePairs) -> None:
    pairs = BytePairs(byte_level)
    baker = pairs.ids["Ġbaker"]
    assert baker in pairs.reachable
    assert pairs.closure([baker]) == {baker}
    state = json.loads(byte_level.backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = False
    strict = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert baker not in BytePairs(strict).reachable
    assert len(smollm2_pairs.reachable) == 49152


def test_an_added_token_needs_no_parts() -> None:
    """It is cut out of the text before any merge, even where merges could make it."""
    vocab = {token: number for number, token in enumerate(["a", "b", "c", "ab", "abc"])}
    tokenizer = fast(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    assert BytePairs(tokenizer).closure([4]) == {0, 1, 2, 3, 4}
    tokenizer.add_tokens(["abc"])
    assert BytePairs(tokenizer).closure([4]) == {4}


def test_what_must_stay(byte_level: Any, byte_fallback: Any, smollm2_pairs: BytePairs) -> None:
    pairs = BytePairs(byte_level)
    assert len(pairs.alphabet()) == 256
    assert pairs.special() == {
        pairs.ids[x] for x in ("<|begin|>", "<|end|>", "<|pad|>", "<|user|>")
    }
    pairs = BytePairs(byte_fallback)
    assert pairs.alphabet() == {*range(3, 259), pairs.ids["▁"]}
    assert pairs.special() == {0, 1, 2}
    # this tokenizer has no token for bytes that its training text lacked
    assert (len(smollm2_pairs.alphabet()), smollm2_pairs.special()) == (235, set(range(17)))


def test_characters_stay_where_bytes_are_incomplete() -> None:
    vocab = {
        token: number for number, token in enumerate(["<0x00>", "<0x41>", "é", "▁", "ab", "a"])
    }
    pairs = BytePairs(fast(models.BPE(vocab=vocab, merges=[], byte_fallback=True)))
    assert pairs.alphabet() == {0, 1, 2, 3, 5}


def test_every_place_that_holds_an_id_follows() -> None:
    vocab = {token: number for number, token in enumerate("abcdefgh")}
    tokenizer = fast(models.BPE(vocab=vocab, merges=[], unk_token="h"))
    backend = tokenizer.backend_tokenizer
    eos = backend.token_to_id("</s>")
    backend.enable_padding(pad_id=6, pad_token="g")
    backend.post_processor = processors.Sequence(
        [
            processors.BertProcessing(("b", 1), ("c", 2)),
            processors.RobertaProcessing(("d", 3), ("e", 4)),
            processors.TemplateProcessing(single="f:0 $A", special_tokens=[("f", 5)]),
        ]
    )
    pairs = BytePairs(tokenizer)
    assert pairs.special() == {1, 2, 3, 4, 5, 6, 7, eos}
    state = pairs.cut(pairs.special())
    new = Tokenizer.from_str(json.dumps(state))
    assert new.get_vocab() == {t: n for n, t in enumerate([*"bcdefgh", "</s>"])}
    assert new.padding["pad_id"] == 5
    bert, roberta, template = state["post_processor"]["processors"]
    assert (bert["sep"], bert["cls"]) == (["b", 0], ["c", 1])
    assert (roberta["sep"], roberta["cls"]) == (["d", 2], ["e", 3])
    assert template["special_tokens"]["f"]["ids"] == [4]


def test_other_tokenizers_are_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="tokenizer model 'WordLevel': .* only BPE can"):
        BytePairs(tokenizer)
    with pytest.raises(UserError, match="tokenizer model 'Unigram'"):
        BytePairs(fast(models.Unigram([("a", -1.0), ("b", -2.0)])))
    with pytest.raises(UserError, match="end_of_word_suffix '</w>': .* without affixes"):
        BytePairs(fast(models.BPE(vocab={"a": 0}, merges=[], end_of_word_suffix="</w>")))
    with pytest.raises(UserError, match="object: a vocabulary cut needs a fast tokenizer"):
        BytePairs(object())
