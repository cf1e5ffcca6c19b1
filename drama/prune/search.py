"""Find the shape for a budget: propose a few, cut each, and take the one with the lowest loss.

A budget counts all parameters, embedding and output layer included with the vocabulary that stays,
or the FLOPs of a token's forward pass (`shape.flops_per_token`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from drama.console import progress
from drama.errors import UserError, nearest
from drama.prune.importance import Importance, choose
from drama.prune.loss import lm_loss
from drama.prune.shape import KEYS, Shape, count_parameters, flops_per_token
from drama.prune.surgery import cut

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
KINDS = {"params": "parameters", "flops": "FLOPs per token"}
BELOW = 0.05  # proposals lie at most this share below the largest shape that fits
# what sane means: no shape leaves the proportions of models that people train
HIDDEN_PER_LAYER = 128  # or the source's ratio where that is larger
MIN_HEAD_SHARE = 0.5  # attention channels per hidden channel, as a share of the source's
FFN_PER_HIDDEN = (1.0, 4.0)  # wide enough for the source's own ratio, whatever it is


@dataclass(frozen=True)
class Budget:
    """At most `limit` of `kind`, "params" or "flops"; `text` is what the user wrote."""

    kind: str
    limit: int
    text: str


@dataclass(frozen=True)
class Candidate:
    """A shape, what it costs, and its held-out loss right after the cut (nats per token)."""

    shape: Shape
    parameters: int
    flops: int
    loss: float | None = None


@dataclass(frozen=True)
class Sizes:
    """What counting needs besides a shape."""

    vocab_size: int
    tied: bool

    def candidate(self, shape: Shape) -> Candidate:
        """Count all parameters of `shape`, and its FLOPs per token in a text of 512."""
        parameters = count_parameters(shape, self.vocab_size, self.tied).total
        return Candidate(shape, parameters, flops_per_token(shape))

    def cost(self, shape: Shape, kind: str) -> int:
        """What a budget of `kind` limits."""
        counted = self.candidate(shape)
        return counted.flops if kind == "flops" else counted.parameters


def parse_budget(text: str) -> Budget:
    """Read "60M", "0.1b", "100000000", "params=100M" or "flops=0.2G".

    Raises:
        UserError: anything else.
    """
    kind, equals, size = (part.strip() for part in text.rpartition("="))
    kind = kind.lower() if equals else "params"
    if kind not in KINDS:
        raise UserError(
            f"budget '{text}': unknown key '{kind}'{nearest(kind, KINDS)}; known: "
            f"{', '.join(KINDS)}"
        )
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGB]?)", size.upper())
    if not found:
        raise UserError(
            f"budget '{text}': '{size}' is not a size; give parameters (60M, 0.1b, params=100M) or "
            "FLOPs per token (flops=0.2G)"
        )
    return Budget(kind, int(Decimal(found[1]) * UNITS[found[2]]), text)


def propose(budget: Budget, source: Shape, sizes: Sizes, count: int) -> list[Candidate]:
    """Return up to `count` shapes within the budget and close to it, as unlike as possible.

    Every shape is one that `parse_target` takes. Hidden width is a multiple of 64 or 128 and FFN of
    64 or 128, as matrix kernels like them (smaller powers of two for tiny sources). Of the shapes
    that share layers, hidden width and heads only the one with the widest FFN is looked at. The
    first proposal cuts all dimensions most evenly; each next one is the farthest from those before
    it, in the logarithms of layers, hidden width, heads and FFN.

    Raises:
        UserError: `count` below 1; a budget below the smallest sane shape, or that leaves nothing
            to cut.
    """
    if count < 1:
        raise UserError(f"candidates: {count}; give at least 1")
    what = f"budget '{budget.text}'"
    costs = {shape: sizes.cost(shape, budget.kind) for shape in _smallest_and_largest(source)}
    whole = sizes.cost(source, budget.kind)
    if budget.limit >= whole:
        most = max(cost for shape, cost in costs.items() if shape != source)
        raise UserError(
            f"{what}: the source has {_rounded_up(whole)} {KINDS[budget.kind]}, so nothing would "
            f"be cut; the largest valid choice is {_written(most, budget)}"
        )
    if budget.limit < (least := min(costs.values())):
        raise UserError(
            f"{what}: too small for a sane shape of this source ({KINDS[budget.kind]}); the "
            f"smallest valid choice is {_written(least, budget)}"
        )
    fitting = {
        shape: sizes.cost(shape, budget.kind)
        for shape in _widest(source, sizes, budget)
        if shape != source
    }
    floor = (1 - BELOW) * max(fitting.values())
    pool = [shape for shape, cost in fitting.items() if cost >= floor]
    return [sizes.candidate(shape) for shape in _spread(pool, source, count)]


def measure(
    model: Any,
    candidates: Sequence[Candidate],
    importance: Importance,
    energy_MD: Tensor,
    rows_RN: Tensor,
    dtype: torch.dtype,
) -> list[Candidate]:
    """Cut the model to every candidate in turn and return them with their losses, best first.

    rows: int64 [R, N] that nothing was scored with. One cut model is held at a time.
    """
    measured = []
    with progress() as bar:
        task = bar.add_task("shapes", total=len(candidates), note="")
        for candidate in candidates:
            small = cut(model, choose(importance, energy_MD, candidate.shape))
            measured.append(replace(candidate, loss=lm_loss(small, rows_RN, dtype)))
            del small
            best = min(measured, key=_loss)
            bar.update(task, advance=1, note=f"best so far: loss {best.loss:.3f}")
    return sorted(measured, key=_loss)


def _loss(candidate: Candidate) -> float:
    assert candidate.loss is not None
    return candidate.loss


def search_table(candidates: Sequence[Candidate], budget: Budget) -> Table:
    """Lay the candidates out, one a row, in the order given."""
    table = Table(title=f"shapes for a budget of {budget.text}")
    for heading in ("rank", *KEYS, "parameters (M)", "GFLOPs per token", "loss"):
        table.add_column(heading, justify="right")
    for rank, candidate in enumerate(candidates, 1):
        known = candidate.loss is not None
        table.add_row(
            str(rank) if known else "",
            *(f"{getattr(candidate.shape, key):,}" for key in KEYS),
            f"{candidate.parameters / 1e6:,.2f}",
            f"{candidate.flops / 1e9:,.3f}",
            f"{candidate.loss:.3f}" if known else "",
        )
    return table


def _step(size: int, most: int, parts: int) -> int:
    """The power of two up to `most` that divides a dimension of `size` into `parts` or more."""
    return min(most, 2 ** int(math.log2(max(size // parts, 1))))


def _grid(source: Shape) -> Iterator[Shape]:
    """Every sane choice of layers, hidden width and heads; the FFN is still the source's."""
    step = _step(source.hidden, 128 if source.hidden >= 2048 else 64, 8)
    per_layer = max(HIDDEN_PER_LAYER, source.hidden / source.layers)
    for hidden in sorted({*range(step, source.hidden + 1, step), source.hidden}):
        for kv_heads in range(1, source.kv_heads + 1):
            heads = kv_heads * source.group
            share = heads / hidden * source.hidden / source.heads
            if hidden % heads or not MIN_HEAD_SHARE <= share <= 1:
                continue
            for layers in range(math.ceil(hidden / per_layer), source.layers + 1):
                yield replace(source, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads)


