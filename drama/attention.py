"""Attention over packed sequences: one function, one back end chosen per device.

    CUDA, flash-attn installed    flash_attn_varlen_func
    CUDA                          torch.nn.attention.varlen (torch >= 2.11; flash attention inside);
                                  on Hopper, runs of texts of one length by cuDNN
    CPU in bf16, training         blocks of scores, where the CPU has instructions for bf16
    CPU, and CUDA in float32      scaled_dot_product_attention, sequence by sequence

It is registered with transformers under the name `drama_varlen`, so Hugging Face's own blocks call
it. Without a packed layout (a padded batch through the model's own `forward`) it is plain SDPA.

T packed tokens, B sequences, H query heads, G key/value heads, E head width.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from drama.block_attention import block_attention, has_bf16_instructions

ATTENTION_NAME = "drama_varlen"
DENSE_WORK = 2**22  # pairs of tokens for which a launch of their own is nothing
DENSE_STEP = 128  # cuDNN plans anew for every shape: lengths at which texts are cut, not any


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a packed batch lie.

    cu_seqlens: int32 [B + 1] on the model's device. lengths: the same on the host. last_query: only
    the last token of every sequence asks, so that there are B queries; it sees all keys of its
    sequence, causal or not.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    causal: bool
    last_query: bool = False

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @functools.cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Lengths, and how many neighbours have each."""
        return [(length, len(list(group))) for length, group in itertools.groupby(self.lengths)]

    @functools.cached_property
    def parts(self) -> list[tuple[int | None, PackedLayout]]:
        """Runs of texts of one length with at least `DENSE_WORK` pairs of tokens, by that length,
        and what lies between them, by None.

        Lengths are multiples of `DENSE_STEP` and counts powers of two, so that few shapes occur.
        """
        pieces: list[tuple[int | None, list[int]]] = []
        for length, count in self.runs:
            left = count
            while left and length % DENSE_STEP == 0:
                power = 2 ** (left.bit_length() - 1)
                if length**2 * power < DENSE_WORK:
                    break
                pieces.append((length, [length] * power))
                left -= power
            if left and (not pieces or pieces[-1][0] is not None):
                pieces.append((None, []))
            if left:
                pieces[-1][1].extend([length] * left)
        parts: list[tuple[int | None, PackedLayout]] = []
        first = 0
        for dense, lengths in pieces:
            cu_seqlens = self.cu_seqlens[first : first + len(lengths) + 1]
            if dense is None:  # nothing else reads them
                cu_seqlens = cu_seqlens - cu_seqlens[0]
            parts.append((dense, replace(self, cu_seqlens=cu_seqlens, lengths=tuple(lengths))))
            first += len(lengths)
        return parts

    @property
    def cu_queries(self) -> Tensor:
        """int32 [B + 1], where every sequence's queries lie."""
        if not self.last_query:
            return self.cu_seqlens
        return torch.arange(len(self.cu_seqlens), dtype=torch.int32, device=self.cu_seqlens.device)

    @property
    def max_queries(self) -> int:
        return 1 if self.last_query else self.max_seqlen


