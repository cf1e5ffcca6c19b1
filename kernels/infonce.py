"""InfoNCE without the matrix: exact loss and gradients, all Matryoshka prefixes at once.

For prefix p of width d_p, with row norms a = |q[:d_p]| and column norms b = |k[:d_p]|:

    z_ij = q_i[:d_p] . k_j[:d_p] / (a_i b_j temperature)
    loss = mean_i sum_p w_p (logsumexp_j z_ij - z_i,pos(i))
    G    = w_p / B (softmax(z) - onehot)                          masked columns have G = 0

The product is accumulated segment by segment, so prefix p is read when the first p segments are in.
With Gs_p = G_p / (a_p b_p temperature) and H_j = sum_{p >= j} Gs_p, segment j of the gradient is

    dq = H_j  k_segment - q_segment sum_{p >= j} rowsum(G_p z_p) / a_p^2      (and the same for dk)

All prefixes therefore cost the three GEMMs of the widest one (2*B*N*D FLOP each; four with
`symmetric`). The gradient is formed in the forward pass and only scaled in the backward pass, so
the backward pass saves the gradients themselves, B*D + N*D elements of the inputs' dtypes (float32
for fp16, whose range a gradient leaves before it is scaled).
Accumulation and softmax are float32 (float64 for float64 inputs): logits are never rounded to a
narrower type before exp.

Back ends, chosen in `choose_backend` and nowhere else:

    triton     CUDA and ROCm: infonce_triton.py
    torch      row chunks on any device: infonce_torch.py; work memory is constant
    plain      the whole matrix: infonce_plain.py; faster where it is small
    reference  the whole matrix by autograd in float64: infonce_reference.py

B queries, N documents (columns), D width, P prefixes.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drama.kernels import infonce_plain, infonce_torch
from drama.kernels.infonce_problem import Evaluation, Problem, owners
from drama.kernels.infonce_reference import InfoNCEOutput, infonce_reference
from drama.kernels.saved_gradients import saved_dtype, scaled

Backend = Literal["auto", "triton", "torch", "plain", "reference"]
BACKENDS = ("auto", "triton", "torch", "plain", "reference")
# up to so many logits the plain matrix is faster (benchmarks/kernels.csv); on a GPU launching is
# what takes the time
PLAIN_ELEMENTS = {"cpu": 2**18, "cuda": 2**22}
HAS_TRITON = importlib.util.find_spec("triton") is not None


def infonce(
    q_BD: Tensor,
    k_ND: Tensor,
    positive_B: Tensor,
    *,
    temperature: float | Tensor,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    k_ids_N: Tensor | None = None,
    margin: float | None = None,
    own_negatives: bool | Tensor = False,
    symmetric: bool = False,
    backend: Backend = "auto",
) -> InfoNCEOutput:
    """Contrastive loss of B queries against N documents, cosine similarity (DRAMA section 3.1).

    Args:
        q_BD, k_ND: unnormalised, any float dtype and strides, same device. Norms up to 1e18, since
            squares are float32 (float64's: 1e150); below 1e-12 they count as 1e-12.
        positive_B: int64, the column of each row's positive; on a GPU its range is not checked.
        temperature: logits are cosine / temperature; a 0-dim tensor gets its gradient too.
        prefixes: Matryoshka widths, ascending, at most D; default (D,).
        prefix_weights: one factor per prefix; default 1.
        k_ids_N: int64 document ids; columns other than the positive that carry the positive's id
            are no negatives.
        margin: in cosine; columns scoring above positive + margin are no negatives. The positive
            is never left out. A copy of the positive scores the same but for rounding: at margin 0
            chance decides, ids do not leave it to chance.
        own_negatives: columns that are no row's positive count for their own row only. True: they
            belong to the row of the nearest positive before them, as where documents are laid out
            row by row, positive first (any number of negatives each). An int64 tensor [N] says it
            outright: the row's number, or -1 for a column that counts for every row.
        symmetric: mean of this loss and of the same in the other direction: each positive is to
            find its row among the rows that it is a negative for. What is left out of the rows is
            left out of the columns too, and so is another row with the same positive.
        backend: "auto" chooses by device and size.

    A row with nothing but its positive has loss 0 and gradient 0. The gradient cannot be
    differentiated again.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit, an unknown or absent back
            end.
    """
    _check_vectors(q_BD, k_ND)
    _check_indices("positive", positive_B, q_BD.shape[:1], q_BD.device)
    for name, index in (("k_ids", k_ids_N), ("own_negatives", own_negatives)):
        if isinstance(index, Tensor):
            _check_indices(name, index, k_ND.shape[:1], q_BD.device)
        elif index is not None and not isinstance(index, bool):
            raise ValueError(f"{name} is {index!r}, expected an int64 tensor [{len(k_ND)}]")
    if own_negatives is None:
        raise ValueError("own_negatives is None, expected False, True or an int64 tensor")
    widths, weights = _check_prefixes(q_BD.shape[1], prefixes, prefix_weights)
    _check_numbers(temperature, margin, q_BD.device)
    chosen = choose_backend(backend, q_BD, len(k_ND))
    if chosen == "reference":
        _check_range(positive_B, len(k_ND))
        with torch.autocast(q_BD.device.type, enabled=False):
            output = infonce_reference(
                *(q_BD.double(), k_ND.double(), positive_B),
                temperature=temperature,
                prefixes=widths,
                prefix_weights=weights,
                k_ids_N=k_ids_N,
                margin=margin,
                own_negatives=own_negatives,
                symmetric=symmetric,
            )
        loss, loss_P, lse_PB, score_PB = (x.to(_accumulation_dtype(q_BD)) for x in output[:4])
        return InfoNCEOutput(loss, loss_P, lse_PB, score_PB, output.num_masked_B)
    if not isinstance(temperature, Tensor):
        dtype = _accumulation_dtype(q_BD)
        temperature = torch.full((), temperature, dtype=dtype, device=q_BD.device)
    owner_N = None
    if own_negatives is not False:
        owner_N = owners(positive_B, len(k_ND)) if own_negatives is True else own_negatives
    inputs = (q_BD, k_ND, temperature)
    with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    options = (
        *(widths, weights, k_ids_N, margin, owner_N, symmetric, chosen, with_gradient),
        temperature.requires_grad,
    )
    if torch.compiler.is_compiling():
        return InfoNCEOutput(*_infonce(q_BD, k_ND, positive_B, temperature, *options)[:5])
    # not the operator: for a small matrix its bookkeeping costs more than the matrix
    statistics: list[Tensor] = []
    try:
        loss = _Eager.apply(q_BD, k_ND, positive_B, temperature, options, statistics)
    except (RuntimeError, IndexError):
        _check_range(positive_B, len(k_ND))  # torch has looked, on a CPU; here it gets a name
        raise
    return InfoNCEOutput(loss, *statistics)


def choose_backend(backend: Backend, q_BD: Tensor, num_columns: int) -> str:
    """The back end that `backend` means for these inputs; "auto" is settled here.

    Raises:
        ValueError: an unknown back end, or "triton" where it is not installed or for float64.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if backend == "triton" and q_BD.dtype == torch.float64:
        raise ValueError("backend 'triton' takes no float64; use 'torch'")
    if backend != "auto":
        return backend
    if len(q_BD) * num_columns <= PLAIN_ELEMENTS.get(q_BD.device.type, 0):
        return "plain"
    on_gpu = q_BD.device.type == "cuda" and q_BD.dtype != torch.float64
    return "triton" if on_gpu and HAS_TRITON else "torch"


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_vectors(q_BD: Tensor, k_ND: Tensor) -> None:
    if q_BD.ndim != 2 or k_ND.ndim != 2 or q_BD.shape[1] != k_ND.shape[1]:
        raise ValueError(f"q {tuple(q_BD.shape)} and k {tuple(k_ND.shape)} must be [B, D], [N, D]")
    if not q_BD.numel() or not k_ND.numel():
        raise ValueError(f"q {tuple(q_BD.shape)} and k {tuple(k_ND.shape)} must not be empty")
    if not q_BD.is_floating_point() or q_BD.dtype != k_ND.dtype:
        raise ValueError(f"q is {q_BD.dtype} and k {k_ND.dtype}; both must be of one float type")
    if q_BD.device != k_ND.device:
        raise ValueError(f"q is on {q_BD.device} and k on {k_ND.device}; both must be on one")


def _check_indices(name: str, x: Tensor, shape: torch.Size, device: torch.device) -> None:
    if x.shape != shape or x.dtype != torch.int64 or x.device != device:
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device}, expected int64 "
            f"[{shape[0]}] on {device}"
        )