def _ffn_sizes(shape: Shape, source: Shape) -> list[int]:
    """The sane FFN widths for a shape of `_grid`, rising."""
    step = _step(source.ffn, 128 if source.ffn >= 4096 else 64, 8)
    own = source.ffn / source.hidden
    low, high = min(FFN_PER_HIDDEN[0], own), max(FFN_PER_HIDDEN[1], own)
    sizes = sorted({*range(step, source.ffn + 1, step), source.ffn})
    return [ffn for ffn in sizes if low <= ffn / shape.hidden <= high]


def _smallest_and_largest(source: Shape) -> Iterator[Shape]:
    """The ends of every line of shapes that differ in the FFN alone, the next to largest too."""
    for shape in _grid(source):
        sizes = _ffn_sizes(shape, source)
        for ffn in {*sizes[:1], *sizes[-2:]}:
            yield replace(shape, ffn=ffn)


def _widest(source: Shape, sizes: Sizes, budget: Budget) -> Iterator[Shape]:
    """Of every line the shape with the widest FFN that the budget allows."""
    for shape in _grid(source):
        for ffn in reversed(_ffn_sizes(shape, source)):
            found = replace(shape, ffn=ffn)
            if sizes.cost(found, budget.kind) <= budget.limit:
                yield found
                break


def _spread(pool: Sequence[Shape], source: Shape, count: int) -> list[Shape]:
    """Farthest-point choice of `count` shapes; of equal distances the earlier in `pool`."""
    logs_PK = torch.tensor(
        [[math.log2(getattr(shape, key) / getattr(source, key)) for key in KEYS] for shape in pool],
        dtype=torch.float64,
    )
    chosen = [int(logs_PK.var(1, correction=0).argmin())]
    while len(chosen) < min(count, len(pool)):
        distance_P = torch.cdist(logs_PK, logs_PK[chosen]).min(1).values
        chosen.append(int(distance_P.argmax()))
    return [pool[i] for i in chosen]


def _rounded_up(value: int) -> str:
    """Four digits and a unit, never below `value`."""
    rounded = int(Context(prec=4, rounding=ROUND_CEILING).create_decimal(value))
    unit = max(
        (name for name in "KMG" if rounded >= UNITS[name]), key=UNITS.__getitem__, default=""
    )
    return f"{Decimal(rounded) / UNITS[unit]:f}{unit}"


def _written(value: int, budget: Budget) -> str:
    return f"{budget.kind}={_rounded_up(value)}"
