"""A causal language model as an engine trains it: token ids in, a loss a row out.

B rows, N tokens a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from drama.hf import exact_rotary


class LanguageModel(nn.Module):
    """Token ids [B, N] to the mean next-token cross entropy of every row, float32 [B]."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids_BN: Tensor) -> Tensor:
        logits_BNV = self.lm(input_ids=ids_BN, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(
            logits_BNV.flatten(0, 1).float(), ids_BN[:, 1:].flatten(), reduction="none"
        )
        return losses.view(ids_BN.shape[0], -1).mean(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        with exact_rotary(self.lm.model.rotary_emb):
            super()._apply(fn, recurse)
        return self
