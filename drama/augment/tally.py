"""What is counted while records are written: plain numbers that a journal can hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

from drama.data.records import Record
from drama.data.writer import bucket

SHOWN_REASONS = 2


class Tally:
    """Counters by what they count; the keys are strings, as in JSON. labels: see `job.Kept`."""

    NAMES = (
        "dropped",
        "sources",
        "languages",
        "positives",
        "negatives",
        "negatives_left_out",
        "query_chars",
        "document_chars",
        "own_ranks",
        "llm",
    )

    def __init__(self) -> None:
        self.records = 0
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in self.NAMES}
        self.labels: dict[str, Counter[str]] = {}

    @property
    def dropped(self) -> Counter[str]:
        """Documents of which nothing came, by reason."""
        return self.counts["dropped"]

    def add(
        self,
        record: Record,
        own_rank: int | None,
        left_out: Mapping[str, int],
        labels: Mapping[str, str],
    ) -> None:
        """Count a record that is kept; `own_rank` 0 is deeper than was looked."""
        self.records += 1
        counts = self.counts
        counts["sources"][record.source] += 1
        counts["languages"][record.lang] += 1
        counts["positives"][str(len(record.positives))] += 1
        counts["negatives"][str(len(record.negatives))] += 1
        counts["negatives_left_out"].update(left_out)
        counts["query_chars"][str(bucket(len(record.query)))] += 1
        for document in (*record.positives, *record.negatives):
            counts["document_chars"][str(bucket(len(document.full_text)))] += 1
        if own_rank is not None:
            counts["own_ranks"][str(own_rank or "deeper")] += 1
        for name, label in labels.items():
            self.labels.setdefault(name, Counter())[label] += 1

    def line(self) -> str:
        """For a progress bar: what was kept and dropped, and why."""
        text = f"kept {self.records:,}"
        if self.dropped:
            most = self.dropped.most_common(SHOWN_REASONS)
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in most)
            text += f"  dropped {self.dropped.total():,} ({reasons})"
        return text

    def summary(self) -> dict[str, Any]:
        """For a report: the counters, numbers ascending and names by count, and shares of them."""
        counts = {name: _sorted(counter) for name, counter in self.counts.items()}
        ranks = self.counts["own_ranks"]
        retrieval: dict[str, float] = {}
        if total := ranks.total():
            retrieval["first"] = round(ranks["1"] / total, 4)
            retrieval["found"] = round(1 - ranks["deeper"] / total, 4)
        labels = {name: _sorted(counter) for name, counter in self.labels.items()}
        return {"records": self.records, **counts, "labels": labels, "self_retrieval": retrieval}

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same tally back."""
        return {"records": self.records, "counts": self.counts, "labels": self.labels}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Take up what `to_json` gave."""
        tally = cls()
        tally.records = value["records"]
        tally.counts = {name: Counter(value["counts"][name]) for name in cls.NAMES}
        labels = value.get("labels", {})  # which the first journals did not have
        tally.labels = {name: Counter(counts) for name, counts in labels.items()}
        return tally


def _sorted(counts: Counter[str]) -> dict[str, int]:
    def key(item: tuple[str, int]) -> tuple[int, int, str]:
        name, count = item
        return (0, int(name), "") if name.isdecimal() else (1, -count, name)

    return dict(sorted(counts.items(), key=key))
