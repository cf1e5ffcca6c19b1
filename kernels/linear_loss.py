"""Next-token cross-entropy and distillation from a teacher's logits, without any [T, V] logits.

    z = hidden weight^T        y = teacher_hidden teacher_weight^T
    ce_t = -log softmax(z_t)[target_t]
    kl_t = temperature^2 KL(softmax(y_t / temperature) || softmax(z_t / temperature))
    loss = sum_t ce_weight ce_t + kl_weight kl_t
    dz_t = ce_weight (softmax(z_t) - onehot) + kl_weight temperature (s_t - q_t)

with s and q the student's and the teacher's softmax at the temperature; at 1 one softmax of the
student serves both. Chunks of rows see all their columns before their gradient is formed, so the
student takes three matrix products (z, dhidden = dz weight, dweight = dz^T hidden), 2 T V D FLOP
each, and the teacher one, 2 T V E: nothing is computed twice. The gradient is formed in the
forward pass and only scaled in the backward pass.

Saved: the gradients that are wanted, T*D + V*D elements of the inputs' dtypes (float32 for fp16).
Beside them, while it runs: one buffer of logits, with a teacher two, of 64 MiB each on a CPU and
512 MiB on a GPU (float32; or of one row, where that is more), whatever T and V; dweight in
float32, V*D; on a CPU float32 copies of 16-bit weights. Bytes moved: in the back ends' files.

Back ends, chosen in `choose_backend` and nowhere else:

    triton     CUDA and ROCm: linear_loss_triton.py
    torch      any device: linear_loss_torch.py, which also has the chunks and products of both
    reference  all logits by autograd in float64: linear_loss_reference.py

T tokens, V vocabulary, D student width, E teacher width.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drama.kernels import linear_loss_torch
from drama.kernels.linear_loss_reference import LinearLossOutput, linear_loss_reference
from drama.kernels.linear_loss_torch import Evaluation, Problem
from drama.kernels.saved_gradients import saved_dtype, scaled

Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS = ("auto", "triton", "torch", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    teacher_hidden_TE: Tensor | None = None,
    teacher_weight_VE: Tensor | None = None,
    temperature: float = 1.0,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    backend: Backend = "auto",
) -> LinearLossOutput:
    """Sum over T tokens of cross-entropy and of the divergence from a teacher (Hinton et al. 2015).

    A sum, not a mean: divide by the tokens of the global batch, which one rank does not know.

    Args:
        hidden_TD, weight_VD: last hidden states and output projection (no bias), any strides, both
            of one of float64, float32, bf16 and fp16. T may be 0.
        target_T: int64, the next token's number. Every row counts: select those that have a next
            token. Numbers out of range are refused on a CPU; on a GPU, which nothing waits for,
            `triton` makes their loss NaN and `torch` ends with CUDA's own error.
        teacher_hidden_TE, teacher_weight_VE: both or neither; width and dtype may differ from the
            student's, the vocabulary may not. They get no gradient.
        temperature: of the divergence alone.
        ce_weight, kl_weight: 0 or more. What has weight 0 is still reported.
        backend: "auto" chooses by device.

    Returns:
        loss, float32 (float64 for float64 inputs), and for every token ce_T and kl_T, without
        gradients. kl_T is never below 0, and a small one is off by about a rounding of the logits
        times its square root. The gradient cannot be differentiated again, and torch.compile's
        graph breaks here.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit, an unknown or absent back
            end.
    """
    _check_student(hidden_TD, weight_VD, target_T)
    teacher = _checked_teacher(hidden_TD, weight_VD, teacher_hidden_TE, teacher_weight_VE)
    _check_numbers(temperature, ce_weight, kl_weight, has_teacher=teacher[0] is not None)
    chosen = choose_backend(backend, hidden_TD)
    numbers = (float(temperature), float(ce_weight), float(kl_weight))
    if chosen == "reference":
        return _reference(hidden_TD, weight_VD, target_T, teacher, numbers)
    wants = (torch.is_grad_enabled() and x.requires_grad for x in (hidden_TD, weight_VD))
    options = (*teacher, *numbers, *wants)
    arguments = (hidden_TD, weight_VD, target_T, options, chosen)
    if torch.compiler.is_compiling():  # not a decorator, which imports the compiler for everybody
        return torch.compiler.disable(_eager)(*arguments)
    return _eager(*arguments)


def choose_backend(backend: Backend, hidden_TD: Tensor) -> str:
    """The back end that `backend` means for these inputs; "auto" is settled here.

    Raises:
        ValueError: an unknown back end, or "triton" where it is not installed or for float64.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("triton") is not None
    if backend == "triton" and not installed:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if backend == "triton" and hidden_TD.dtype == torch.float64:
        raise ValueError("backend 'triton' takes no float64; use 'torch'")
    if backend != "auto":
        return backend
    on_gpu = hidden_TD.is_cuda and hidden_TD.dtype != torch.float64
    return "triton" if on_gpu and installed else "torch"


