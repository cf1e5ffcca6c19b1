"""InfoNCE against everything else that computes it: correctness first, then time and memory.

A provider's time is that of loss and gradients (or of the loss alone). Its floor is three matrix
products of B x N x D (one forward) on this machine, timed in the same rounds. Its gradients are
held against float64 at the shape that is timed, or at the largest that float64 can do in seconds.
A provider whose gradients are off gets no time; one that fails gets a row that says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from drama.bench.gated import Candidate, compare
from drama.bench.infonce_peers import TEMPERATURE, Case, Loss, providers
from drama.bench.rows import Rows
from drama.kernels.infonce_reference import infonce_reference
from drama.testing import ContrastiveBatch, contrastive_batch, relative_error

WIDTHS = (64, 128, 256, 512, 768)
# logits that float64 is asked for: a few seconds
EXACT_LOGITS = {"cpu": 2**26, "cuda": 2**32}
EXACT_AT_ONCE = {"cpu": 2**23, "cuda": 2**26}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The grid of a device: what is asked for most comes first on a GPU, the smallest on a CPU.
    `quick` divides its rows and columns."""
    if device.type == "cuda":
        big = 65536
        grid = [
            Case(big, big, 768, WIDTHS),
            Case(2**20, 2**20, 768, ours_alone=True),
            Case(big, big, 768, (), True),
            *(Case(big, big, d) for d in (768, 2048)),
            *(Case(n, n, 768) for n in (4096, 16384, 1024, 256)),
            Case(big, big, 768, backward=False),
            Case(big, big, 256),
            Case(2048, 16384, 768),
            Case(16384, 16384, 768, WIDTHS),
            Case(262144, 262144, 768, ours_alone=True),
            Case(big, big, 768, WIDTHS, backward=False),
            Case(4096, 4096, 768, (), True),
            Case(big, big, 768, (), True, backward=False),
        ]
    else:
        grid = [
            *(Case(n, n, 256) for n in (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)),
            *(Case(n, n, 768) for n in (32, 64, 128, 512, 2048)),
            *(Case(n, n, 768, WIDTHS) for n in (2048, 8192)),
            Case(2048, 2048, 768, WIDTHS, backward=False),
            *(Case(n, n, 256, (), True) for n in (128, 2048)),
            Case(2048, 2048, 256, (), True, backward=False),
            Case(8192, 8192, 256, backward=False),
            Case(1024, 8192, 256),
        ]
    if not quick:
        return grid
    most = max(case.rows for case in grid if not case.ours_alone)

    def small(size: int) -> int:
        return min(640, max(16, 640 * size // most))

    shrunk = (replace(c, rows=small(c.rows), columns=small(c.columns)) for c in grid)
    return list(dict.fromkeys(shrunk))


def vectors(case: Case, dtype: torch.dtype, device: torch.device) -> ContrastiveBatch:
    """Vectors whose loss is near 1: in a solved batch the gradient is noise."""
    # the positive's cosine where exp(cosine / T) is 0.6 times the sum over N random documents
    expected = math.log(case.columns) + 1 / (2 * case.width * TEMPERATURE**2)
    cosine = min(0.9, TEMPERATURE * (expected - 0.5))
    return contrastive_batch(
        case.rows, case.columns, case.width, cosine=cosine, dtype=dtype, device=device
    )


def gate_case(case: Case, device: torch.device) -> Case:
    """The case, or a corner of it that float64 can do. `symmetric` needs the whole matrix."""
    logits = EXACT_AT_ONCE[device.type] if case.symmetric else EXACT_LOGITS[device.type]
    side = math.isqrt(logits)
    if case.rows * case.columns <= logits:
        return case
    return replace(case, rows=min(case.rows, side), columns=min(case.columns, side))


def exact_gradients(case: Case, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """Of q and k in float64 by autograd, a chunk of rows after the other."""
    q_BD, k_ND = (x.double().requires_grad_() for x in (batch.q_BD, batch.k_ND))
    chunk = EXACT_AT_ONCE[q_BD.device.type] // case.columns
    if case.symmetric:
        chunk = case.rows
    for first in range(0, case.rows, chunk):
        rows = slice(first, min(first + chunk, case.rows))
        loss = infonce_reference(
            *(q_BD[rows], k_ND, batch.positive_B[rows]),
            temperature=TEMPERATURE,
            prefixes=case.prefixes or None,
            symmetric=case.symmetric,
        ).loss
        (loss * ((rows.stop - rows.start) / case.rows)).backward()
    assert q_BD.grad is not None
    assert k_ND.grad is not None
    return q_BD.grad, k_ND.grad


def gradient_error(loss: Loss, batch: ContrastiveBatch, exact: tuple[Tensor, Tensor]) -> float:
    """Largest relative error of q's and k's gradient."""
    q_BD, k_ND = (x.clone().requires_grad_() for x in (batch.q_BD, batch.k_ND))
    _run(loss, q_BD, k_ND, batch.positive_B, backward=True)
    pairs = zip((q_BD, k_ND), exact, strict=True)
    return max(relative_error(got.grad, want) for got, want in pairs)  # type: ignore[arg-type]


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, rows: Rows, seconds: float
) -> None:
    """Gate, time and memory of every provider of a case; appends to `rows`."""
    batch = vectors(case, dtype, device)
    q_BD, k_ND = (x.requires_grad_(case.backward) for x in (batch.q_BD, batch.k_ND))
    checks = dict[Case, tuple[ContrastiveBatch, tuple[Tensor, Tensor]]]()

    def candidate(loss: Loss, computed: Case) -> Candidate:
        gated = gate_case(computed, device)

        def errors() -> dict[str, float]:
            if gated not in checks:
                checked = vectors(gated, dtype, device)
                checks[gated] = checked, exact_gradients(gated, checked)
            error = gradient_error(loss, *checks[gated])
            q_BD.grad = k_ND.grad = None
            return {"relative gradient error": error}

        def run() -> None:
            _run(loss, q_BD, k_ND, batch.positive_B, backward=case.backward)

        return Candidate(errors, run, str(gated))

    found = {name: candidate(*pair) for name, pair in providers(case, device).items()}
    floor = matrix_products(q_BD, k_ND, backward=case.backward)
    compare(
        case, found, floor, rows,
        dtype=dtype, device=device, seconds=seconds, config={"temperature": TEMPERATURE},
    )  # fmt: skip


def _run(loss: Loss, q_BD: Tensor, k_ND: Tensor, positive_B: Tensor, *, backward: bool) -> None:
    q_BD.grad = k_ND.grad = None
    value = loss(q_BD, k_ND, positive_B)
    if backward and value.requires_grad:  # sentence-transformers has done it
        value.backward()


def matrix_products(q_BD: Tensor, k_ND: Tensor, *, backward: bool) -> Callable[[], None]:
    """The matrix products alone, three or one, in chunks of rows where the matrix is large."""
    q_BD, k_ND = q_BD.detach(), k_ND.detach()
    chunk = min(len(q_BD), max(1, 2**28 // len(k_ND)))
    product_CN = q_BD.new_empty(chunk, len(k_ND))

    def run() -> None:
        for first in range(0, len(q_BD), chunk):
            q_CD = q_BD[first : first + chunk]
            s_CN = product_CN[: len(q_CD)]
            torch.mm(q_CD, k_ND.T, out=s_CN)
            if backward:
                torch.mm(s_CN, k_ND)
                torch.mm(s_CN.T, q_CD)

    return run
