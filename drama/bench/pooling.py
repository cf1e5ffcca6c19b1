"""Pooling with the final norm beside what everybody writes: errors, time and memory.

What is computed: RMSNorm with its weight, the last token's state or the mean of a sequence, divided
by its L2 norm. The floor is a copy of as many bytes as must move, read and written, in the same
rounds. With e the bytes of an element, T tokens, B sequences and width D:

             forward               backward, on top
    last     2 e B D               e T D (mostly zeros) + 2 e B D
    mean     e T D + e B D         2 e T D + e B D

each input once, each result once, and nothing for what is saved in between. A copy or states that
fit a cache stay there between the rounds, for every candidate alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drama.bench.gated import Candidate, compare
from drama.bench.rows import Rows
from drama.kernels.pool import Pooling, pool_last, pool_mean
from drama.kernels.pool_reference import pool_reference
from drama.testing import PackedStates, relative_error

EPS = 1e-5
Pool = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One point of the grid. length: of a sequence, on average; they are 1 to twice that."""

    pooling: Pooling
    tokens: int
    length: int
    width: int
    backward: bool = True
    element: int = 4  # bytes

    @property
    def kernel(self) -> str:
        return f"pool_{self.pooling}"

    @property
    def mode(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def bytes(self) -> int:
        """What must move."""
        rows, all_rows = (self.element * n * self.width for n in (len(self.lengths), self.tokens))
        if self.pooling == "last":
            return 2 * rows + self.backward * (all_rows + 2 * rows)
        return all_rows + rows + self.backward * (2 * all_rows + rows)

    @property
    def work(self) -> tuple[str, float]:
        return "GB/s", self.bytes / 1e9

    @property
    def lengths(self) -> tuple[int, ...]:
        return _lengths(self.tokens, self.length)

    def __str__(self) -> str:
        return f"T={self.tokens} mean length={self.length} D={self.width}"


@cache
def _lengths(tokens: int, mean: int) -> tuple[int, ...]:
    chance, found, left = random.Random(0), list[int](), tokens
    while left:
        found.append(min(left, chance.randint(1, 2 * mean - 1)))
        left -= found[-1]
    return tuple(found)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The grid of a device; `quick` leaves a few small ones."""
    if quick:
        tokens, shapes = 2048, [(40, 64), (256, 128)]
    elif device.type == "cuda":
        tokens, shapes = 65536, [(n, d) for d in (768, 2048) for n in (256, 512, 40)]
    else:
        tokens, shapes = 8192, [(n, d) for d in (256, 768) for n in (256, 40)]
    element = 2 if device.type == "cuda" else 4
    return [
        Case(pooling, tokens, length, width, backward, element)
        for length, width in shapes
        for pooling in ("last", "mean")
        for backward in (False, True)
    ]


def states(case: Case, dtype: torch.dtype, device: torch.device) -> PackedStates:
    """Made where they are needed: a GPU's are too many for one core."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden_TD = normal(case.tokens, case.width) * (0.5 + normal(case.tokens, 1).abs())
    weight_D, grad_BD = 1 + 0.3 * normal(case.width), normal(len(case.lengths), case.width)
    cu_seqlens = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32, device=device)
    return PackedStates(hidden_TD.to(dtype), cu_seqlens, weight_D.to(dtype), grad_BD.to(dtype))


class PlainPool(nn.Module):
    """The model's own norm over all tokens, then a pooling layer, then `F.normalize`."""

    def __init__(self, case: Case, weight: nn.Parameter, cu_seqlens: Tensor) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        self.norm = LlamaRMSNorm(case.width, eps=EPS)
        self.norm.weight = weight
        self.pooling, lengths_B = case.pooling, cu_seqlens.diff()
        self.last_B, self.lengths_B1 = cu_seqlens[1:].long() - 1, lengths_B[:, None]
        self.owner_T = torch.arange(len(lengths_B), device=weight.device).repeat_interleave(
            lengths_B
        )

    def forward(self, hidden_TD: Tensor) -> Tensor:
        h_TD = self.norm(hidden_TD)
        if self.pooling == "last":
            return F.normalize(h_TD[self.last_B], dim=1)
        # summed in float32: a sum of hundreds of rows in bf16 keeps no digits
        sums_BD = h_TD.new_zeros(len(self.last_B), h_TD.shape[1], dtype=torch.float32)
        mean_BD = sums_BD.index_add(0, self.owner_T, h_TD.float()) / self.lengths_B1
        return F.normalize(mean_BD, dim=1).to(h_TD.dtype)


