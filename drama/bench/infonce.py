"""InfoNCE against everything else that computes it: correctness first, then time and memory.

A provider gets the same unnormalised vectors, and its time is that of loss and gradients (or of the
loss alone). Its floor is three matrix products of B x N x D (one forward) on this machine, timed in
the same rounds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from drama.bench.rows import Rows, interleaved, peak_bytes
from drama.kernels.infonce import infonce
from drama.kernels.infonce_reference import infonce_reference
from drama.testing import contrastive_batch, relative_error

TEMPERATURE = 0.05
WIDTHS = (64, 128, 256, 512, 768)
GATE_ROWS = 512  # of the correctness check
GATE = 0.02  # relative error of a gradient, as bf16 vectors allow
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
    def mode(self) -> str:
        parts = ["forward+backward" if self.backward else "forward"]
        parts += [f"{len(self.prefixes)} prefixes"] if self.prefixes else []
        return ", ".join([*parts, "symmetric"] if self.symmetric else parts)

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.width * (3 if self.backward else 1)

    def __str__(self) -> str:
        return f"B={self.rows} N={self.columns} D={self.width}"


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The grid of a device, smallest first."""
    if quick:
        return [Case(256, 256, 64), Case(256, 256, 128, (64, 128)), Case(256, 256, 64, (), True)]
    if device.type == "cuda":
        big = 65536
        return [
            *(Case(n, n, 768) for n in (256, 1024, 4096, 16384)),
            *(Case(big, big, d) for d in (256, 768, 2048)),
            Case(big, big, 768, WIDTHS),
            Case(big, big, 768, (), True),
            Case(big, big, 768, backward=False),
            Case(2048, 16384, 768),
            Case(262144, 262144, 768, ours_alone=True),
            Case(2**20, 2**20, 768, ours_alone=True),
        ]
    return [
        *(Case(n, n, 256) for n in (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)),
        *(Case(n, n, 768) for n in (32, 64, 128, 512, 2048)),
        *(Case(n, n, 768, WIDTHS) for n in (2048, 8192)),
        Case(2048, 2048, 256, (), True),
        Case(8192, 8192, 256, backward=False),
        Case(1024, 8192, 256),
    ]


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


def linear_cross_entropy(q_BD: Tensor, k_ND: Tensor, positive_B: Tensor) -> Tensor:
    """torch's own chunked loss, torch 2.13 and newer."""
    scaled_BD = F.normalize(q_BD, dim=1) / TEMPERATURE
    return F.linear_cross_entropy(scaled_BD, F.normalize(k_ND, dim=1), positive_B)


def sentence_transformers(chunk: int) -> Loss:
    """The loss stage of its cached loss, which backpropagates each chunk as it goes."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=chunk)

    def run(q_BD: Tensor, k_ND: Tensor, positive_B: Tensor) -> Tensor:
        # it wants the documents in the queries' order, as leaves
        documents_BD = k_ND.detach()[positive_B].requires_grad_(q_BD.requires_grad)
        value = loss.calculate_loss([[q_BD], [documents_BD]], with_backward=q_BD.requires_grad)
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
    """DAMO-NLP-SG/Inf-CLIP's tiled loss."""
    from inf_cl import cal_flash_loss

    scale = torch.tensor(1 / TEMPERATURE, device=q_BD.device)
    queries_BD, documents_BD = F.normalize(q_BD, dim=1), F.normalize(k_ND[positive_B], dim=1)
    return cal_flash_loss(queries_BD, documents_BD, scale)


def providers(case: Case, device: torch.device) -> dict[str, Loss]:
    """Name and function of everything that computes this case here."""
    options = {
        "temperature": TEMPERATURE, "prefixes": case.prefixes or None, "symmetric": case.symmetric
    }  # fmt: skip

    def ours(backend: str) -> Loss:
        return lambda q, k, p: infonce(q, k, p, backend=backend, **options).loss  # type: ignore[arg-type]

    backends = ["triton"] if device.type == "cuda" else []
    if case.ours_alone:
        return {f"ours {name}": ours(name) for name in backends}
    found = {f"ours {name}": ours(name) for name in ("auto", *backends, "torch", "plain")}
    if case.prefixes:
        found["ours one prefix"] = lambda q, k, p: infonce(q, k, p, temperature=TEMPERATURE).loss

        def separate(q_BD: Tensor, k_ND: Tensor, positive_B: Tensor) -> Tensor:
            parts = [plain_torch(q_BD[:, :d], k_ND[:, :d], positive_B) for d in case.prefixes]
            return torch.stack(parts).sum()

        return found | {"separate plain torch losses": separate}
    found["plain torch"] = symmetric_torch if case.symmetric else plain_torch
    if case.symmetric:
        return found
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = linear_cross_entropy
    square = case.rows == case.columns
    if importlib.util.find_spec("sentence_transformers") and square and case.backward:
        for chunk in (32, 128, 512, 2048):
            if chunk <= max(32, case.rows):
                name = f"sentence-transformers cached, chunk {chunk}"
                found[name] = sentence_transformers(chunk)
    if device.type == "cuda":
        extra = {"cut_cross_entropy": cut_cross_entropy, "liger_kernel": liger}
        extra |= {"inf_cl": inf_cl} if square else {}
        found |= {n: f for n, f in extra.items() if importlib.util.find_spec(n)}
    return found


