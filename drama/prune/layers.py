"""Order layers by the loss without them, one dropped at a time.

Each round leaves out the layers that are still there, one after the other, measures the
language-model loss, drops the layer whose absence hurts least, and measures again: what a layer is
worth depends on which others are there. (Block influence, ShortGPT's proxy, Men et al. 2024, arXiv
2403.03853, looks at the whole model once; docs/log.md has both in numbers.)

A round takes one pass per row: behind every layer that is tried, the stream that went in joins the
batch as the variant without that layer, so what lies before it is computed once for all. With K
layers there and all tried that is K (K + 1) / 2 layer passes and K + 1 output layers a row, where
separate passes would take K (K - 1) and K. The first round tries all, the later ones only those
that hurt least when last measured. Memory is that of one row, all variants wide.

L layers of the source, K still there, C of them tried, V = C + 1 variants, N tokens of a row, D
hidden channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drama.console import progress
from drama.prune.loss import inference, next_token_loss

# layers tried in a round after the first: half the cost on SmolLM2-135M, and in 33 of 35 rounds the
# choice of a full one
TRIED = 8


@dataclass(frozen=True)
class LayerOrder:
    """The layers that were dropped, the least harmful first, and the losses on the way.

    losses: nats per token of the whole model, then after each drop. num_layers: L.
    """

    dropped: tuple[int, ...]
    losses: tuple[float, ...]
    num_layers: int

    def scores(self) -> Tensor:
        """Float64 [L]: the number of layers dropped before this one; those that stay tie."""
        score_L = torch.full((self.num_layers,), float(len(self.dropped)), dtype=torch.float64)
        for rank, layer in enumerate(self.dropped):
            score_L[layer] = rank
        return score_L


def drop_layers(model: Any, rows_RN: Tensor, keep: int, dtype: torch.dtype) -> LayerOrder:
    """Drop the least harmful layer, again and again, until `keep` are left (at least 1).

    rows: int64 [R, N] of token ids. The model is as before afterwards. Of equal losses the higher
    layer goes.
    """
    num_layers = len(model.model.layers)
    kept = list(range(num_layers))
    harm = dict.fromkeys(kept, 0.0)  # nats per token that a layer's absence costs, last measured
    dropped: list[int] = []
    losses: list[float] = []
    with progress() as bar:
        task = bar.add_task("layers", total=num_layers - keep, note="")
        while len(kept) > keep:
            tried = sorted(sorted(kept, key=harm.__getitem__)[: TRIED if dropped else None])
            loss_V = torch.zeros(len(tried) + 1, dtype=torch.float64)
            for row_N in rows_RN:
                loss_V += losses_without(model, row_N, kept, tried, dtype) / rows_RN.shape[0]
                bar.update(task, advance=1 / rows_RN.shape[0])
            whole, *without = loss_V.tolist()
            harm |= {i: loss - whole for i, loss in zip(tried, without, strict=True)}
            best = min(tried, key=lambda i: (harm[i], -i))
            losses += [whole + harm[best]] if losses else [whole, whole + harm[best]]
            kept.remove(best)
            dropped.append(best)
            bar.update(task, note=f"loss {losses[-1]:.3f}")
    return LayerOrder(tuple(dropped), tuple(losses), num_layers)


def losses_without(
    model: Any,
    row_N: Tensor,
    kept: Sequence[int],
    tried: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Nats per token of one row: with the `kept` layers, then without each of `tried` in turn.

    tried: C of the kept layers, rising. Returns float64 [C + 1] on the CPU.
    """
    ids_N = row_N.to(model.device)
    with inference(model.device, dtype), _variants(model, kept, tried):
        stream_VND = model.model(ids_N[None], use_cache=False).last_hidden_state
        sums = [next_token_loss(model.lm_head(x_ND), ids_N) for x_ND in stream_VND]
    return torch.stack(sums).double().cpu() / (len(row_N) - 1)


@contextmanager
def _variants(model: Any, kept: Sequence[int], tried: Sequence[int]) -> Iterator[None]:
    """Within, the model runs the kept layers, and each one tried adds a variant to the batch."""

    def grow(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([output, args[0][:1]])

    layers = model.model.layers
    handles = [layers[i].register_forward_hook(grow) for i in tried]
    model.model.layers = nn.ModuleList(layers[i] for i in kept)
    try:
        yield
    finally:
        model.model.layers = layers
        for handle in handles:
            handle.remove()
