"""Calibration text: read it, draw paragraphs, pack them into rows of equal length.

R rows, N tokens per row.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drama.errors import UserError
from drama.prune.text import documents, sha256_of

# characters kept per token wanted: ordinary text has about 4, and 32k tokens are 2 MB
CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Calibration:
    """Rows to score with and rows to judge by; no paragraph is in both.

    scoring, held_out: int64 [R, N]. sha256: of the file's bytes as they lie on disk.
    """

    scoring: Tensor
    held_out: Tensor
    sha256: str


def read_calibration(
    path: str | Path,
    tokenizer: Any,
    *,
    num_tokens: int,
    held_out_tokens: int,
    length: int = 512,
    seed: int = 0,
) -> Calibration:
    """Draw paragraphs from a text file at random and pack them, each closed by EOS.

    The file is UTF-8, plain or packed: paragraphs between blank lines, or JSON lines with `text`.
    One pass, and memory for the drawn paragraphs only, whatever the file's size. Both token counts
    are rounded up to whole rows of `length`. The held-out rows are filled first, so they are the
    same for every `num_tokens`.

    Raises:
        UserError: no such file, not text, counts below 1, or too few tokens in it.
    """
    path = Path(path)
    for name, value in (("calibration tokens", num_tokens), ("held-out tokens", held_out_tokens)):
        if value < 1:
            raise UserError(f"{name}: {value}; give at least 1")
    rows = [-(-count // length) for count in (held_out_tokens, num_tokens)]
    paragraphs = _draw(path, sum(rows) * length * CHARACTERS_PER_TOKEN, seed)
    eos = tokenizer.eos_token_id
    stream = iter(paragraphs)
    packed = []
    for count in rows:
        ids: list[int] = []
        while len(ids) < count * length and (paragraph := next(stream, None)) is not None:
            ids += tokenizer(paragraph, verbose=False)["input_ids"]
            if eos is not None and ids and ids[-1] != eos:
                ids.append(eos)
        packed.append(ids)
    have, want = sum(map(len, packed)), sum(rows) * length
    if any(len(ids) < count * length for ids, count in zip(packed, rows, strict=True)):
        raise UserError(
            f"{path}: too short to calibrate with: {have:,} tokens in {len(paragraphs):,} distinct "
            f"paragraphs, {want:,} are needed ({rows[1] * length:,} to score, {rows[0] * length:,} "
            "held out); give a longer text, its paragraphs separated by blank lines, or ask for "
            "fewer calibration tokens"
        )
    held_out, scoring = (
        torch.tensor(ids[: count * length]).view(count, length)
        for ids, count in zip(packed, rows, strict=True)
    )
    return Calibration(scoring, held_out, sha256_of(path))


def _draw(path: Path, num_characters: int, seed: int) -> list[str]:
    """Distinct paragraphs in random order, about `num_characters` of them, each equally likely.

    Every paragraph draws a number and the lowest numbers stay (reservoir sampling by priority).
    """
    rng = random.Random(seed)
    heap: list[tuple[float, str]] = []
    held = 0
    for paragraph in documents(path):
        heapq.heappush(heap, (-rng.random(), paragraph))
        held += len(paragraph)
        while held - len(heap[0][1]) >= num_characters:
            held -= len(heapq.heappop(heap)[1])
    return list(dict.fromkeys(paragraph for _, paragraph in sorted(heap, reverse=True)))
