"""Where test sets are: folders of one, or of one a language, in the layouts that upstream uses.

* `beir`: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv.
* `parquet`: corpus/*.parquet, queries/*.parquet, qrels/SPLIT.tsv; BeIR/NAME and BeIR/NAME-qrels of
  the hub, the second as qrels/ in the first.
* `miracl`: miracl-v1.0-LANG/topics/*-SPLIT.tsv, qrels/*-SPLIT.tsv; beside it
  miracl-corpus-v1.0-LANG/docs-N.jsonl.
* `mldr`: mldr-v1.0-LANG/corpus.jsonl and SPLIT.jsonl, whose lines have positive_passages.

.jsonl and .tsv may be packed (.gz, .xz, .zst). What is not in BEIR's layout is rewritten to it once
(`upstream.py`), so everything else reads one layout.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from drama.console import console
from drama.data.beir import corpus_file, read_corpus, read_qrels, read_queries
from drama.data.lines import PACKED_SUFFIXES
from drama.errors import UserError
from drama.files import replacing, stamp
from drama.retrieve.corpus import Corpus
from drama.retrieve.measures import Qrels
from drama.retrieve.run import check_ids

Layout = Literal["beir", "parquet", "miracl", "mldr"]
FORMAT_VERSION = 1
_LANGUAGE = re.compile(
    r"(?:(?P<group>miracl|mldr)-v[\d.]+-)?(?P<lang>[a-z]{2,3}(?:[-_][A-Za-z]{2,4})?)"
)


@dataclass(frozen=True)
class Dataset:
    """One test set on disk. `name` is what its figures go by; averages are taken per `group` too.

    `queries` and `documents` are how many the published set has, 0 where that is not known:
    published figures stand beside ours only where ours are of as many.
    """

    name: str
    layout: Layout
    folder: Path
    split: str
    group: str = ""
    lang: str = ""
    queries: int = 0
    documents: int = 0


@dataclass(frozen=True)
class Facts:
    """What a set holds. `sha256` is over corpus, judged queries and judgements."""

    sha256: str
    num_documents: int
    num_queries: int
    num_judgements: int
    num_unknown: int  # judgements of documents that the corpus lacks; they count as missed, as ever
    unknown: str = ""  # the first of them


def find_datasets(folder: str | Path, split: str | None = None) -> list[Dataset]:
    """The test sets in a folder: itself, or one a sub-folder (a language each, as a rule).

    Args:
        split: default test, of MIRACL dev.

    Raises:
        UserError: neither.
    """
    folder = Path(folder)
    name = folder.resolve().name
    if layout := _layout(folder, split):
        return [_named(Dataset(name, layout, folder, split or _usual_split(layout)))]
    found = []
    for child in sorted(folder.iterdir()) if folder.is_dir() else []:
        if child.is_dir() and (layout := _layout(child, split)):
            inner = Dataset(child.name, layout, child, split or _usual_split(layout))
            found.append(_named(inner, group=name))
    if not found:
        raise UserError(
            f"{folder} is no test set; give a BEIR folder (corpus.jsonl, queries.jsonl, qrels/), a "
            "folder of them, or MIRACL or MLDR as the hub has them"
        )
    return found


def at_folder(folder: Path, split: str) -> Dataset | None:
    """The one test set at a folder, or None."""
    layout = _layout(folder, split)
    return Dataset(folder.name, layout, folder, split) if layout else None


def beir_folder(dataset: Dataset, place: Path) -> Path:
    """The set in BEIR's layout: its own folder, or what is rewritten below `place`, once.

    Raises:
        UserError: faulty files.
    """
    if dataset.layout == "beir":
        return dataset.folder
    from drama.retrieve.upstream import rewrite

    return rewrite(dataset.layout, dataset.folder, dataset.split, place / "beir")


def read_judged(folder: Path, split: str) -> tuple[dict[str, str], Qrels]:
    """The judged queries, id to text, and their judgements.

    Raises:
        UserError: faulty files, an unknown split, or a judged query that is unknown.
    """
    qrels = read_qrels(folder, split)
    texts = read_queries(folder)
    for query_id in qrels:
        if query_id not in texts:
            raise UserError(f"{folder}: qrels {split} judge query '{query_id}', which is unknown")
    return {query_id: texts[query_id] for query_id in qrels}, qrels


def read_facts(folder: Path, split: str, cache: Path | None) -> Facts:
    """Read a BEIR folder through once; `cache` spares that as long as its files stay the same.

    Raises:
        UserError: an empty corpus, a document or query that comes twice, an id that a run file
            cannot hold, or faulty files.
    """
    inputs = [FORMAT_VERSION, split, stamp(folder)]
    if cache is not None and (stored := _stored(cache, inputs)) is not None:
        return _told(stored, folder, split)
    queries, qrels = read_judged(folder, split)
    if next(iter(read_corpus(folder)), None) is None:
        raise UserError(f"{folder} holds no documents")
    corpus = Corpus.scan(corpus_file(folder))
    check_ids(queries, folder)
    check_ids(corpus.ids, corpus.path)
    known = set(corpus.ids)
    unknown = [id_ for grades in qrels.values() for id_ in grades if id_ not in known]
    judged = json.dumps([queries, qrels], sort_keys=True).encode()
    facts = Facts(
        sha256=hashlib.sha256(corpus.sha256.encode() + judged).hexdigest(),
        num_documents=len(corpus.ids),
        num_queries=len(qrels),
        num_judgements=sum(map(len, qrels.values())),
        num_unknown=len(unknown),
        unknown=unknown[0] if unknown else "",
    )
    if cache is not None:
        with replacing(cache) as temporary:
            temporary.write_text(json.dumps({"inputs": inputs, "facts": asdict(facts)}) + "\n")
    return _told(facts, folder, split)


def check_names(datasets: Sequence[Dataset]) -> None:
    """Refuse two sets of one name.

    Raises:
        UserError: there are two.
    """
    seen: dict[str, Path] = {}
    for dataset in datasets:
        if dataset.name in seen:
            raise UserError(
                f"two test sets are called {dataset.name}, {seen[dataset.name]} and "
                f"{dataset.folder}, and figures go by that name; rename one folder"
            )
        seen[dataset.name] = dataset.folder


def packed(folder: Path, name: str) -> Path | None:
    """A file that may be packed."""
    paths = (folder / f"{name}{suffix}" for suffix in PACKED_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _layout(folder: Path, split: str | None) -> Layout | None:
    if any(folder.glob("corpus/*.parquet")) and any(folder.glob("queries/*.parquet")):
        return "parquet"
    if any(folder.glob("topics/*.tsv*")) and (folder / "qrels").is_dir():
        return "miracl"
    if packed(folder, "corpus.jsonl") is None:
        return None
    if packed(folder, "queries.jsonl") is None and packed(folder, f"{split or 'test'}.jsonl"):
        return "mldr"
    return "beir"


def _usual_split(layout: Layout) -> str:
    return "dev" if layout == "miracl" else "test"


def _named(dataset: Dataset, group: str = "") -> Dataset:
    """With language and group as the folder's name tells them."""
    match = _LANGUAGE.fullmatch(dataset.folder.resolve().name)
    if match and (match["group"] or group):
        group, lang = match["group"] or group, match["lang"]
        return replace(dataset, name=f"{group}-{lang}", group=group, lang=lang)
    return replace(dataset, group=group)


def _stored(cache: Path, inputs: list[Any]) -> Facts | None:
    """The facts in a file; None where it is absent, of other inputs, damaged or incomplete."""
    try:
        stored = json.loads(cache.read_text(encoding="utf-8"))
        return Facts(**stored["facts"]) if stored["inputs"] == inputs else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _told(facts: Facts, folder: Path, split: str) -> Facts:
    if facts.num_unknown:
        console.print(
            f"{folder} {split}: {facts.num_unknown:,} judgements name documents that the corpus "
            f"lacks ('{facts.unknown}' first); they count as missed",
            soft_wrap=True,
            markup=False,
        )
    return facts
