"""Final norm and pooling of packed token states in one step: one row per sequence.

With the RMSNorm's weight w and r_t = rsqrt(mean(h_t^2) + eps):

    last    m_b = h_t r_t at the last token t of b, rounded to the input's dtype
    mean    m_b = mean over the tokens t of b of h_t r_t, never rounded
    both    y_b = m_b w        z_b = y_b / max(|y_b|, 1e-12) with `normalize`, else y_b

Without a weight there is no norm: r_t = 1 and w = 1. Backward, with s_b = 1 / |y_b|:

    dy_b = s_b (dz_b - z_b (z_b . dz_b))         dw = sum_b dy_b m_b        dm_b = dy_b w
    dh_t = r_t (g_t - h_t r_t mean(g_t h_t r_t)) with g_t = dm_b at the last token and 0 elsewhere,
                                                 or g_t = dm_b / length_b

All of it in float32 (float64 for float64 inputs), whatever the input's dtype. "last" rounds where
`LlamaRMSNorm` of transformers does: h_t r_t, then the product with w. "mean" does not: transformers
rounds both before the mean, here only the result is rounded. The error is smaller, and the normed
T x D tensor need not exist. `normalize` works on the unrounded y.

T packed tokens, B sequences, D width. What is saved besides the inputs, and what moves:

             saved                          forward              backward
    last     rstd_B, inverse_norm_B         B*D read             T*D written (zeros, then B rows)
    mean     rstd_T, inverse_norm_B,        T*D read             T*D read, T*D written
             mean_BD in float32

Back ends, chosen in `choose_backend` and nowhere else: `triton` on CUDA and ROCm
(pool_triton.py, one kernel each way), `torch` anywhere (pool_torch.py; on a GPU its "mean" waits
for `cu_seqlens`). Neither makes a normed T x D tensor, and both give the same bits when run again.
"""

from __future__ import annotations

import importlib
import importlib.util
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drama.kernels.pool_reference import rms_norm
from drama.kernels.pool_torch import accumulation_dtype

Backend = Literal["auto", "triton", "torch"]
BACKENDS = ("auto", "triton", "torch")
Pooling = Literal["last", "mean"]
MAX_TRITON_WIDTH = 4096  # a row lies in one program's registers