def _check_student(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> None:
    _check_pair("", hidden_TD, weight_VD)
    if target_T.shape != hidden_TD.shape[:1] or target_T.dtype != torch.int64:
        raise ValueError(
            f"target is {target_T.dtype} of shape {tuple(target_T.shape)}, expected int64 "
            f"[{len(hidden_TD)}]"
        )
    if target_T.device != hidden_TD.device:
        raise ValueError(f"target is on {target_T.device} and hidden on {hidden_TD.device}")
    if target_T.device.type == "cpu" and len(target_T):
        first, last = (int(x) for x in torch.aminmax(target_T))
        if first < 0 or last >= len(weight_VD):
            raise ValueError(f"target holds {first} to {last}, expected 0 to {len(weight_VD) - 1}")


def _checked_teacher(
    hidden_TD: Tensor, weight_VD: Tensor, teacher_hidden: Tensor | None, teacher: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if teacher_hidden is None and teacher is None:
        return None, None
    if teacher_hidden is None or teacher is None:
        raise ValueError("teacher_hidden and teacher_weight go together; one is missing")
    _check_pair("teacher_", teacher_hidden, teacher)
    if len(teacher_hidden) != len(hidden_TD) or len(teacher) != len(weight_VD):
        raise ValueError(
            f"the teacher has {len(teacher_hidden)} tokens and a vocabulary of {len(teacher)}, the "
            f"student {len(hidden_TD)} and {len(weight_VD)}"
        )
    if teacher.device != weight_VD.device:
        raise ValueError(f"the teacher is on {teacher.device}, the student on {weight_VD.device}")
    if teacher.dtype == torch.float64 != hidden_TD.dtype:
        raise ValueError(f"the teacher is float64, the student only {hidden_TD.dtype}")
    return teacher_hidden.detach(), teacher.detach()


def _check_pair(name: str, hidden: Tensor, weight: Tensor) -> None:
    """States [T, D] and a projection [V, D]."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}hidden {tuple(hidden.shape)} and {name}weight {tuple(weight.shape)} must be "
            "[T, D], [V, D]"
        )
    if not weight.numel():
        raise ValueError(f"{name}weight {tuple(weight.shape)} must not be empty")
    if hidden.dtype not in DTYPES or hidden.dtype != weight.dtype:
        raise ValueError(
            f"{name}hidden is {hidden.dtype} and {name}weight {weight.dtype}; both must be of one "
            "float type"
        )
    if hidden.device != weight.device:
        raise ValueError(
            f"{name}hidden is on {hidden.device} and {name}weight on {weight.device}; both must be "
            "on one"
        )


def _check_numbers(
    temperature: float, ce_weight: float, kl_weight: float, *, has_teacher: bool
) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
    for name, weight in (("ce_weight", ce_weight), ("kl_weight", kl_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight}, expected a number from 0 up")
    if kl_weight and not has_teacher:
        raise ValueError(f"kl_weight is {kl_weight}, and there is no teacher")


def _reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    teacher: tuple[Tensor | None, Tensor | None],
    numbers: tuple[float, float, float],
) -> LinearLossOutput:
    """In float64, reported like every back end."""
    teacher_hidden_TE, teacher_weight_VE = (None if x is None else x.double() for x in teacher)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        loss, ce_T, kl_T = linear_loss_reference(
            *(hidden_TD.double(), weight_VD.double(), target_T),
            teacher_hidden_TE=teacher_hidden_TE,
            teacher_weight_VE=teacher_weight_VE,
            temperature=numbers[0],
            ce_weight=numbers[1],
            kl_weight=numbers[2],
        )
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    return LinearLossOutput(
        loss.to(dtype), ce_T.to(dtype), None if kl_T is None else kl_T.to(dtype)
    )


def _evaluate(problem: Problem, backend: str) -> Evaluation:
    if backend != "triton":
        return linear_loss_torch.evaluate(problem)
    linear_loss_triton = importlib.import_module("drama.kernels.linear_loss_triton")  # needs triton
    done: Evaluation = linear_loss_triton.evaluate(problem)
    return done


def _eager(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    options: tuple[Any, ...],
    backend: str,
) -> LinearLossOutput:
    losses: list[Tensor | None] = []
    loss = _LinearLoss.apply(hidden_TD, weight_VD, target_T, options, backend, losses)
    ce_T, kl_T = losses
    assert ce_T is not None
    return LinearLossOutput(loss, ce_T, kl_T)


class _LinearLoss(torch.autograd.Function):
    """The loss as the only output; ce_T and kl_T are appended to a list."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        target_T: Tensor,
        options: tuple[Any, ...],
        backend: str,
        losses: list[Tensor | None],
    ) -> Tensor:
        problem = Problem(hidden_TD, weight_VD, target_T, *options)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            done = _evaluate(problem, backend)
        losses += done.ce_T, done.kl_T
        ctx.save_for_backward(
            *(
                None if grad is None else grad.to(saved_dtype(x))
                for grad, x in ((done.dhidden_TD, hidden_TD), (done.dweight_VD, weight_VD))
            )
        )
        ctx.dtype = hidden_TD.dtype
        loss = done.ce_T.new_zeros(())
        # a part of weight 0 may be infinite
        for weight, part_T in ((problem.ce_weight, done.ce_T), (problem.kl_weight, done.kl_T)):
            if weight and part_T is not None:
                loss += weight * part_T.sum()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if grad is None else scaled(grad, grad_loss, ctx.dtype)
            for grad in ctx.saved_tensors
        )
        return *gradients, None, None, None, None
