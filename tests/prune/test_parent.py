from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drama.errors import UserError
from drama.prune.merges import BytePairs
from drama.prune.output import REPORT_NAME
from drama.prune.parent import Parent, align, shared_ids
from drama.prune.predictions import NextToken
from drama.prune.shape import Shape
from drama.prune.vocabulary import choose_tokens, cut_tokenizer
from drama.testing import byte_tokenizer

CPU = torch.device("cpu")


def write_lm(folder: Path, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, initializer_range=0.2, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_parent_of_more_tokens_is_read_in_the_students(
    tmp_path: Path, byte_level: PreTrainedTokenizerFast, sentences: dict[str, str]
) -> None:
    """Logits of the tokens that were kept, of texts as the student splits them."""
    model = write_lm(tmp_path, byte_level)
    pairs = BytePairs(byte_level)
    counts = np.zeros(len(byte_level), np.int64)
    kept = choose_tokens(pairs, counts, 320)
    small = cut_tokenizer(byte_level, pairs, kept)
    parent = Parent(tmp_path, small, len(kept), CPU, torch.float32)
    rows = [small(text)["input_ids"] for text in sentences.values()]
    chunk = NextToken().chunk(rows, [(0, i) for i in range(len(rows))])
    found = parent(chunk)
    logits_PV = found.final_PE @ found.weight_VE.T
    ids_K = torch.tensor(kept)
    whole = [model(input_ids=ids_K[torch.tensor(row)][None]).logits[0, :-1] for row in rows]
    torch.testing.assert_close(logits_PV, torch.cat(whole)[:, ids_K], rtol=1e-4, atol=1e-4)
    assert not any(weight.requires_grad for weight in parent.model.parameters())
    text = small.decode(rows[0], skip_special_tokens=True)
    assert text == byte_level.decode(ids_K[torch.tensor(rows[0])], skip_special_tokens=True)


def test_the_same_tokens_need_no_other_ids() -> None:
    own, students = byte_tokenizer(), byte_tokenizer()
    rows = len(own)
    assert shared_ids(own, rows, students, rows, Path("p")) is None
    with pytest.raises(UserError, match="p: has other rows"):
        shared_ids(own, rows + 64, students, rows + 64 + 64, Path("p"))


def test_a_parent_of_other_tokens_is_refused(byte_level: PreTrainedTokenizerFast) -> None:
    small = byte_tokenizer()
    with pytest.raises(UserError, match=r"model\.parent p: has no token .*cut from"):
        shared_ids(small, len(small), byte_level, len(byte_level), Path("p"))


SHAPE = Shape(layers=6, hidden=8, heads=2, kv_heads=2, ffn=8, head_dim=4)


def note(folder: Path, source: Shape, model: Path, **plan: list[int]) -> Path:
    folder.mkdir()
    facts = {"model": str(model), "source": vars(source), "plan": plan or None}
    (folder / REPORT_NAME).write_text(json.dumps(facts))
    return folder


def test_states_are_paired_by_what_was_cut(tmp_path: Path) -> None:
    """A block's output is what the parent's next kept block reads; through a cut of a cut, with one
    of the vocabulary in between."""
    mid = Shape(layers=4, hidden=6, heads=2, kv_heads=2, ffn=8, head_dim=4)
    first = note(tmp_path / "1", SHAPE, tmp_path, layers=[0, 2, 3, 5], hidden=[0, 1, 3, 4, 6, 7])
    words = note(tmp_path / "2", mid, first)
    second = note(tmp_path / "3", mid, words, layers=[0, 1, 3], hidden=[1, 2, 5])
    found = align(first, 4, SHAPE)
    assert found.pairs == ((0, 1), (1, 2), (2, 4), (3, 5))
    assert found.channels == (0, 1, 3, 4, 6, 7)
    found = align(second, 3, SHAPE)
    assert found.pairs == ((0, 1), (1, 4), (2, 5))
    assert found.channels == (1, 3, 7)


def test_states_of_unknown_origin_are_paired_by_depth(tmp_path: Path) -> None:
    found = align(tmp_path, 3, SHAPE)
    assert found.pairs == ((0, 1), (1, 3), (2, 5))
    assert found.channels is None
    lost = note(tmp_path / "1", Shape(9, 8, 2, 2, 8, 4), tmp_path, layers=[0, 4, 5], hidden=[0])
    assert align(lost, 3, SHAPE).channels is None


def test_a_cut_of_the_vocabulary_alone_leaves_states_where_they_were(tmp_path: Path) -> None:
    found = align(note(tmp_path / "1", SHAPE, tmp_path), 6, SHAPE)
    assert found.pairs == tuple((i, i) for i in range(6))
    assert found.channels == tuple(range(8))


def test_a_report_that_names_itself_ends(tmp_path: Path) -> None:
    """A cut that was moved over the model that it was made from."""
    mid = Shape(layers=4, hidden=6, heads=2, kv_heads=2, ffn=8, head_dim=4)
    cut = note(tmp_path / "1", mid, tmp_path / "1", layers=[0, 1], hidden=[0])
    assert align(cut, 2, SHAPE).channels is None
