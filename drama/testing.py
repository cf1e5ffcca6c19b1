"""Helpers for tests of DRAMA and of what is built on it: tiny real models, real multi-rank runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte: every text in every language encodes and decodes."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_llama(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """Write a random Llama with grouped-query attention and a byte tokenizer; return `folder`.

    Defaults: 3 layers, width 64, 4 query and 2 key/value heads, FFN 96, vocabulary 260.
    """
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,  # wide enough that texts differ before training
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**(settings | config))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_deepspeed(
    script: Path, *arguments: str, num_ranks: int = 2, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `deepspeed --num_gpus N script arguments` on a free port and return what it printed.

    On a machine without GPU this starts gloo ranks on the CPU.
    """
    from drama.distributed import free_port  # imports DeepSpeed, which the data below do not need

    launcher = Path(sys.executable).with_name("deepspeed")
    command: Sequence[str] = [
        str(launcher), "--no_local_rank", "--num_gpus", str(num_ranks),
        "--master_port", str(free_port()),
        str(script), *arguments,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


class ContrastiveBatch(NamedTuple):
    """Vectors as after training, with duplicates: what `contrastive_batch` makes."""

    q_BD: Tensor
    k_ND: Tensor
    positive_B: Tensor
    ids_N: Tensor


def contrastive_batch(
    num_rows: int,
    num_columns: int,
    width: int,
    *,
    cosine: float = 0.67,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ContrastiveBatch:
    """Unnormalised queries whose positive has about this cosine, and documents of which two share
    an id on average; positives are drawn without repetition as far as they reach."""
    generator = torch.Generator().manual_seed(seed)
    k_ND = torch.randn(num_columns, width, generator=generator)
    drawn_N = torch.randperm(num_columns, generator=generator)
    positive_B = drawn_N.repeat(-(-num_rows // num_columns))[:num_rows]
    noise_BD = torch.randn(num_rows, width, generator=generator)
    q_BD = (k_ND[positive_B] + math.sqrt(cosine**-2 - 1) * noise_BD) * 3.0
    ids_N = torch.randint(0, max(2, num_columns // 2), (num_columns,), generator=generator)
    return ContrastiveBatch(
        q_BD.to(device, dtype), k_ND.to(device, dtype), positive_B.to(device), ids_N.to(device)
    )


class TokenBatch(NamedTuple):
    """Last states of a student and a teacher, their projections, next tokens: `token_batch`'s."""

    hidden_TD: Tensor
    weight_VD: Tensor
    target_T: Tensor
    teacher_hidden_TE: Tensor
    teacher_weight_VE: Tensor

    def teacher(self) -> dict[str, Tensor]:
        """The teacher's part as keywords of `linear_loss`."""
        return {
            "teacher_hidden_TE": self.teacher_hidden_TE,
            "teacher_weight_VE": self.teacher_weight_VE,
        }


def token_batch(
    num_tokens: int,
    vocabulary: int,
    width: int,
    teacher_width: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> TokenBatch:
    """Logits that differ by about 3; every other target is what its token likes best."""
    generator = torch.Generator().manual_seed(seed)
    states, projections = [], []
    for columns in (width, teacher_width):
        states.append(torch.randn(num_tokens, columns, generator=generator))
        projections.append(torch.randn(vocabulary, columns, generator=generator) * 3 / columns**0.5)
    target_T = torch.randint(vocabulary, (num_tokens,), generator=generator)
    target_T[::2] = (states[0][::2] @ projections[0].T).argmax(1)
    hidden_TD, teacher_hidden_TE = (x.to(device, dtype) for x in states)
    weight_VD, teacher_weight_VE = (x.to(device, dtype) for x in projections)
    return TokenBatch(
        hidden_TD, weight_VD, target_T.to(device), teacher_hidden_TE, teacher_weight_VE
    )


def token_gradients(
    function: Callable[..., Any], batch: TokenBatch, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, ...]:
    """Loss of a `linear_loss`-like function with the batch in `dtype`, its gradients of hidden and
    weight, then ce_T and kl_T; a teacher is part of it where `kl_weight` is among the options."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (batch.hidden_TD, batch.weight_VD)]
    if "kl_weight" in options:
        options |= {name: x.to(dtype) for name, x in batch.teacher().items()}
    loss, ce_T, kl_T = function(*inputs, batch.target_T, **options)
    losses = (ce_T,) if kl_T is None else (ce_T, kl_T)
    return loss.detach(), *torch.autograd.grad(loss, inputs), *losses


class PackedStates(NamedTuple):
    """Token states and a gradient to pool them with: what `packed_states` makes."""

    hidden_TD: Tensor
    cu_seqlens: Tensor
    weight_D: Tensor
    grad_BD: Tensor


def packed_states(
    lengths: Sequence[int],
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PackedStates:
    """Token states of sequences of these lengths, rows of very different sizes, and a norm's
    weight."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(sum(lengths), width, generator=generator)
    hidden_TD *= torch.rand(sum(lengths), 1, generator=generator) * 4
    weight_D = 1 + 0.3 * torch.randn(width, generator=generator)
    grad_BD = torch.randn(len(lengths), width, generator=generator)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    hidden_TD, weight_D, grad_BD = (x.to(device, dtype) for x in (hidden_TD, weight_D, grad_BD))
    return PackedStates(hidden_TD, cu_seqlens, weight_D, grad_BD)


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Output of `function` and gradients of its inputs, computed in `dtype`, as float64."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    output = function(*leaves)
    grads = torch.autograd.grad(output, leaves, grad.to(dtype))
    assert [output.dtype, *(x.dtype for x in grads)] == [dtype] * (1 + len(leaves))
    return [x.detach().double() for x in (output, *grads)]


def assert_as_exact(
    got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], floor: float = 1e-7
) -> None:
    """Hold `got` against float64: an error at most twice that of plain torch in the same dtype.

    Args:
        floor: what is forgiven, absolutely and as a part of the exact value's norm; 1e-7 is about a
            rounding to float32.
    """
    for number, (x, y, z) in enumerate(zip(got, plain, exact, strict=True)):
        error, allowed = (x - z).norm(), 2 * (y - z).norm() + floor * (1 + z.norm())
        assert error <= allowed, f"result {number}: {error:.3g} > {allowed:.3g}"


def loss_gradients(
    function: Callable[..., Any],
    q_BD: Tensor,
    k_ND: Tensor,
    positive_B: Tensor,
    *,
    temperature: float,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Loss of an `infonce`-like function, then its gradients: q, k and temperature."""
    inputs = [x.detach().clone().requires_grad_() for x in (q_BD, k_ND)]
    wide = torch.promote_types(q_BD.dtype, torch.float32)
    inputs.append(torch.tensor(temperature, dtype=wide, device=q_BD.device, requires_grad=True))
    loss = function(*inputs[:2], positive_B, temperature=inputs[2], **options)[0]
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want` (float64)."""
    return ((got.double() - want).norm() / want.norm()).item()


def run_alone(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A launcher without a launcher: one process, one rank."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