def gradient_error(case: Case, loss: Loss, dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of q's and k's gradient against float64, on a corner of the case."""
    rows, columns = (min(n, GATE_ROWS) for n in (case.rows, case.columns))
    batch = contrastive_batch(rows, columns, case.width, dtype=dtype, device=device)
    q_BD, k_ND = (x.clone().requires_grad_() for x in (batch.q_BD, batch.k_ND))
    _run(loss, q_BD, k_ND, batch.positive_B, backward=True)
    exact = [x.double().requires_grad_() for x in (batch.q_BD, batch.k_ND)]
    infonce_reference(
        exact[0],
        exact[1],
        batch.positive_B,
        temperature=TEMPERATURE,
        prefixes=case.prefixes or None,
        symmetric=case.symmetric,
    ).loss.backward()
    pairs = zip((q_BD, k_ND), exact, strict=True)
    return max(relative_error(got.grad, want.grad) for got, want in pairs)  # type: ignore[arg-type]


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, rows: Rows, seconds: float
) -> None:
    """Gate, time and memory of every provider of a case; appends to `rows`."""
    batch = contrastive_batch(case.rows, case.columns, case.width, dtype=dtype, device=device)
    q_BD, k_ND = (x.requires_grad_(case.backward) for x in (batch.q_BD, batch.k_ND))
    runs: dict[str, Callable[[], None]] = {"floor": _floor(case, q_BD, k_ND)}
    config, x = {"dtype": str(dtype), "temperature": TEMPERATURE}, str(case)
    for name, loss in providers(case, device).items():
        one_width = Case(case.rows, case.columns, case.width) if "one prefix" in name else case
        error = gradient_error(one_width, loss, dtype, device)
        rows.add(name, case.mode, "relative gradient error", x, [error], config)
        if error > GATE:  # published, but no time is
            continue

        def run(loss: Loss = loss) -> None:
            _run(loss, q_BD, k_ND, batch.positive_B, backward=case.backward)

        try:
            memory = peak_bytes(run, device)
        except torch.cuda.OutOfMemoryError:
            rows.add(name, case.mode, "out of memory", x, [1.0], config)
            continue
        rows.add(name, case.mode, "peak MiB beyond inputs", x, [memory / 2**20], config)
        runs[name] = run
    times = interleaved(runs, device, seconds=seconds)
    floor = sorted(times["floor"])[len(times["floor"]) // 2]
    for name, values in times.items():
        rows.add(name, case.mode, "ms", x, [1e3 * t for t in values], config)
        rows.add(name, case.mode, "TFLOP/s", x, [case.flops / t / 1e12 for t in values], config)
        if name != "floor":
            rows.add(name, case.mode, "fraction of floor", x, [floor / t for t in values], config)


def _run(loss: Loss, q_BD: Tensor, k_ND: Tensor, positive_B: Tensor, *, backward: bool) -> None:
    q_BD.grad = k_ND.grad = None
    value = loss(q_BD, k_ND, positive_B)
    if backward and value.requires_grad:  # sentence-transformers has done it
        value.backward()


def _floor(case: Case, q_BD: Tensor, k_ND: Tensor) -> Callable[[], None]:
    """The matrix products alone, in chunks of rows where the matrix is large."""
    q_BD, k_ND = q_BD.detach(), k_ND.detach()
    chunk = min(case.rows, max(1, 2**28 // case.columns))
    product_CN = q_BD.new_empty(chunk, case.columns)

    def run() -> None:
        for first in range(0, case.rows, chunk):
            q_CD = q_BD[first : first + chunk]
            s_CN = product_CN[: len(q_CD)]
            torch.mm(q_CD, k_ND.T, out=s_CN)
            if case.backward:
                torch.mm(s_CN, k_ND)
                torch.mm(s_CN.T, q_CD)

    return run
