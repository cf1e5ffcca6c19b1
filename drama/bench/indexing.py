"""Index types: seconds to build, and queries a second against what they find.

Vectors are drawn: unit vectors around random centres, queries beside documents, as embeddings lie.
Recall@10 is the part of the exact ten nearest that a search finds; lossy types are re-ranked with
the whole vectors, as in use.

N documents, D width, B queries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from drama.bench.rows import Rows, interleaved
from drama.errors import UserError
from drama.retrieve.index_search import Index
from drama.retrieve.index_types import KINDS, IndexType
from drama.retrieve.vectors import Vectors, VectorsManifest

K = 10
QUERIES = 256
EFFORTS = (0.25, 1.0, 4.0)


def draw(documents: int, width: int, seed: int = 0) -> tuple[Vectors, np.ndarray]:
    """Vectors [N, D] in memory and queries [256, D], all of norm 1."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((max(1, documents // 100), width), np.float32)
    of_N = random.integers(len(centres), size=documents)
    docs_ND = _unit(centres[of_N] + random.standard_normal((documents, width), np.float32))
    asked_B = random.integers(documents, size=QUERIES)
    noise_BD = random.standard_normal((QUERIES, width), np.float32)
    q_BD = _unit(docs_ND[asked_B] + 0.5 * _unit(noise_BD))
    manifest = VectorsManifest(
        model="drawn", model_sha256="", corpus="drawn", corpus_sha256="", rows=documents,
        kind="document", max_tokens=0, dim=width, dtype="float32", compute_dtype="float32",
        window=0, token_budget=0,
    )  # fmt: skip
    return Vectors(Path("drawn"), docs_ND, [str(i) for i in range(documents)], manifest), q_BD


def _unit(x: np.ndarray) -> np.ndarray:
    unit: np.ndarray = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit


def measure(
    documents: int, width: int, rows: Rows, *, seconds: float, note: Callable[[str], None]
) -> None:
    """Add rows of every type that this many documents allow."""
    vectors, q_BD = draw(documents, width)
    exact_BK = np.argsort(-(q_BD @ vectors.vectors_ND.T), axis=1)[:, :K]
    x, runs = f"N={documents:,}, D={width}", {}
    recall: dict[tuple[str, float], float] = {}
    for type in KINDS:
        name: IndexType = type  # type: ignore[assignment]
        start = time.perf_counter()
        try:
            index = Index.from_vectors(vectors, name)
        except UserError as error:
            note(f"{x}  {type}: {error}")
            continue
        spent = time.perf_counter() - start
        rows.add(type, "build", "seconds", x, [spent], {})
        note(f"{x}  {type}: built in {spent:.2f} s")
        for effort in EFFORTS if type != "flat" else (1.0,):
            search = partial(index.numbers, q_BD, K, effort)
            found_BK = search()[1]
            hits = [len(set(a) & set(b)) for a, b in zip(found_BK, exact_BK, strict=True)]
            recall[type, effort] = sum(hits) / exact_BK.size
            runs[f"{type}|{effort}"] = search
    times = interleaved(runs, torch.device("cpu"), seconds=seconds)  # type: ignore[arg-type]
    for key, spans in times.items():
        type, asked = key.split("|")
        effort = float(asked)
        found = recall[type, effort]
        config = {"effort": effort, "queries at once": QUERIES, "recall@10": round(found, 4)}
        rate = [QUERIES / span for span in spans]
        at = f"{x}, effort {effort}"
        rows.add(type, "search", "queries/s", at, rate, config)
        rows.add(type, "search", "recall@10", at, [found], config)
        note(f"{at}  {type}: {sorted(rate)[len(rate) // 2]:,.0f} queries/s, recall@10 {found:.3f}")
