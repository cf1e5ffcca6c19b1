"""Everything that computes one InfoNCE case: ours by back end, plain torch and the peers.

Each takes the same unnormalised vectors [B, D] and [N, D] and the positives' columns [B].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drama.kernels.infonce import infonce

TEMPERATURE = 0.05
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One point of the grid. prefixes: () is the full width."""

    rows: int
    columns: int
    width: int
    prefixes: tuple[int, ...] = ()
    symmetric: bool = False
    backward: bool = True
    ours_alone: bool = False  # too large for the others

    @property
    def kernel(self) -> str:
        return "infonce"

    @property
    def mode(self) -> str:
        parts = ["forward+backward" if self.backward else "forward"]
        parts += [f"{len(self.prefixes)} prefixes"] if self.prefixes else []
        return ", ".join([*parts, "symmetric"] if self.symmetric else parts)

    @property
    def work(self) -> tuple[str, float]:
        flops = 2.0 * self.rows * self.columns * self.width * (3 if self.backward else 1)
        return "TFLOP/s", flops / 1e12

    def __str__(self) -> str:
        return f"B={self.rows} N={self.columns} D={self.width}"


def plain_torch(q_BD: Tensor, k_ND: Tensor, positive_B: Tensor) -> Tensor:
    """What everybody writes: the whole matrix, autograd."""
    logits_BN = F.normalize(q_BD, dim=1) @ F.normalize(k_ND, dim=1).T / TEMPERATURE
    return F.cross_entropy(logits_BN, positive_B)


def symmetric_torch(q_BD: Tensor, k_ND: Tensor, positive_B: Tensor) -> Tensor:
    """The same in both directions."""
    logits_BN = F.normalize(q_BD, dim=1) @ F.normalize(k_ND, dim=1).T / TEMPERATURE
    rows_B = torch.arange(len(q_BD), device=q_BD.device)
    columns = F.cross_entropy(logits_BN.T[positive_B], rows_B)
    return (F.cross_entropy(logits_BN, positive_B) + columns) / 2


def separate_losses(prefixes: Sequence[int], symmetric: bool) -> Loss:
    """One plain loss for each prefix."""
    one = symmetric_torch if symmetric else plain_torch

    def run(q_BD: Tensor, k_ND: Tensor, positive_B: Tensor) -> Tensor:
        return torch.stack([one(q_BD[:, :d], k_ND[:, :d], positive_B) for d in prefixes]).sum()

    return run


def linear_cross_entropy(q_BD: Tensor, k_ND: Tensor, positive_B: Tensor) -> Tensor:
    """torch's own chunked loss, torch 2.13 and newer."""
    scaled_BD = F.normalize(q_BD, dim=1) / TEMPERATURE
    return F.linear_cross_entropy(scaled_BD, F.normalize(k_ND, dim=1), positive_B)


def sentence_transformers(chunk: int, *, symmetric: bool) -> Loss:
    """The loss stage of its cached loss, which backpropagates each chunk as it goes."""

    @cache  # at the first call: where the package does not load, only this one fails
    def made() -> Any:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

        model = SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
        return CachedMultipleNegativesRankingLoss(
            model,
            scale=1 / TEMPERATURE,
            mini_batch_size=chunk,
            directions=("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",),
            partition_mode="per_direction" if symmetric else "joint",
        )

    def run(q_BD: Tensor, k_ND: Tensor, positive_B: Tensor) -> Tensor:
        # it wants the documents in the queries' order, as leaves
        documents_BD = k_ND.detach()[positive_B].requires_grad_(q_BD.requires_grad)
        value = made().calculate_loss([[q_BD], [documents_BD]], with_backward=q_BD.requires_grad)
        if documents_BD.grad is not None:
            k_ND.grad = torch.empty_like(k_ND)
            k_ND.grad[positive_B] = documents_BD.grad
        return value.detach()

    return run


def cut_cross_entropy(q_BD: Tensor, k_ND: Tensor, positive_B: Tensor) -> Tensor:
    """apple/ml-cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy as cce

    scaled_BD = F.normalize(q_BD, dim=1) / TEMPERATURE
    return cce(scaled_BD, F.normalize(k_ND, dim=1), positive_B)


def liger(q_BD: Tensor, k_ND: Tensor, positive_B: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    scaled_BD = F.normalize(q_BD, dim=1) / TEMPERATURE
    return LigerFusedLinearCrossEntropyLoss()(F.normalize(k_ND, dim=1), scaled_BD, positive_B)


def inf_cl(q_BD: Tensor, k_ND: Tensor, positive_B: Tensor) -> Tensor:
    """DAMO-NLP-SG/Inf-CLIP's tiled loss, one loss a row."""
    from inf_cl import cal_flash_loss

    scale = torch.tensor(1 / TEMPERATURE, device=q_BD.device)
    queries_BD, documents_BD = F.normalize(q_BD, dim=1), F.normalize(k_ND[positive_B], dim=1)
    return cal_flash_loss(queries_BD, documents_BD, scale=scale).mean()


def providers(case: Case, device: torch.device) -> dict[str, tuple[Loss, Case]]:
    """By name: a function, and the case that it computes, which is `case` but for "one prefix"."""

    def ours(backend: str, of: Case) -> tuple[Loss, Case]:
        options = {"prefixes": of.prefixes or None, "symmetric": of.symmetric, "backend": backend}
        return lambda q, k, p: infonce(q, k, p, temperature=TEMPERATURE, **options).loss, of  # type: ignore[arg-type]

    backends = ["triton"] if device.type == "cuda" else []
    if case.ours_alone:
        return {f"ours {name}": ours(name, case) for name in backends or ["auto"]}
    found = {f"ours {name}": ours(name, case) for name in ("auto", *backends, "torch", "plain")}
    peers: dict[str, Loss] = {}
    if case.prefixes:
        one = Case(case.rows, case.columns, case.width, (), case.symmetric, case.backward)
        found["ours one prefix"] = ours("auto", one)
        peers["separate plain torch losses"] = separate_losses(case.prefixes, case.symmetric)
        return found | {name: (loss, case) for name, loss in peers.items()}
    square = case.rows == case.columns
    peers["plain torch"] = symmetric_torch if case.symmetric else plain_torch
    if importlib.util.find_spec("sentence_transformers") and square and case.backward:
        for chunk in sorted({32, 128, 512, 2048, case.rows}):
            if (chunk <= case.rows and case.rows // chunk <= 256) or chunk == case.rows:
                name = f"sentence-transformers cached, chunk {chunk}"
                peers[name] = sentence_transformers(chunk, symmetric=case.symmetric)
    if not case.symmetric:
        if hasattr(F, "linear_cross_entropy"):
            peers["F.linear_cross_entropy"] = linear_cross_entropy
        if device.type == "cuda":
            extra: dict[str, Loss] = {"cut_cross_entropy": cut_cross_entropy, "liger_kernel": liger}
            extra |= {"inf_cl": inf_cl} if square else {}
            peers |= {n: f for n, f in extra.items() if importlib.util.find_spec(n)}
    return found | {name: (loss, case) for name, loss in peers.items()}
