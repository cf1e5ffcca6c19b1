"""The language-model loss on packed rows, and the precision that the passes run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drama.metrics import matmul_rate


def pass_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where its matrix products are faster on `device` than float32's.

    On CUDA that is known; on a CPU it depends on the instruction set, so a small product is timed
    in both.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return max((torch.float32, torch.bfloat16), key=lambda dtype: matmul_rate(device, dtype))


@contextmanager
def inference(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """No graph, and matrix products in `dtype` with the weights left as they are.

    Autocast keeps the residual stream and the norms in float32, and needs no second copy of the
    model; float32 and float64 models run as they are when `dtype` is float32.
    """
    lower = dtype != torch.float32
    with torch.inference_mode(), torch.autocast(device.type, dtype if lower else None, lower):
        yield


def next_token_loss(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """Sum of the next-token cross entropy (nats) over one row, at least in float32."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return F.cross_entropy(logits_NV[:-1], ids_N[1:], reduction="sum")


def lm_loss(model: Any, rows_RN: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Mean next-token cross entropy (nats per token) over rows [R, N] of token ids, N at least 2.

    Row by row, so that one row's logits are all that is held; summed in float64.
    """
    device = model.device
    total = 0.0
    with inference(device, dtype):
        for ids_N in rows_RN.to(device):
            total += next_token_loss(model(ids_N[None], use_cache=False).logits[0], ids_N).item()
    return total / (rows_RN.shape[0] * (rows_RN.shape[1] - 1))