def pool_last(
    hidden_TD: Tensor,
    cu_seqlens: Tensor,
    weight_D: Tensor | None = None,
    *,
    eps: float = 1e-6,
    normalize: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Return the last token's state of every sequence, [B, D], in the dtype of `hidden_TD`.

    Args:
        hidden_TD: any float dtype and strides.
        cu_seqlens: int32 or int64 [B + 1], cumulative lengths from 0 to T, every length at least 1.
        weight_D: RMSNorm with this weight and `eps` is applied to what is pooled.
        normalize: divide by the L2 norm.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown or absent back end; on the CPU also
            an empty sequence.
    """
    _check(hidden_TD, cu_seqlens, weight_D)
    return _pool(hidden_TD, cu_seqlens, weight_D, "last", eps, normalize, backend)[0]


def pool_mean(
    hidden_TD: Tensor,
    cu_seqlens: Tensor,
    weight_D: Tensor | None = None,
    *,
    eps: float = 1e-6,
    normalize: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Return the mean state of every sequence, [B, D]: of the normed states, where `weight_D` is
    given. Arguments and errors as in `pool_last`."""
    _check(hidden_TD, cu_seqlens, weight_D)
    return _pool(hidden_TD, cu_seqlens, weight_D, "mean", eps, normalize, backend)[0]


class PooledNorm(nn.Module):
    """A model's final RMSNorm that also pools.

    Takes the weight over from the model's own norm: the same parameter under the same name. It is
    read in this module's forward, since under ZeRO-3 a weight is empty outside of it.
    """

    def __init__(self, norm: Any, pooling: Pooling, *, normalize: bool = False) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon
        self.pooling, self.normalize = pooling, normalize

    def forward(self, hidden: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Pool packed states [T, D] to [B, D]; without `cu_seqlens` only norm, any shape."""
        if cu_seqlens is None:
            return rms_norm(hidden, self.weight, self.variance_epsilon)
        pool = pool_last if self.pooling == "last" else pool_mean
        return pool(
            hidden, cu_seqlens, self.weight, eps=self.variance_epsilon, normalize=self.normalize
        )

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}, pooling={self.pooling}, "
            f"normalize={self.normalize}"
        )


def choose_backend(backend: str, hidden_TD: Tensor) -> str:
    """The back end that `backend` means for this input; "auto" is settled here.

    Raises:
        ValueError: an unknown back end, or "triton" where it is not installed or cannot do it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("triton") is not None
    able = hidden_TD.dtype != torch.float64 and hidden_TD.shape[1] <= MAX_TRITON_WIDTH
    if backend == "triton" and not installed:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if backend == "triton" and not able:
        raise ValueError(
            f"backend 'triton' takes widths up to {MAX_TRITON_WIDTH} and no float64, not "
            f"{hidden_TD.dtype} of width {hidden_TD.shape[1]}; use 'torch'"
        )
    if backend != "auto":
        return backend
    return "triton" if hidden_TD.device.type == "cuda" and installed and able else "torch"


def _check(hidden_TD: Tensor, cu_seqlens: Tensor, weight_D: Tensor | None) -> None:
    if hidden_TD.ndim != 2 or not hidden_TD.is_floating_point():
        raise ValueError(
            f"hidden is {hidden_TD.dtype} of shape {tuple(hidden_TD.shape)}, expected floats [T, D]"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, expected "
            "int32 or int64 [B + 1]"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        whole = len(bounds) > 1 and bounds[0] == 0 and bounds[-1] == len(hidden_TD)
        if not whole or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(
                f"cu_seqlens must ascend from 0 to {len(hidden_TD)} tokens, no sequence empty"
            )
    if weight_D is not None and weight_D.shape != hidden_TD.shape[1:]:
        raise ValueError(
            f"weight has shape {tuple(weight_D.shape)}, expected [{hidden_TD.shape[1]}]"
        )


# -- one operator for autograd and torch.compile --------------------------------------------------


def _module(backend: str, hidden_TD: Tensor) -> Any:
    """The module with `forward` and `backward`; Triton's is imported only where it is used."""
    return importlib.import_module(f"drama.kernels.pool_{choose_backend(backend, hidden_TD)}")


@torch.library.custom_op("drama::pool", mutates_args=())
def _pool(
    hidden_TD: Tensor,
    cu_seqlens: Tensor,
    weight_D: Tensor | None,
    pooling: str,
    eps: float,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pooled rows, then what the backward pass needs: rstd, inverse norms, means."""
    arguments = (hidden_TD, cu_seqlens, weight_D, pooling, eps, normalize)
    out_BD, rstd, inverse_B, mean_BD = _module(backend, hidden_TD).forward(*arguments)
    return out_BD, rstd, inverse_B, mean_BD


@torch.library.custom_op("drama::pool_backward", mutates_args=())
def _pool_backward(
    grad_BD: Tensor,
    hidden_TD: Tensor,
    cu_seqlens: Tensor,
    weight_D: Tensor | None,
    rstd: Tensor,
    inverse_B: Tensor,
    mean_BD: Tensor,
    pooling: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (grad_BD, hidden_TD, cu_seqlens, weight_D, rstd, inverse_B, mean_BD, pooling)
    dh_TD, dw_D = _module(backend, hidden_TD).backward(*arguments)
    return dh_TD, dw_D


@_pool.register_fake
def _(
    hidden_TD: Tensor,
    cu_seqlens: Tensor,
    weight_D: Tensor | None,
    pooling: str,
    eps: float,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (num_tokens, width), num_rows = hidden_TD.shape, len(cu_seqlens) - 1
    num_normed = 0 if weight_D is None else num_rows if pooling == "last" else num_tokens
    shapes = ((num_normed,), (num_rows if normalize else 0,))
    with_mean = pooling == "mean" and (weight_D is not None or normalize)
    mean_shape = (num_rows, width) if with_mean else (0,)
    wide = accumulation_dtype(hidden_TD)
    rstd, inverse, mean = (hidden_TD.new_empty(s, dtype=wide) for s in (*shapes, mean_shape))
    return hidden_TD.new_empty((num_rows, width)), rstd, inverse, mean


@_pool_backward.register_fake
def _(
    grad_BD: Tensor, hidden_TD: Tensor, cu_seqlens: Tensor, weight_D: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    dw_D = hidden_TD.new_empty(0) if weight_D is None else torch.empty_like(weight_D)
    return hidden_TD.new_empty(hidden_TD.shape), dw_D


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_TD, cu_seqlens, weight_D, ctx.pooling, _, _, ctx.backend = inputs
    ctx.save_for_backward(hidden_TD, cu_seqlens, weight_D, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_BD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_BD is None:
        return (None,) * 7
    dh_TD, dw_D = _pool_backward(grad_BD, *ctx.saved_tensors, ctx.pooling, ctx.backend)
    return (dh_TD, None, dw_D if ctx.saved_tensors[2] is not None else None, *[None] * 4)


_pool.register_autograd(_backward, setup_context=_save)
