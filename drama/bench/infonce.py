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

from drama.bench.infonce_peers import TEMPERATURE, Case, Loss, providers
from drama.bench.rows import Rows, interleaved, peak_bytes
from drama.kernels.infonce_reference import infonce_reference
from drama.testing import ContrastiveBatch, contrastive_batch, relative_error

WIDTHS = (64, 128, 256, 512, 768)
# relative error of a gradient; plain torch rounds its logits to the vectors' type
GATE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
# logits that float64 is asked for: a few seconds
EXACT_LOGITS = {"cpu": 2**26, "cuda": 2**32}
EXACT_AT_ONCE = {"cpu": 2**23, "cuda": 2**26}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The grid of a device, smallest first; `quick` divides its rows and columns."""
    if device.type == "cuda":
        big = 65536
        grid = [
            *(Case(n, n, 768) for n in (256, 1024, 4096, 16384)),
            *(Case(big, big, d) for d in (256, 768, 2048)),
            Case(16384, 16384, 768, WIDTHS),
            Case(big, big, 768, WIDTHS),
            Case(big, big, 768, WIDTHS, backward=False),
            *(Case(n, n, 768, (), True) for n in (4096, big)),
            Case(big, big, 768, (), True, backward=False),
            Case(big, big, 768, backward=False),
            Case(2048, 16384, 768),
            Case(262144, 262144, 768, ours_alone=True),
            Case(2**20, 2**20, 768, ours_alone=True),
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
    runs: dict[str, Callable[[], None]] = {"floor": _floor(case, q_BD, k_ND)}
    x, exact = str(case), dict[Case, tuple[Tensor, Tensor]]()
    for name, (loss, computed) in providers(case, device).items():
        gated = gate_case(computed, device)
        checked = vectors(gated, dtype, device)
        if gated not in exact:
            exact[gated] = exact_gradients(gated, checked)
        config = {"dtype": str(dtype), "temperature": TEMPERATURE, "checked at": str(gated)}

        def run(loss: Loss = loss) -> None:
            _run(loss, q_BD, k_ND, batch.positive_B, backward=case.backward)

        try:
            error = gradient_error(loss, checked, exact[gated])
            rows.add(name, case.mode, "relative gradient error", x, [error], config)
            if not error <= GATE[dtype]:  # published, but no time is
                continue
            q_BD.grad = k_ND.grad = None
            memory = peak_bytes(run, device)
        except Exception as failure:  # a peer's, of whatever kind: the others go on
            kind = "out of memory" if isinstance(failure, torch.OutOfMemoryError) else "failed"
            said = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            rows.add(name, case.mode, kind, x, [1.0], config | {"error": said})
            continue
        rows.add(name, case.mode, "peak MiB beyond inputs", x, [memory / 2**20], config)
        runs[name] = run
    del exact
    times = interleaved(runs, device, seconds=seconds)
    floor = sorted(times["floor"])[len(times["floor"]) // 2]
    config = {"dtype": str(dtype), "temperature": TEMPERATURE}
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
