"""Which token of a packed chunk predicts which: the next one, or a masked one.

T packed tokens, B texts, P predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from drama.data.packing import PackedBatch, Row, pack
from drama.errors import UserError

MASK_DRAW = 2**33  # third word of the seed, beyond the draws of the data's order
# of the tokens that are to be predicted, as BERT: the others become random ones or stay
AS_MASK, AS_RANDOM = 0.8, 0.1


@dataclass
class Chunk:
    """Texts side by side and what is to be predicted in them.

    row_P: int64, the packed token whose state predicts. target_P: int64, the token id that it
    should. text_P: int64, the number of its text in the chunk.
    """

    batch: PackedBatch
    row_P: Tensor
    target_P: Tensor
    text_P: Tensor

    def to(self, device: torch.device) -> Chunk:
        rest = (x.to(device) for x in (self.row_P, self.target_P, self.text_P))
        return Chunk(self.batch.to(device), *rest)


class Objective(Protocol):
    """What a model is to predict; `causal` is the mask that goes with it."""

    causal: bool

    def chunk(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Chunk:
        """The texts packed, each of at least one token; keys: epoch and record number of each."""
        ...


class NextToken:
    """Every token predicts the one after it in its own text."""

    causal = True

    def chunk(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Chunk:
        batch = pack(rows)
        lengths = np.array(batch.lengths)
        predicts_T = np.ones(lengths.sum(), bool)
        predicts_T[np.cumsum(lengths) - 1] = False
        row_P = torch.from_numpy(np.flatnonzero(predicts_T))
        text_P = torch.from_numpy(np.repeat(np.arange(len(rows)), lengths - 1))
        return Chunk(batch, row_P, batch.input_ids_T[row_P + 1], text_P)


class MaskedNextToken:
    """Some tokens are masked, and the token before each predicts it, with both sides in sight.

    After BehnamGhader et al. 2024 (arXiv 2404.05961, section 2.2): the state before the masked
    token predicts it, since that is what the language model's head has learnt to read. The masks of
    a text are a function of seed, epoch and record number.

    share: of a text's tokens, the first one excepted.
    """

    causal = False

    def __init__(self, share: float, mask_id: int, vocab_size: int, seed: int) -> None:
        self.share, self.mask_id, self.vocab_size, self.seed = share, mask_id, vocab_size, seed

    def chunk(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Chunk:
        batch = pack(rows)
        starts = np.cumsum([0, *batch.lengths[:-1]])
        place_P, text_P, seen_P = [], [], []
        for number, (row, key) in enumerate(zip(rows, keys, strict=True)):
            place, how, random_id = self._draw(len(row), key)
            own = np.asarray(row, np.int64)[place]
            shown = np.where(how < AS_MASK, self.mask_id, own)
            seen_P.append(
                np.where((how >= AS_MASK) & (how < AS_MASK + AS_RANDOM), random_id, shown)
            )
            place_P.append(starts[number] + place)
            text_P.append(np.full(len(place), number))
        masked_P = torch.from_numpy(np.concatenate(place_P))
        target_P = batch.input_ids_T[masked_P]
        batch.input_ids_T[masked_P] = torch.from_numpy(np.concatenate(seen_P))
        return Chunk(batch, masked_P - 1, target_P, torch.from_numpy(np.concatenate(text_P)))

    def _draw(self, length: int, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places in a text that are predicted; for each what decides how it is shown, 0 to 1, and a
        random token id."""
        seeds = np.random.SeedSequence([self.seed, key[0], MASK_DRAW, key[1]])
        words_3N = np.random.Philox(seeds).random_raw(3 * (length - 1)).reshape(3, -1)
        chosen, how = (words_3N[:2] >> np.uint64(11)).astype(np.float64) / 2**53
        (place,) = np.nonzero(chosen < self.share)
        random_id = (words_3N[2][place] % np.uint64(self.vocab_size)).astype(np.int64)
        return place + 1, how[place], random_id


def find_mask_id(tokenizer: object, token: str | None, where: str) -> int:
    """The id that stands for a masked token: the named one, the tokenizer's own, or "_".

    Raises:
        UserError: the tokenizer has no such single token.
    """
    name = token or getattr(tokenizer, "mask_token", None) or "_"
    found = tokenizer.get_vocab().get(name)  # type: ignore[attr-defined]
    if found is None:
        raise UserError(
            f"{where}: the tokenizer has no token '{name}' to mask with; name one of its tokens "
            "in loss.mask_token"
        )
    return int(found)