def _check_range(positive_B: Tensor, num_columns: int) -> None:
    first, last = (int(x) for x in torch.aminmax(positive_B))
    if first < 0 or last >= num_columns:
        raise ValueError(f"positive holds {first} to {last}, expected 0 to {num_columns - 1}")


def _check_prefixes(
    width: int, prefixes: Sequence[int] | None, prefix_weights: Sequence[float] | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    widths = (width,) if prefixes is None else tuple(int(w) for w in prefixes)
    if not widths or list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] > width:
        raise ValueError(f"prefixes {widths} must ascend within 1..{width}")
    weights = (1.0,) * len(widths)
    if prefix_weights is not None:
        weights = tuple(float(w) for w in prefix_weights)
    if len(weights) != len(widths):
        raise ValueError(f"{len(weights)} prefix weights for {len(widths)} prefixes")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"prefix weights {weights} must be finite numbers")
    return widths, weights


def _check_numbers(temperature: float | Tensor, margin: float | None, device: torch.device) -> None:
    if isinstance(temperature, Tensor):
        if temperature.ndim or temperature.device != device:
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)} on {temperature.device}, "
                f"expected a scalar on {device}"
            )
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
    if margin is not None and margin != margin:  # not `isnan`: torch.compile cannot trace it
        raise ValueError("margin is not a number")


