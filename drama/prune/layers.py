"""Order layers by the loss without them, one dropped at a time.

Each round leaves out every layer that is still there in turn, measures the language-model loss,
drops the layer whose absence hurts least, and measures again: what a layer is worth depends on
which others are there. (Block influence, ShortGPT's proxy, Men et al. 2024, arXiv 2403.03853, looks
at the whole model once; docs/log.md has both in numbers.)

A round of K layers takes one pass per row: behind every layer, the stream that went in joins the
batch as the variant without that layer, so what lies before a left-out layer is computed once for
all. That is K (K + 1) / 2 layer passes and K output layers a row, where K separate passes would
take K (K - 1) layer passes. Memory is that of one row, K + 1 variants wide.

L layers of the source, K still there, V = K + 1 variants, N tokens of a row, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from drama.console import progress
from drama.prune.loss import inference, next_token_loss


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


def drop_layers(
    model: LlamaForCausalLM, rows_RN: Tensor, keep: int, dtype: torch.dtype
) -> LayerOrder:
    """Drop the least harmful layer, again and again, until `keep` are left (at least 1).

    rows: int64 [R, N] of token ids. The model is as before afterwards. Of equal losses the higher
    layer goes.
    """
    num_layers = len(model.model.layers)
    kept = list(range(num_layers))
    dropped: list[int] = []
    losses: list[float] = []
    rounds = range(num_layers, keep, -1)
    with progress() as bar:
        task = bar.add_task("layers", total=sum(k * (k + 1) // 2 for k in rounds), note="")
        for count in rounds:
            loss_V = torch.zeros(count + 1, dtype=torch.float64)
            for row_N in rows_RN:
                loss_V += losses_without(model, row_N, kept, dtype) / rows_RN.shape[0]
                bar.update(task, advance=count * (count + 1) / 2 / rows_RN.shape[0])
            whole, *without = loss_V.tolist()
            best = min(range(count), key=lambda i: (without[i], -i))
            losses += [whole, without[best]] if not losses else [without[best]]
            dropped.append(kept.pop(best))
            bar.update(task, note=f"without {len(dropped)}: loss {losses[-1]:.3f}")
    return LayerOrder(tuple(dropped), tuple(losses), num_layers)


def losses_without(
    model: LlamaForCausalLM, row_N: Tensor, kept: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Nats per token of one row: with the K `kept` layers, then without each of them in turn.

    Returns float64 [K + 1] on the CPU.
    """
    ids_N = row_N.to(model.device)
    with inference(model.device, dtype), _variants(model, kept):
        stream_VND = model.model(ids_N[None], use_cache=False).last_hidden_state
        sums = [next_token_loss(model.lm_head(x_ND), ids_N) for x_ND in stream_VND]
    return torch.stack(sums).double().cpu() / (len(row_N) - 1)


@contextmanager
def _variants(model: LlamaForCausalLM, kept: Sequence[int]) -> Iterator[None]:
    """Within, the model runs the kept layers, and the batch grows by one variant at each."""

    def grow(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([output, args[0][:1]])

    layers = model.model.layers
    handles = [layers[i].register_forward_hook(grow) for i in kept]
    model.model.layers = nn.ModuleList(layers[i] for i in kept)
    try:
        yield
    finally:
        model.model.layers = layers
        for handle in handles:
            handle.remove()