class PaddedPool(PlainPool):
    """The same on a padded batch [B, L, D] with its mask, which is made outside of the time."""

    def __init__(self, case: Case, weight: nn.Parameter, cu_seqlens: Tensor) -> None:
        super().__init__(case, weight, cu_seqlens)
        columns_L = torch.arange(max(case.lengths), device=weight.device)
        self.mask_BL = columns_L < self.lengths_B1

    def pad(self, hidden_TD: Tensor) -> Tensor:
        padded_BLD = hidden_TD.new_zeros(*self.mask_BL.shape, hidden_TD.shape[1])
        padded_BLD[self.mask_BL] = hidden_TD
        return padded_BLD

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        h_BLD = self.norm(hidden_BLD)
        if self.pooling == "last":
            rows_B = torch.arange(len(h_BLD), device=h_BLD.device)
            return F.normalize(h_BLD[rows_B, self.lengths_B1[:, 0].long() - 1], dim=1)
        mask_BL1 = self.mask_BL[:, :, None].to(h_BLD.dtype)
        return F.normalize((h_BLD * mask_BL1).sum(1) / mask_BL1.sum(1), dim=1)


def segment_pool(plain: PlainPool) -> Pool:
    """torch's own sum over packed rows in place of `index_add`; its lengths are int64."""
    lengths_B = plain.lengths_B1[:, 0].long()

    def run(hidden_TD: Tensor) -> Tensor:
        h_TD = plain.norm(hidden_TD)
        mean_BD = torch.segment_reduce(h_TD.float(), "mean", lengths=lengths_B, unsafe=True)
        return F.normalize(mean_BD, dim=1).to(h_TD.dtype)

    return run


def compiled(plain: PlainPool) -> Pool:
    """By inductor, for this shape alone; compiled at the first call."""
    torch.compiler.reset()  # else the ninth shape of a process would silently run eagerly
    return torch.compile(plain, dynamic=False)


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, rows: Rows, seconds: float
) -> None:
    """Gate, time and memory of every provider of a case; appends to `rows`."""
    batch = states(case, dtype, device)
    hidden_TD, weight_D = batch.hidden_TD.requires_grad_(), nn.Parameter(batch.weight_D)
    exact = _exact(case, batch)

    def candidate(pool: Pool, leaf: Tensor, packed: Callable[[Tensor], Tensor]) -> Candidate:
        """`packed` takes a gradient of the leaf to [T, D]."""

        def errors() -> dict[str, float]:
            out_BD = pool(leaf)
            dh, dw_D = torch.autograd.grad(out_BD, (leaf, weight_D), batch.grad_BD)
            run()  # a compiler's first call of this mode is over before memory is counted
            pairs = zip((packed(dh), dw_D), exact[1:], strict=True)
            return {
                "relative output error": relative_error(out_BD.detach(), exact[0]),
                "relative gradient error": max(relative_error(*pair) for pair in pairs),
            }

        def run() -> None:
            if case.backward:
                torch.autograd.grad(pool(leaf), (leaf, weight_D), batch.grad_BD)
            else:
                with torch.no_grad():
                    pool(leaf)

        return Candidate(errors, run, str(case))

    found = {
        name: candidate(pool, hidden_TD, lambda dh_TD: dh_TD)
        for name, pool in _providers(case, weight_D, batch.cu_seqlens).items()
    }
    padded = PaddedPool(case, weight_D, batch.cu_seqlens)
    leaf = padded.pad(hidden_TD.detach()).requires_grad_()
    found["plain torch, padded"] = candidate(padded, leaf, lambda dh: dh[padded.mask_BL])
    floor = copy_of(case.bytes, device)
    config = {"floor": f"copy, {case.bytes} bytes moved", "sequences": len(case.lengths)}
    compare(case, found, floor, rows, dtype=dtype, device=device, seconds=seconds, config=config)


def _providers(case: Case, weight: nn.Parameter, cu_seqlens: Tensor) -> Mapping[str, Pool]:
    """Those that take packed states, by name."""

    def ours(backend: str) -> Pool:
        pool = pool_last if case.pooling == "last" else pool_mean
        return lambda h: pool(h, cu_seqlens, weight, eps=EPS, normalize=True, backend=backend)  # type: ignore[arg-type]

    on_gpu = weight.device.type == "cuda"
    backends = ("auto", "triton", "torch") if on_gpu else ("auto",)
    plain = PlainPool(case, weight, cu_seqlens)
    found = {f"ours {name}": ours(name) for name in backends} | {"plain torch": plain}
    if case.pooling == "mean":
        found["plain torch, segment_reduce"] = segment_pool(plain)
    if on_gpu:
        found["plain torch, compiled"] = compiled(plain)
    return found


def _exact(case: Case, batch: PackedStates) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of hidden and weight in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (batch.hidden_TD, batch.weight_D)]
    out_BD = pool_reference(
        leaves[0], batch.cu_seqlens, leaves[1], pooling=case.pooling, eps=EPS, normalize=True
    )
    dh_TD, dw_D = torch.autograd.grad(out_BD, leaves, batch.grad_BD.double())
    return out_BD.detach(), dh_TD, dw_D


def copy_of(size: int, device: torch.device) -> Callable[[], None]:
    """A copy on the device that reads and writes `size` bytes in all."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return run