def _run(
    q_BD: Tensor,
    k_ND: Tensor,
    positive_B: Tensor,
    temperature: Tensor,
    widths: Sequence[int],
    weights: Sequence[float],
    k_ids_N: Tensor | None,
    margin: float | None,
    owner_N: Tensor | None,
    symmetric: bool,
    backend: str,
    with_gradient: bool,
    trains_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fields of `InfoNCEOutput`, then dq, dk and dtemperature of the loss or empty tensors."""
    problem = Problem(
        q_BD,
        k_ND,
        positive_B,
        temperature.to(_accumulation_dtype(q_BD)),
        tuple(widths),
        tuple(weights),
        k_ids_N,
        margin,
        owner_N,
        symmetric,
        trains_temperature,
    )
    # entering it takes a fiftieth of a small matrix's time
    casts = torch.is_autocast_enabled(q_BD.device.type)
    with torch.autocast(q_BD.device.type, enabled=False) if casts else nullcontext():
        done = _evaluate(problem, backend, with_gradient=with_gradient)
        loss_P = done.loss_PB.mean(1)
        # not a product with a tensor of the weights: copying that to a GPU would wait for it
        weighted = (
            loss_P
            if set(weights) == {1.0}
            else torch.stack([part * w for part, w in zip(loss_P, weights, strict=True)])
        )
        loss = weighted.sum()  # of one prefix too: no two results may share memory
    gradients = (done.dq_BD, done.dk_ND, done.dtemperature if trains_temperature else None)
    dq_BD, dk_ND, dtemperature = (
        x.new_empty(0) if grad is None else grad.to(saved_dtype(x))
        for grad, x in zip(gradients, (q_BD, k_ND, temperature), strict=True)
    )
    statistics = (loss_P, done.lse_PB, done.positive_score_PB, done.num_masked_B)
    return (loss, *statistics, dq_BD, dk_ND, dtemperature)


def _evaluate(problem: Problem, backend: str, *, with_gradient: bool) -> Evaluation:
    if backend != "triton":
        module = infonce_plain if backend == "plain" else infonce_torch
        return module.evaluate(problem, with_gradient=with_gradient)
    infonce_triton = importlib.import_module("drama.kernels.infonce_triton")  # needs triton
    done: Evaluation = infonce_triton.evaluate(problem, with_gradient=with_gradient)
    return done


class _Eager(torch.autograd.Function):
    """`_run` with the loss as its only output; the statistics are appended to a list."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BD: Tensor,
        k_ND: Tensor,
        positive_B: Tensor,
        temperature: Tensor,
        options: tuple[Any, ...],
        statistics: list[Tensor],
    ) -> Tensor:
        output = _run(q_BD, k_ND, positive_B, temperature, *options)
        statistics += output[1:5]
        ctx.save_for_backward(*output[5:])
        ctx.dtypes = q_BD.dtype, k_ND.dtype, temperature.dtype
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        needed = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3])
        dq_BD, dk_ND, dtemperature = (
            scaled(g, grad_loss, dtype) if wanted else None
            for g, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, needed, strict=True)
        )
        return dq_BD, dk_ND, None, dtemperature, None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[5:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype, inputs[3].dtype
    ctx.trains_temperature = inputs[-1]


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # plain operators: the compiler fuses them, and cuts into pieces as it likes
    dq_BD, dk_ND, dtemperature = (
        (g.to(grad_loss.dtype) * grad_loss).to(dtype)
        for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return (dq_BD, dk_ND, None, dtemperature if ctx.trains_temperature else None, *[None] * 9)


@torch.library.custom_op("drama::infonce", mutates_args=())
def _infonce(
    q_BD: Tensor,
    k_ND: Tensor,
    positive_B: Tensor,
    temperature: Tensor,
    widths: Sequence[int],
    weights: Sequence[float],
    k_ids_N: Tensor | None,
    margin: float | None,
    owner_N: Tensor | None,
    symmetric: bool,
    backend: str,
    with_gradient: bool,
    trains_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_run` for torch.compile, which wants contiguous outputs that share no memory."""
    options = (
        *(widths, weights, k_ids_N, margin, owner_N, symmetric, backend, with_gradient),
        trains_temperature,
    )
    output = _run(q_BD, k_ND, positive_B, temperature, *options)
    loss, loss_P, lse, score, masked, dq, dk, dt = map(_alone, output)
    return loss, loss_P, lse, score, masked, dq, dk, dt


def _alone(x: Tensor) -> Tensor:
    x = x.contiguous()
    whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if whole else x.clone()


_infonce.register_autograd(_backward, setup_context=_save)


@_infonce.register_fake
def _(
    q_BD: Tensor, k_ND: Tensor, positive_B: Tensor, temperature: Tensor, widths: Any, *rest: Any
) -> tuple[Tensor, ...]:
    dtype, (with_gradient, trains_temperature) = _accumulation_dtype(q_BD), rest[-2:]
    num_rows, num_prefixes = len(q_BD), len(widths)
    statistics = [
        q_BD.new_empty(shape, dtype=dtype)
        for shape in ((), (num_prefixes,), (num_prefixes, num_rows), (num_prefixes, num_rows))
    ]
    given = (with_gradient, with_gradient, with_gradient and trains_temperature)
    gradients = [
        x.new_empty(x.shape if wanted else 0, dtype=saved_dtype(x))
        for x, wanted in zip((q_BD, k_ND, temperature), given, strict=True)
    ]
    return (*statistics, positive_B.new_empty(num_rows), *gradients)
