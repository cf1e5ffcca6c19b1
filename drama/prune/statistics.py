"""Activation statistics of a Llama in one streaming pass over calibration text.

L layers, M = 2L+1 norms in order of use, D hidden width, C = heads * head_dim channels of the
attention output, I FFN channels, T tokens of a batch. A batch is
summed in float32, the batches in float64, on the model's device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from drama.console import progress
from drama.prune.loss import inference
from drama.prune.shape import Shape

TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Statistics:
    """Means over all tokens of the pass; float64, on the CPU.

    ffn: [L, I] of |a|, a the input of down_proj.
    attention: [L, C] of c^2, c the input of o_proj.
    normed: [M, D] of |y|, y a norm's output.
    energy: [M, D] of (x / rms(x))^2, x a norm's input; the mean over D is 1 but for the norm's eps.
    """

    ffn: Tensor
    attention: Tensor
    normed: Tensor
    energy: Tensor
    num_tokens: int
    seconds: float


class _Sums:
    """Running sums, fed by forward hooks."""

    def __init__(self, model: Any) -> None:
        shape, device = Shape.of(model.config), model.device
        num_norms = 2 * shape.layers + 1

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.float64, device=device)

        self.ffn = zeros(shape.layers, shape.ffn)
        self.attention = zeros(shape.layers, shape.heads * shape.head_dim)
        self.normed = zeros(num_norms, shape.hidden)
        self.energy = zeros(num_norms, shape.hidden)

    def add_ffn(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.ffn[layer] += _flat(args[0]).norm(p=1, dim=0)

    def add_attention(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.attention[layer] += _flat(args[0]).norm(dim=0).double().square()

    def add_norm(
        self, norm: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        x_TD = _flat(args[0])
        self.normed[norm] += _flat(output).norm(p=1, dim=0)
        unit_TD = x_TD * x_TD.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
        self.energy[norm] += unit_TD.norm(dim=0).double().square()


def _flat(x: Tensor) -> Tensor:
    """[..., D] to [T, D], at least float32."""
    x = x.detach().flatten(0, -2)
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def _hooks(model: Any, sums: _Sums) -> Iterator[None]:
    handles = []
    for i, layer in enumerate(model.model.layers):
        handles += [
            layer.mlp.down_proj.register_forward_pre_hook(partial(sums.add_ffn, i)),
            layer.self_attn.o_proj.register_forward_pre_hook(partial(sums.add_attention, i)),
        ]
    for i, norm in enumerate(norms_of(model)):
        handles.append(norm.register_forward_hook(partial(sums.add_norm, i)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def norms_of(model: Any) -> list[Any]:
    """Return the M norms in order of use: two per layer, then the final one."""
    layers = model.model.layers
    pairs = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in layers]
    return [norm for pair in pairs for norm in pair] + [model.model.norm]


def collect(model: Any, rows_RN: Tensor, dtype: torch.dtype) -> Statistics:
    """Run the model once over rows [R, N] of token ids and return the statistics.

    The model runs as it is (causal), without its output layer, matrix products in `dtype`. Memory
    does not grow with the number of rows.
    """
    sums = _Sums(model)
    num_tokens = rows_RN.numel()
    start = time.perf_counter()
    with inference(model.device, dtype), _hooks(model, sums), progress() as bar:
        task = bar.add_task("activations", total=num_tokens, note="")
        for batch_BN in rows_RN.split(max(1, TOKENS_PER_BATCH // rows_RN.shape[1])):
            model.model(batch_BN.to(model.device), use_cache=False)
            bar.update(task, advance=batch_BN.numel())
            done = bar.tasks[task].completed
            bar.update(task, note=f"{done / (time.perf_counter() - start):,.0f} tokens/s")
    ffn, attention, normed, energy = (
        (x / num_tokens).cpu() for x in (sums.ffn, sums.attention, sums.normed, sums.energy)
    )
    seconds = time.perf_counter() - start
    return Statistics(ffn, attention, normed, energy, num_tokens, seconds)
