"""How long a query waits: text to vector, a few texts at a time, ours beside the others.

Every way embeds the same texts of exactly so many tokens. It is first held against transformers'
own forward in float32; one that is off gets no time. A turn is a quarter of a second of calls, as
in a server that does nothing else, timed one by one, so that the slow ones are seen too: median
(p50), 95th and 99th percentile. Tokenising and the model alone are timed apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drama.bench.retrievers import (
    NO_GRAPH,
    Way,
    check,
    exact_texts,
    open_ways,
    read_texts,
    reference,
)
from drama.bench.rows import Rows, interleaved
from drama.encoder import Encoder
from drama.retrieve.models import GRAPH_TOKENS

DISTINCT = 8  # batches of texts, taken in turn


def measure(
    folder: Path,
    pairs: Path,
    device: torch.device,
    rows: Rows,
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    seconds: float,
    rounds: int,
    note: Callable[[str], None],
    save: Callable[[], None],
) -> None:
    """Add the rows of every batch and length; `save` is called after each."""
    ways = open_ways(folder, device, queries=True)
    exact = reference(folder, device)
    encoder = Encoder.from_pretrained(folder)
    tokenize = partial(encoder.tokenize, kind="query")
    documents = read_texts(pairs, 2_000)
    for tokens in lengths:
        for batch in batches:
            distinct = min(DISTINCT, rounds)
            texts = exact_texts(tokenize, documents, tokens, batch * distinct)
            groups = [texts[i : i + batch] for i in range(0, len(texts), batch)]
            alone = batch == 1 and tokens <= GRAPH_TOKENS  # elsewhere it is never asked
            here = [way for way in ways if alone or way.name != NO_GRAPH]
            _measure_case(
                here, groups, exact(groups[0]), tokens, device, rows,
                seconds=seconds, rounds=rounds, note=note,
            )  # fmt: skip
            save()


def _measure_case(
    ways: Sequence[Way],
    groups: list[list[str]],
    want_BD: np.ndarray,
    tokens: int,
    device: torch.device,
    rows: Rows,
    *,
    seconds: float,
    rounds: int,
    note: Callable[[str], None],
) -> None:
    x = f"B={len(groups[0])}, {tokens} tokens"
    config = {"batch": len(groups[0]), "tokens": tokens}
    whole: dict[str, Callable[[], None]] = {}
    parts: dict[str, Callable[[], None]] = {}
    for way in ways:
        checked = check(way, groups[0], want_BD)
        facts = config | {"dtype": way.dtype}
        rows.add(way.name, "gate", "largest difference", x, [checked.difference], facts)
        rows.add(way.name, "gate", "lowest cosine", x, [checked.cosine], facts)
        if not checked.passed:
            note(f"{x}  {way.name}: differs by {checked.difference:.1e}; not timed")
            continue
        whole[way.name] = _in_turn(way.encode, groups)
        parts[f"{way.name}|tokenise"] = _in_turn(way.tokenize, groups)
        parts[f"{way.name}|embed"] = _in_turn(way.embed, [way.tokenize(g) for g in groups])
    times = interleaved(whole, device, seconds=seconds, rounds=rounds, single=True)
    dtypes = {way.name: way.dtype for way in ways}
    for name, spent in times.items():
        ms, facts = [1e3 * second for second in spent], config | {"dtype": dtypes[name]}
        rows.add(name, "whole", "ms", x, ms, facts)
        for percent in (95, 99):
            rows.add(name, "whole", f"ms p{percent}", x, [float(np.percentile(ms, percent))], facts)
        note(f"{x}  {name}: p50 {np.median(ms):.2f} ms, p99 {np.percentile(ms, 99):.2f}")
    times = interleaved(parts, device, seconds=seconds / 2, rounds=rounds, single=True)
    for key, spent in times.items():
        name, mode = key.split("|")
        facts = config | {"dtype": dtypes[name]}
        rows.add(name, mode, "ms", x, [1e3 * second for second in spent], facts)


def _in_turn(call: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], None]:
    """Calls with the next input each time."""
    following = itertools.cycle(inputs)

    def run() -> None:
        call(next(following))

    return run
