"""How fast a corpus becomes vectors, ours beside the others and beside its own matrix products.

Tokens are the texts' own, padding does not count; tokenising is part of the time, except in the
mode "tokens". Texts of one length each, and mixes as they are met: the documents of real records,
alone and with their queries. A way whose vectors are off gets no time.

The floor is the time of the model's matrix products alone on this machine, same type and rows,
without attention, norms and what lies between: a speed that nobody reaches. As ours, it leaves out
what the last block does for tokens that no pooling reads.

T tokens, D width, F width of the feed-forward network, Q and K of queries and of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drama.bench.retrievers import (
    Way,
    check,
    exact_texts,
    open_ways,
    read_queries,
    read_texts,
    reference,
)
from drama.bench.rows import Rows, interleaved
from drama.encoder import Encoder
from drama.retrieve.models import TOKEN_BUDGET

CHECKED = 4  # texts of a case that are held against the reference


@dataclass(frozen=True)
class Size:
    """How much is measured. tokens: of the texts of one length in all; mixed: documents of the
    mix; documents: of the index."""

    lengths: tuple[int, ...]
    tokens: int
    mixed: int
    documents: int


def size_for(device: torch.device, *, quick: bool) -> Size:
    """What a device does in seconds a pass."""
    if quick:
        return Size((32, 128), 256, 24, 1_500)
    if device.type == "cuda":
        return Size((128, 512, 2048, 8192), 2**21, 2_000, 100_000)
    return Size((128, 512, 2048, 8192), 16_384, 128, 20_000)


@dataclass(frozen=True)
class Case:
    """Texts to encode. lengths: tokens of each. mixed: whether they differ."""

    x: str
    texts: list[str]
    lengths: list[int]
    mixed: bool = False


def cases(encoder: Encoder, pairs: Path, size: Size) -> list[Case]:
    """Fixed lengths, and a mix of documents.

    Raises:
        UserError: the records have too few texts.
    """
    tokenize = partial(encoder.tokenize, kind="query")
    documents = read_texts(pairs, max(size.mixed, 2_000))
    found = []
    for length in size.lengths:
        count = max(1, size.tokens // length)
        if count * length > 40_000:  # repeated: drawing texts of an exact length takes a while
            some = exact_texts(tokenize, documents, length, max(1, 40_000 // length))
            texts = [some[i % len(some)] for i in range(count)]
        else:
            texts = exact_texts(tokenize, documents, length, count)
        found.append(Case(f"{length} tokens", texts, [length] * count))
    documents = documents[: size.mixed]
    both = [text for pair in zip(documents, read_queries(pairs, size.mixed), strict=True)
            for text in pair]  # fmt: skip
    for name, texts in (("documents", documents), ("queries and documents", both)):
        sizes = [len(row) for row in tokenize(texts)]
        found.append(Case(f"mix of {name}", texts, sizes, mixed=True))
    return found


def measure(
    case: Case, ways: Sequence[Way], exact: Callable[[list[str]], Any], encoder: Encoder,
    device: torch.device, rows: Rows, *, seconds: float, note: Callable[[str], None],
) -> dict[str, float]:  # fmt: skip
    """Add the rows of a case; return median tokens/s by way, "floor" among them."""
    total = sum(case.lengths)
    config = {"texts": len(case.texts), "tokens": total, "longest": max(case.lengths)}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    runs: dict[str, Callable[[], None]] = {}
    dtypes = {"floor": str(dtype).removeprefix("torch.")}
    want_BD = exact(case.texts[:CHECKED])
    for way in ways:
        checked = check(way, case.texts[:CHECKED], want_BD)
        dtypes[way.name] = way.dtype
        facts = config | {"dtype": way.dtype}
        rows.add(way.name, "gate", "largest difference", case.x, [checked.difference], facts)
        rows.add(way.name, "gate", "lowest cosine", case.x, [checked.cosine], facts)
        if not checked.passed:
            note(f"{case.x}  {way.name}: differs by {checked.difference:.1e}; not timed")
            continue
        runs[way.name] = partial(_call, way.encode, case.texts)
        if way.name == "ours":
            runs["ours|tokens"] = partial(_call, way.embed, way.tokenize(case.texts))
            dtypes["ours|tokens"] = way.dtype
    runs["floor"] = floor(encoder.backbone.config, case.lengths, device, dtype)
    times = interleaved(runs, device, seconds=seconds)
    floor_seconds = sorted(times["floor"])[len(times["floor"]) // 2]
    speeds = {}
    for name, spent in times.items():
        provider, _, part = name.partition("|")
        mode = part or ("matrix products" if name == "floor" else "texts")
        rate, facts = [total / s for s in spent], config | {"dtype": dtypes[name]}
        rows.add(provider, mode, "tokens/s", case.x, rate, facts)
        if name != "floor":
            share = [floor_seconds / s for s in spent]
            rows.add(provider, mode, "fraction of floor", case.x, share, facts)
        speeds[name] = sorted(rate)[len(rate) // 2]
        note(f"{case.x}  {provider}, {mode}: {speeds[name]:,.0f} tokens/s")
    return speeds


def floor(
    config: Any, lengths: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """The products of one pass over texts of these lengths, in chunks of 8,192 tokens."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width, ffn = config.hidden_size, config.intermediate_size
    queries, keys = heads * head_dim, config.num_key_value_heads * head_dim

    def weight(into: int, out: int) -> Tensor:
        return torch.randn(out, into, device=device, dtype=dtype)

    qkv, kv = weight(width, queries + 2 * keys), weight(width, 2 * keys)
    rest = [weight(width, queries), weight(queries, width)]
    last = [weight(width, 2 * ffn), weight(ffn, width)]
    sizes = [TOKEN_BUDGET] * (sum(lengths) // TOKEN_BUDGET)
    sizes += [sum(lengths) % TOKEN_BUDGET] * bool(sum(lengths) % TOKEN_BUDGET)
    inputs = {w: torch.randn(TOKEN_BUDGET, w, device=device, dtype=dtype)
              for w in {width, queries, ffn}}  # fmt: skip

    def product(rows: int, weight_OI: Tensor) -> None:
        torch.nn.functional.linear(inputs[weight_OI.shape[1]][:rows], weight_OI)

    @torch.inference_mode()
    def products() -> None:
        for size in sizes:
            for _ in range(config.num_hidden_layers - 1):
                for weight_OI in (qkv, rest[1], *last):
                    product(size, weight_OI)
            product(size, kv)
        for start in range(0, len(lengths), TOKEN_BUDGET):
            for weight_OI in (*rest, *last):
                product(min(TOKEN_BUDGET, len(lengths) - start), weight_OI)

    return products


def run(
    folder: Path, pairs: Path, device: torch.device, rows: Rows, *, size: Size, seconds: float,
    note: Callable[[str], None], save: Callable[[], None],
) -> None:  # fmt: skip
    """Measure every case; `save` is called after each."""
    encoder = Encoder.from_pretrained(folder)
    ways, exact = open_ways(folder, device, queries=False), reference(folder, device)
    for case in cases(encoder, pairs, size):
        # 8 bits, bf16 on a CPU and graphs take minutes at every length and say nothing new
        some = [way for way in ways if case.mixed or way.name in ("ours", "sentence-transformers")]
        speeds = measure(case, some, exact, encoder, device, rows, seconds=seconds, note=note)
        if {"ours", "sentence-transformers"} <= speeds.keys():
            ratio = speeds["ours"] / speeds["sentence-transformers"]
            note(f"{case.x}: {ratio:.2f} times sentence-transformers")
        save()


def _call(work: Callable[[Any], Any], argument: Any) -> None:
    work(argument)
