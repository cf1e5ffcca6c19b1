"""What one request may ask for, and how many may wait."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    max_texts: of one request. max_bytes: of its body. max_chars: of one text, before the model cuts
    it by tokens. max_k: results of a search. max_waiting: requests that wait for the model while it
    is at another. timeout_s: from a request's arrival to its answer, its reading apart. read_s: for
    its body to arrive.
    """

    max_texts: int = 64
    max_bytes: int = 4 * 2**20
    max_chars: int = 1_000_000
    max_k: int = 100
    max_waiting: int = 16
    timeout_s: float = 60.0
    read_s: float = 20.0
