from __future__ import annotations

import numpy as np
import pytest
import torch

from drama.errors import UserError
from drama.prune.predictions import MaskedNextToken, NextToken, find_mask_id
from drama.testing import byte_tokenizer

ROWS = [np.array([5, 6, 7], np.int32), np.array([8], np.int32), np.array([9, 10], np.int32)]
KEYS = [(0, 0), (0, 1), (0, 2)]


def test_every_token_predicts_the_next_of_its_own_text() -> None:
    chunk = NextToken().chunk(ROWS, KEYS)
    assert chunk.row_P.tolist() == [0, 1, 4]
    assert chunk.target_P.tolist() == [6, 7, 10]
    assert chunk.text_P.tolist() == [0, 0, 2]


def masked(share: float = 0.3, seed: int = 0) -> MaskedNextToken:
    return MaskedNextToken(share, mask_id=3, vocab_size=200, seed=seed)


def long_rows(count: int = 40, length: int = 200) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(10, 200, length).astype(np.int32) for _ in range(count)]
    return rows, [(0, i) for i in range(count)]


def test_masked_tokens_are_predicted_from_the_token_before_them() -> None:
    rows, keys = long_rows()
    chunk = masked().chunk(rows, keys)
    before = torch.from_numpy(np.concatenate(rows).astype(np.int64))
    place_P = chunk.row_P + 1
    assert torch.equal(chunk.target_P, before[place_P])
    assert torch.equal(chunk.text_P, place_P // 200)
    assert (place_P % 200 > 0).all(), "nothing stands before a first token"
    untouched = torch.ones_like(before, dtype=torch.bool)
    untouched[place_P] = False
    assert torch.equal(chunk.batch.input_ids_T[untouched], before[untouched])


def test_shares_of_masked_random_and_kept_tokens() -> None:
    rows, keys = long_rows(400)
    chunk = masked().chunk(rows, keys)
    assert len(chunk.row_P) / (400 * 199) == pytest.approx(0.3, abs=0.01)
    seen = chunk.batch.input_ids_T[chunk.row_P + 1]
    is_mask, stays = seen == 3, seen == chunk.target_P
    assert is_mask.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert stays.float().mean().item() == pytest.approx(0.1, abs=0.02)
    others = seen[~is_mask & ~stays]
    assert others.unique().numel() > 150


def test_masks_are_a_function_of_seed_epoch_and_record() -> None:
    rows, keys = long_rows(4)
    whole = masked().chunk(rows, keys)
    alone = masked().chunk(rows[2:3], keys[2:3])
    assert torch.equal(whole.row_P[whole.text_P == 2] - 400, alone.row_P)
    assert torch.equal(whole.batch.input_ids_T[400:600], alone.batch.input_ids_T)
    for other in (
        masked(seed=1).chunk(rows, keys),
        masked().chunk(rows, [(1, i) for _, i in keys]),
    ):
        assert not torch.equal(other.batch.input_ids_T, whole.batch.input_ids_T)


def test_a_text_of_one_token_predicts_nothing() -> None:
    for objective in (NextToken(), masked()):
        chunk = objective.chunk([[0]], [(0, 0)])
        assert len(chunk.row_P) == 0


def test_the_token_to_mask_with() -> None:
    tokenizer = byte_tokenizer()
    assert find_mask_id(tokenizer, None, "model") == tokenizer.get_vocab()["_"]
    assert find_mask_id(tokenizer, "<pad>", "model") == tokenizer.pad_token_id
    with pytest.raises(UserError, match=r"model: the tokenizer has no token '<mask>'.*mask_token"):
        find_mask_id(tokenizer, "<mask>", "model")