@functools.cache
def choose_backend(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """The attention back end of a device type and dtype, and why it is that one."""
    if device_type == "cpu" and dtype == torch.bfloat16 and has_bf16_instructions():
        return "blocks of scores", "products by the CPU's bf16 instructions"
    if device_type != "cuda":
        return "sdpa per sequence", "no varlen kernel for this device"
    if dtype not in (torch.bfloat16, torch.float16):
        return "sdpa per sequence", "the varlen kernels take 16-bit types only"
    try:
        importlib.import_module("flash_attn").flash_attn_varlen_func  # noqa: B018
    except (ImportError, AttributeError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError)
        why = "is not installed" if absent else f"cannot be used: {str(error).splitlines()[0]}"
        runs = "; long runs of one length: cuDNN" if _is_hopper(torch.device("cuda")) else ""
        return "torch varlen", f"flash_attn {why}{runs}"
    return "flash-attn varlen", "flash_attn is installed"


def varlen_attention(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    """Attention of every packed sequence over itself alone; returns the shape of the queries.

    H is a multiple of G. Causal or bidirectional as the layout says; with its `last_query` the
    queries are [B, H, E].
    """
    if layout.causal and layout.last_query:
        layout = replace(layout, causal=False)
    choice, _ = choose_backend(q_THE.device.type, q_THE.dtype)
    if choice == "flash-attn varlen":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q_THE, k_TGE, v_TGE,
            layout.cu_queries, layout.cu_seqlens, layout.max_queries, layout.max_seqlen,
            softmax_scale=scale, causal=layout.causal,
        )  # fmt: skip
    if choice == "torch varlen":
        if layout.last_query or not _is_hopper(q_THE.device):
            return _torch_varlen(q_THE, k_TGE, v_TGE, layout, scale)
        return _by_run(q_THE, k_TGE, v_TGE, layout, scale)
    # threads encode beside each other, in inference mode, and the blocks' setting is the process's
    in_training = not torch.is_inference_mode_enabled()
    if choice == "blocks of scores" and in_training and not layout.last_query:
        return block_attention(q_THE, k_TGE, v_TGE, layout.runs, causal=layout.causal, scale=scale)
    return _sdpa_per_sequence(q_THE, k_TGE, v_TGE, layout, scale)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Where cuDNN's attention is the faster one: FlashAttention 2 was written for Ampere."""
    if not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9 and torch.backends.cudnn.is_available()


def _by_run(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    """Long runs of texts of one length as dense batches by cuDNN, what lies between by the varlen
    kernel. Texts cut at the longest length make such runs, and so does any text of 8k tokens."""
    if all(length is None for length, _ in layout.parts):
        return _torch_varlen(q_THE, k_TGE, v_TGE, layout, scale)
    sizes = [sum(part.lengths) for _, part in layout.parts]
    split = [_parts(x, sizes) for x in (q_THE, k_TGE, v_TGE)]
    outputs = []
    for (length, part), q_THE, k_TGE, v_TGE in zip(layout.parts, *split, strict=True):
        if length is None:
            outputs.append(_torch_varlen(q_THE, k_TGE, v_TGE, part, scale))
            continue
        # contiguous: strides are part of what cuDNN plans for
        q, k, v = (
            x.contiguous().view(-1, length, *x.shape[1:]).transpose(1, 2)
            for x in (q_THE, k_TGE, v_TGE)
        )
        ways = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        with sdpa_kernel(ways, set_priority=True):
            out = F.scaled_dot_product_attention(
                q, k, v, scale=scale, is_causal=layout.causal, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _torch_varlen(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if _varlen_declares_gqa():
        options: dict[str, Any] = {"enable_gqa": True}
    else:  # torch 2.11 has no flag for it: repeat the heads
        options = {}
        group = q_THE.shape[1] // k_TGE.shape[1]
        k_TGE, v_TGE = (x.repeat_interleave(group, 1) for x in (k_TGE, v_TGE))
    window = (-1, 0) if layout.causal else (-1, -1)
    out = varlen_attn(
        q_THE, k_TGE, v_TGE,
        layout.cu_queries, layout.cu_seqlens, layout.max_queries, layout.max_seqlen,
        scale=scale, window_size=window, **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)  # a pair only where the logsumexp is asked for
    return out


@functools.cache
def _varlen_declares_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _sdpa_per_sequence(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    """Neighbours of equal length share one call; sorting by length makes long runs of them.

    On a CPU in float32 whatever the type: torch's kernel for 16 bits is slower there, and less
    exact.
    """
    dtype = q_THE.dtype
    if q_THE.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        q_THE, k_TGE, v_TGE = q_THE.float(), k_TGE.float(), v_TGE.float()
    if q_THE.is_cuda:  # the kernel with linear memory takes no groups in float32
        group = q_THE.shape[1] // k_TGE.shape[1]
        k_TGE, v_TGE = (x.repeat_interleave(group, 1) for x in (k_TGE, v_TGE))
    runs = layout.runs
    sizes = [length * count for length, count in runs]
    query_sizes = [count for _, count in runs] if layout.last_query else sizes
    outputs = []
    parts = (_parts(q_THE, query_sizes), _parts(k_TGE, sizes), _parts(v_TGE, sizes))
    for (_, count), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (x.view(count, -1, *x.shape[1:]).transpose(1, 2) for x in qkv)
        if layout.last_query:
            outputs.append(_one_query(q, k, v, scale))
            continue
        out = F.scaled_dot_product_attention(
            q, k, v, scale=scale, is_causal=layout.causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    out_THE = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out_THE.to(dtype)


def _parts(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return (x,) if len(sizes) == 1 else torch.split_with_sizes(x, sizes)


def _one_query(q_CH1E: Tensor, k_CGLE: Tensor, v_CGLE: Tensor, scale: float) -> Tensor:
    """One query a sequence over all its keys; returns [C, H, E], C sequences of L tokens.

    Plain products: torch's CPU kernel splits the keys among the threads here, and gives other bits
    with another number of threads. Laid out anew: the products of strided keys give other bits for
    one sequence than for several.
    """
    k_CGLE, v_CGLE = k_CGLE.contiguous(), v_CGLE.contiguous()
    q_CGRE = q_CH1E[:, :, 0].unflatten(1, (k_CGLE.shape[1], -1))
    p_CGRL = torch.softmax(q_CGRE @ k_CGLE.mT * scale, -1)
    return (p_CGRL @ v_CGLE).flatten(1, 2)


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [1, H, T, E] in, [1, T, H, E] out."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    assert scaling is not None
    q_THE, k_TGE, v_TGE = (x[0].transpose(0, 1) for x in (query, key, value))
    return varlen_attention(q_THE, k_TGE, v_TGE, layout, scaling)[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)
