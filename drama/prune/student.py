"""A causal language model as recovery trains it: packed texts in, the loss out, no logits whole.

T packed tokens, P predictions, B texts, V vocabulary, D width of the student, E of its parent, K
states that are imitated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drama.attention import ATTENTION_NAME
from drama.blocks import run_blocks
from drama.hf import exact_rotary
from drama.kernels.linear_loss import linear_loss
from drama.prune.predictions import Chunk
from drama.prune.recovery_recipe import RecoveryLossRecipe


@dataclass
class ParentStates:
    """What the parent makes of a chunk's predictions.

    final_PE: the normed states that its head reads. weight_VE: that head. states: after its blocks
    that are imitated, [P, E] each, in the order of `Alignment.pairs`.
    """

    final_PE: Tensor
    weight_VE: Tensor
    states: list[Tensor]


@dataclass(frozen=True)
class Alignment:
    """Which states are imitated.

    pairs: block of the student, block of the parent. channels: of the parent's residual stream,
    where each of the student's came from; None where nobody knows.
    """

    pairs: tuple[tuple[int, int], ...]
    channels: tuple[int, ...] | None


class FusedHead(nn.Module):
    """In the place of `lm_head`, under its parameter's name: the projection with the loss.

    A module of its own, because under ZeRO 3 a weight is empty outside its owner's forward.
    """

    def __init__(self, head: nn.Linear, loss: RecoveryLossRecipe) -> None:
        super().__init__()
        self.weight, self.loss = head.weight, loss

    def forward(
        self, hidden_PD: Tensor, target_P: Tensor, parent: ParentStates | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum over predictions, and by prediction cross-entropy and KL."""
        of_parent: dict[str, Any] = {}
        if parent is not None and self.loss.kl:
            of_parent = {
                "teacher_hidden_TE": parent.final_PE,
                "teacher_weight_VE": parent.weight_VE,
                "temperature": self.loss.temperature,
                "kl_weight": self.loss.kl,
            }
        found = linear_loss(hidden_PD, self.weight, target_P, ce_weight=self.loss.lm, **of_parent)
        kl_P = torch.zeros_like(found.ce_T) if found.kl_T is None else found.kl_T
        return found.loss, found.ce_T, kl_P


class Aligner(nn.Module):
    """A linear map from the student's residual stream to the parent's, one for all blocks.

    At first it puts every channel where it was cut from.
    """

    def __init__(self, alignment: Alignment, width: int, parent_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(parent_width, width))
        with torch.no_grad():
            if alignment.channels is None:
                nn.init.orthogonal_(self.weight)
            else:
                self.weight[list(alignment.channels), torch.arange(width)] = 1.0

    def forward(self, states: Sequence[Tensor], of_parent: Sequence[Tensor]) -> Tensor:
        """1 - cosine of every prediction, the mean over the K states, float32 [P]."""
        apart = [
            1 - F.cosine_similarity(F.linear(x_PD, self.weight).float(), y_PE.float(), dim=-1)
            for x_PD, y_PE in zip(states, of_parent, strict=True)
        ]
        return torch.stack(apart).mean(0)


class Student(nn.Module):
    """`forward` gives sums over a chunk's predictions.

    The model of transformers stays in `lm`; its own forward is no longer used.
    """

    def __init__(
        self,
        lm: Any,
        loss: RecoveryLossRecipe,
        *,
        causal: bool,
        alignment: Alignment | None = None,
        parent_width: int = 0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.lm, self.loss, self.causal, self.recompute = lm, loss, causal, recompute
        lm.set_attn_implementation(ATTENTION_NAME)
        lm.lm_head = FusedHead(lm.lm_head, loss)
        self.alignment = alignment
        self.aligner: Aligner | None = None
        if alignment is not None:
            self.aligner = Aligner(alignment, lm.config.hidden_size, parent_width)

    def forward(
        self, chunk: Chunk, parent: ParentStates | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is minimised, with a graph; cross-entropy and KL of every prediction, float32 [P];
        1 - cosine of the states, the sum over predictions."""
        pairs = self.alignment.pairs if self.alignment and parent else ()
        wanted = {ours for ours, _ in pairs}
        final_PD, states = read_states(
            self.lm.model, chunk, causal=self.causal, wanted=wanted, recompute=self.recompute
        )
        total, ce_P, kl_P = self.lm.lm_head(final_PD, chunk.target_P, parent)
        apart = total.new_zeros(())
        if self.aligner is not None and parent is not None:
            ours = [states[block] for block, _ in pairs]
            apart = self.aligner(ours, parent.states).sum()
            total = total + self.loss.hidden * apart
        return total, ce_P, kl_P, apart.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Student:
        with exact_rotary(self.lm.model.rotary_emb):
            super()._apply(fn, recurse)
        return self


def read_states(
    backbone: Any, chunk: Chunk, *, causal: bool, wanted: set[int], recompute: bool = False
) -> tuple[Tensor, dict[int, Tensor]]:
    """The normed states of a chunk's predictions, [P, D], and those after the wanted blocks."""
    states: dict[int, Tensor] = {}

    def read(number: int, hidden_TD: Tensor) -> None:
        if number in wanted:
            states[number] = hidden_TD[chunk.row_P]

    hidden_TD = run_blocks(backbone, chunk.batch, causal=causal, recompute=recompute, read=read)
    return backbone.norm(hidden_TD[chunk.row_P]), states
