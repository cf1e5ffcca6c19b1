"""Fused element-wise work in Hugging Face's blocks by Liger-Kernel's Triton kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from drama.errors import UserError


def has_liger() -> bool:
    """Whether Liger-Kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def choose_liger(wanted: str, device: torch.device) -> tuple[bool, str]:
    """Whether Liger-Kernel computes norm, SwiGLU and RoPE, and why; wanted: auto, on or off.

    Raises:
        UserError: on, where it cannot run.
    """
    if wanted == "off":
        return False, "step.liger: off"
    if device.type != "cuda":
        if wanted == "on":
            raise UserError("step.liger on: Liger-Kernel runs on CUDA, here is none; say auto")
        return False, f"no Liger-Kernel on {device.type}"
    if not has_liger():
        if wanted == "on":
            raise UserError("step.liger on: not installed; pip install liger-kernel, or say auto")
        return False, "liger_kernel is not installed"
    return True, "it is installed"


def use_liger(backbone: Any, device_type: str) -> None:
    """Let the blocks compute RMSNorm, SwiGLU and RoPE with Liger-Kernel on that type of device.

    Weights and parameter names stay. RoPE is a function of transformers' module, so it changes for
    all models of this architecture in this process; tensors of other devices take the old one.
    """
    ops = importlib.import_module("liger_kernel.ops")
    rope = importlib.import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb

    def rms_norm(module: Any, hidden: Tensor) -> Tensor:
        # casts as Llama does; not in place: a kept graph may still need the incoming gradient
        normed: Tensor = ops.LigerRMSNormFunction.apply(
            hidden, module.weight, module.variance_epsilon, 0.0, "llama", False
        )
        return normed

    def swiglu(module: Any, hidden: Tensor) -> Tensor:
        gated = ops.LigerSiLUMulFunction.apply(module.gate_proj(hidden), module.up_proj(hidden))
        down: Tensor = module.down_proj(gated)
        return down

    for layer in backbone.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = functools.partial(rms_norm, norm)
        if backbone.config.hidden_act in ("silu", "swish"):
            layer.mlp.forward = functools.partial(swiglu, layer.mlp)
    modeling: Any = sys.modules[type(backbone.layers[0].self_attn).__module__]
    plain = modeling.apply_rotary_pos_emb
    if hasattr(plain, "without_liger"):  # an earlier model has done it
        return

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        chosen = rope if q.device.type == device_type else plain
        return chosen(q, k, cos, sin, **options)

    rotate.without_liger = plain  # type: ignore[attr-defined]
    modeling.apply_rotary_pos_emb = rotate
