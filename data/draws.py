"""Random draws that are a function of (seed, epoch, record): the same on every machine and rank.

B records, M of their hard negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(words: np.ndarray) -> np.ndarray:
    """Mix uint64 words (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    2014): each bit of a result depends on every bit of its word."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Drawn:
    """positive_B: which positive of each record. Of each negative drawn: owner_M, its record, and
    negative_M, which of that record's negatives; owners ascend."""

    positive_B: np.ndarray
    owner_M: np.ndarray
    negative_M: np.ndarray


def draw_documents(
    seed: int,
    epochs_B: np.ndarray,
    indices_B: np.ndarray,
    positives_B: np.ndarray,
    negatives_B: np.ndarray,
    count: int,
) -> Drawn:
    """One positive and up to `count` different negatives of each record.

    indices_B: the records' numbers. positives_B, negatives_B: how many they have.
    """
    keys_B = splitmix64(np.full(len(indices_B), seed, np.uint64))
    for part_B in (epochs_B, indices_B):
        keys_B = splitmix64(keys_B ^ part_B.astype(np.uint64))
    positive_B = (splitmix64(keys_B) % positives_B.astype(np.uint64)).astype(np.int64)
    owner = np.repeat(np.arange(len(negatives_B)), negatives_B)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(negatives_B) - negatives_B, negatives_B)
    words = splitmix64(keys_B[owner] + _GOLDEN * (place + 1).astype(np.uint64))
    shuffled = place[np.lexsort((words, owner))]
    kept = place < count
    return Drawn(positive_B, owner[kept], shuffled[kept])
