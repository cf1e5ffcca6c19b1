"""Fused element-wise work in Hugging Face's blocks: Liger-Kernel's Triton kernels on CUDA, our
blocks of rows on a CPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drama import row_blocks
from drama.errors import UserError


def has_liger() -> bool:
    """Whether Liger-Kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def fuse(backbone: Any, wanted: str, device: torch.device) -> tuple[str, str]:
    """Let the blocks compute norm and SwiGLU, with Liger-Kernel RoPE too, as is best on a device.
    Weights and parameter names stay.

    wanted: auto, on (Liger-Kernel or nothing) or off. Returns who computes them, and why.

    Raises:
        UserError: on, where Liger-Kernel cannot run.
    """
    if wanted == "off":
        return "transformers", "step.liger: off"
    if wanted == "on" and device.type != "cuda":
        raise UserError("step.liger on: Liger-Kernel runs on CUDA, here is none; say auto")
    if wanted == "on" and not has_liger():
        raise UserError("step.liger on: not installed; pip install liger-kernel, or say auto")
    if device.type == "cpu":
        _replace(backbone, row_blocks.rms_norm, row_blocks.silu_mul)
        return "blocks of rows", "less of a graph to keep; RoPE is transformers'"
    if device.type != "cuda":
        return "transformers", f"nothing fused for {device.type}"
    if not has_liger():
        return "transformers", "liger_kernel is not installed"
    use_liger(backbone, device.type)
    return "Liger-Kernel", "it is installed"


def use_liger(backbone: Any, device_type: str) -> None:
    """Let the blocks compute RMSNorm, SwiGLU and RoPE with Liger-Kernel on that type of device.

    RoPE is a function of transformers' module, so it changes for all models of this architecture in
    this process; tensors of other devices take the old one.
    """
    ops = importlib.import_module("liger_kernel.ops")
    rope = importlib.import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb

    def rms_norm(hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        # casts as Llama does; not in place: a kept graph may still need the incoming gradient
        normed: Tensor = ops.LigerRMSNormFunction.apply(hidden, weight_D, eps, 0.0, "llama", False)
        return normed

    _replace(backbone, rms_norm, ops.LigerSiLUMulFunction.apply)
    modeling: Any = sys.modules[type(backbone.layers[0].self_attn).__module__]
    plain = modeling.apply_rotary_pos_emb
    if hasattr(plain, "without_liger"):  # an earlier model has done it
        return

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        chosen = rope if q.device.type == device_type else plain
        return chosen(q, k, cos, sin, **options)

    rotate.without_liger = plain  # type: ignore[attr-defined]
    modeling.apply_rotary_pos_emb = rotate


def _replace(
    backbone: Any,
    rms_norm: Callable[[Tensor, Tensor, float], Tensor],
    silu_mul: Callable[[Tensor, Tensor], Tensor],
) -> None:
    def normed(module: Any, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, module.weight, module.variance_epsilon)

    def fed_forward(module: Any, hidden: Tensor) -> Tensor:
        down: Tensor = module.down_proj(silu_mul(module.gate_proj(hidden), module.up_proj(hidden)))
        return down

    for layer in backbone.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = functools.partial(normed, norm)
        if backbone.config.hidden_act in ("silu", "swish"):
            layer.mlp.forward = functools.partial(fed_forward, layer.mlp)
