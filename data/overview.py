"""What a folder of shards holds, for people to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from drama.data.manifest import Manifest
from drama.data.stream import ShardSet

BAR = 40
SHOWN_CHARS = 160


def overview(folder: str, examples: int) -> Iterator[RenderableType]:
    """Tables, bars and examples, evenly spread over the records.

    Raises:
        UserError: damaged shards.
    """
    shards = ShardSet([folder])
    manifest = shards.manifests[0]
    yield _about(folder, manifest)
    yield _counts(manifest, "source")
    if set(manifest.counts("lang")) != {""}:
        yield _counts(manifest, "lang")
    if manifest.num_pairs:
        yield _histogram("queries by characters", manifest.query_chars)
    yield _histogram("documents by characters", manifest.document_chars)
    for number in range(min(examples, len(shards))):
        index = number * len(shards) // min(examples, len(shards))
        yield _example(index, shards)


def _about(folder: str, manifest: Manifest) -> Text:
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{folder}: {manifest.num_records:,} records in {len(manifest.shards):,} shards, "
        f"{size / 2**20:,.1f} MiB"
    ]
    if texts := manifest.num_records - manifest.num_pairs:
        lines.append(f"texts without a query: {texts:,}")
    if manifest.tokens:
        tokens = manifest.tokens
        lines.append(
            f"token ids of tokenizer {tokens.tokenizer_sha256[:12]}, at most {tokens.max_tokens:,}"
            f" a text; prefixes {tokens.query_prefix!r} and {tokens.document_prefix!r}"
        )
    for reason, count in manifest.left_out.items():
        lines.append(f"left out, {reason}: {count:,}")
    if manifest.duplicate_queries:
        twice = manifest.duplicate_queries
        lines.append(
            f"{manifest.own_texts} that come twice: {twice.get('exact', 0):,} exactly, "
            f"{twice.get('near', 0):,} nearly"
        )
    return Text("\n".join(lines))


def _counts(manifest: Manifest, key: str) -> Table:
    counts = manifest.counts(key)
    weighted = key == "source" and bool(manifest.weights)
    table = Table(key, "records", "share", "", *(["weight"] if weighted else []))
    most = max(counts.values())
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        share = f"{count / manifest.num_records:.1%}"
        row: list[RenderableType] = [Text(name or "(none)"), f"{count:,}", share, _bar(count, most)]
        if weighted:
            row.append(f"{manifest.weights[name]:g}" if name in manifest.weights else "")
        table.add_row(*row)
    return table


def _histogram(title: str, counts: dict[int, int]) -> Table:
    table = Table("up to", "texts", "", title=title, title_justify="left")
    for bound, count in counts.items():
        table.add_row(f"{bound:,}", f"{count:,}", _bar(count, max(counts.values())))
    return table


def _bar(count: int, most: int) -> str:
    return "█" * max(1, round(BAR * count / most))


def _example(index: int, shards: ShardSet) -> Text:
    record = shards.read(index)
    lines = [f"record {index:,}"]
    if record.is_text:
        named = [("text", record.own_text)]
    else:
        named = [("query", record.prompt + record.query)]
        named += [("positive", document.full_text) for document in record.positives[:2]]
    named += [("negative", document.full_text) for document in record.negatives[:2]]
    for name, text in named:
        lines.append(f"  {name:9}{json.dumps(text[:SHOWN_CHARS], ensure_ascii=False)}")
    if shards.tokens:
        lengths = shards.read_tokens(index).lengths[int(record.is_text) :]
        lines.append(f"  {'tokens':9}{lengths.tolist()}")
    return Text("\n".join(lines))
