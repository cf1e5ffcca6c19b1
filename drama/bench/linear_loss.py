"""The language-model loss over a vocabulary, beside everything else that computes it.

The sum of next-token cross-entropies, from last hidden states and the output projection, and the
gradients of both. The floor is three matrix products of T x V x D in the same rounds. Errors are
held against float64 at a corner of the shape: the first tokens, a part of the vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from drama.bench.gated import Candidate, compare
from drama.bench.infonce import matrix_products
from drama.bench.rows import Rows
from drama.kernels.linear_loss import linear_loss
from drama.kernels.linear_loss_reference import linear_loss_reference
from drama.testing import relative_error

# most tokens and columns that float64 is asked for: several chunks of our back ends
CORNER = {"cpu": (2048, 16384), "cuda": (4096, 65536)}
TARGETS_AT_ONCE = 2**26  # logits
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    tokens: int
    vocabulary: int
    width: int

    @property
    def kernel(self) -> str:
        return "linear_loss"

    @property
    def mode(self) -> str:
        return "forward+backward"

    @property
    def work(self) -> tuple[str, float]:
        return "TFLOP/s", 3 * 2 * self.tokens * self.vocabulary * self.width / 1e12

    def __str__(self) -> str:
        return f"T={self.tokens} V={self.vocabulary} D={self.width}"


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The grid of a device, smallest first; `quick` leaves two small ones."""
    if quick:
        return [Case(64, 1000, 32), Case(300, 4099, 64)]
    if device.type == "cuda":
        return [Case(t, 128_256, d) for t in (8192, 32768) for d in (768, 2048)]
    return [Case(512, 16384, 256), Case(2048, 16384, 256), Case(512, 16384, 768)]


def gate_case(case: Case, device: torch.device) -> Case:
    """The case, or a corner of it that float64 can do."""
    tokens, vocabulary = CORNER[device.type]
    return replace(
        case, tokens=min(case.tokens, tokens), vocabulary=min(case.vocabulary, vocabulary)
    )


def batch_of(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """States, projection and targets. Logits differ by about 3; every other target is what its
    token likes best. Made where it is needed: a GPU's is too large for one core."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden_TD = normal(case.tokens, case.width).to(dtype)
    weight_VD = (normal(case.vocabulary, case.width) * (3 / case.width**0.5)).to(dtype)
    target_T = torch.randint(case.vocabulary, (case.tokens,), generator=generator, device=device)
    liked = [
        (some_CD @ weight_VD.T).argmax(1)
        for some_CD in hidden_TD[::2].split(max(1, TARGETS_AT_ONCE // case.vocabulary))
    ]
    target_T[::2] = torch.cat(liked)
    return hidden_TD.requires_grad_(), weight_VD.requires_grad_(), target_T


def plain_torch(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """All logits, in the inputs' type."""
    return F.cross_entropy(hidden_TD @ weight_VD.T, target_T, reduction="sum")


def plain_torch_wide(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """All logits, in float32 from the product on: as the models of transformers do."""
    return F.cross_entropy((hidden_TD @ weight_VD.T).float(), target_T, reduction="sum")


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """torch's own chunked loss, torch 2.13 and newer."""
    return F.linear_cross_entropy(hidden_TD, weight_VD, target_T, reduction="sum")


def cut_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """apple/ml-cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy as cce

    return cce(hidden_TD, weight_VD, target_T, reduction="sum")


def liger(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight_VD, hidden_TD, target_T)


def providers(dtype: torch.dtype, device: torch.device) -> dict[str, Loss]:
    """By name."""

    def ours(backend: str) -> Loss:
        return lambda h, w, t: linear_loss(h, w, t, backend=backend).loss  # type: ignore[arg-type]

    on_gpu = device.type == "cuda"
    backends = ("auto", "triton", "torch") if on_gpu else ("auto", "torch")
    found = {f"ours {name}": ours(name) for name in backends} | {"plain torch": plain_torch}
    if dtype != torch.float32:
        found["plain torch, float32 logits"] = plain_torch_wide
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = linear_cross_entropy
    extra: dict[str, Loss] = {"cut_cross_entropy": cut_cross_entropy, "liger_kernel": liger}
    return found | {n: f for n, f in extra.items() if on_gpu and importlib.util.find_spec(n)}


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, rows: Rows, seconds: float
) -> None:
    """Gate, time and memory of every provider of a case; appends to `rows`."""
    gated = gate_case(case, device)
    corner = batch_of(gated, dtype, device)
    exact = _exact(*corner)
    batch = batch_of(case, dtype, device)

    def candidate(loss: Loss) -> Candidate:
        def errors() -> dict[str, float]:
            value = loss(*corner)
            gradients = torch.autograd.grad(value, corner[:2])
            pairs = zip(gradients, exact[1:], strict=True)
            return {
                "relative output error": relative_error(value.detach(), exact[0]),
                "relative gradient error": max(relative_error(*pair) for pair in pairs),
            }

        def run() -> None:
            torch.autograd.grad(loss(*batch), batch[:2])

        return Candidate(errors, run, str(gated))

    found = {name: candidate(loss) for name, loss in providers(dtype, device).items()}
    floor = matrix_products(batch[0], batch[1], backward=True)
    compare(case, found, floor, rows, dtype=dtype, device=device, seconds=seconds, config={})


def _exact(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients of hidden and weight in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD)]
    loss = linear_loss_reference(leaves[0], leaves[1], target_T).loss
    return loss.detach(), *torch.autograd.grad(loss, leaves)
