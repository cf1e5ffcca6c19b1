"""Queries that come twice, exactly or nearly, against comparing all pairs."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from drama.data import duplicates
from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.sources import Source

ROOT = Path(__file__).parents[2]
WORDS = ["bees", "bread", "tides", "moons", "honey", "yeast"]
WORDS += ["ocean", "colony", "baker", "storm", "light", "river"]


def shard(path, queries, out, **options):
    rows = ({"query": query, "positives": [{"text": "p"}]} for query in queries)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return shard_sources([Source.parse(path)], out, ShardingOptions(**options))


def brute_force(queries):
    """(exact, near): near is a first occurrence that is like some other one before it."""
    seen, kept, near = set(), [], 0
    for query in queries:
        folded = " ".join(query.casefold().split())
        if folded not in seen:
            near += any(duplicates.similarity(query, other) >= 0.8 for other in kept)
            kept.append(query)
            seen.add(folded)
    return len(queries) - len(kept), near


@pytest.mark.parametrize("seed", range(4))
def test_duplicates_against_brute_force(tmp_path, seed):
    """Exact ones are all found, near ones never invented and rarely missed."""
    draw = random.Random(seed)
    queries = []
    for _ in range(450):
        if queries and draw.random() < 0.5:
            query = draw.choice(queries)
            kind = draw.randrange(5)
            at = draw.randrange(len(query))
            if kind == 0:
                query = query.upper() if draw.random() < 0.5 else f"  {query} "
            elif kind == 1:
                query = query + "?"
            elif kind == 2:
                query = query[:at] + draw.choice("xyz") + query[at + 1 :]
            elif kind == 3:
                query = query + " " + draw.choice(WORDS)
            queries.append(query)
        else:
            queries.append(" ".join(draw.choices(WORDS, k=draw.randint(6, 30))))
    outcome = shard(tmp_path / "x.jsonl", queries, tmp_path / "out", shard_bytes=30_000)
    exact, near = brute_force(queries)
    assert outcome.duplicates.exact == exact > 40
    assert 0.85 * near <= outcome.duplicates.near <= near
    assert near > 40
    counts = {"exact": exact, "near": outcome.duplicates.near}
    assert outcome.manifest.duplicate_queries == counts
    assert outcome.manifest.num_records == len(queries)  # they are reported, not dropped
    for first, second in outcome.duplicates.examples:
        assert duplicates.similarity(first, second) >= 0.8


def test_short_queries_and_none_alike(tmp_path):
    queries = ("a", "b", "A", "ab", "ü", "日本")
    outcome = shard(tmp_path / "x.jsonl", queries, tmp_path / "out")
    assert (outcome.duplicates.exact, outcome.duplicates.near) == (1, 0)


def test_a_fingerprint_of_a_huge_query_takes_little_memory():
    """A record's text may have 16 million characters."""
    program = """
from drama.data.duplicates import fingerprint, similarity
from drama.data.records import Document, Record
def peak():  # of this program only: ru_maxrss starts with what the parent had when it forked
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
text = "bees and bread " * 200_000
before = peak()
fingerprint(Record(text, (Document("p"),)))
fingerprint(Record("", (Document(text, id="p"),)))
assert similarity(text, text) == 1
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 150_000  # KiB; all windows of it at once are 500 MB
