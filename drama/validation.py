"""Judge the model while it trains: loss on held-out records, nDCG@10 on BEIR folders.

Every rank encodes its part through the engine (under ZeRO 3 a forward is a collective, so all run
the same number of chunks); rank 0 ranks and judges. Texts are cut where training cuts them.

N documents, Q queries, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from drama.data.batches import RankBatches
from drama.data.beir import qrels_splits, read_corpus, read_qrels, read_queries
from drama.data.stream import ShardSet, open_pairs
from drama.errors import UserError
from drama.gather import Columns
from drama.gradcache import GradCache
from drama.loading import check_held_out
from drama.recipe import Recipe
from drama.retrieve.measures import Qrels, cutoff, score
from drama.retrieve.run import Run, without_queries
from drama.tokenizer import Kind

METRIC = "nDCG@10"
DEPTH = cutoff(METRIC)
QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class _Dataset:
    """A BEIR folder as one rank holds it: texts as token rows, ids, judgements."""

    name: str
    document_ids: list[str]
    query_ids: list[str]
    documents: list[list[int]]
    queries: list[list[int]]
    qrels: Qrels


def _place(folder: Path | str) -> str:
    return str(folder.resolve()) if isinstance(folder, Path) else folder.rstrip("/")


class Validator:
    """Holds what `recipe.eval` names, read and tokenised once.

    Raises:
        UserError: a faulty folder, or held-out shards that are among the training ones.
    """

    def __init__(self, recipe: Recipe, batches: RankBatches, step: GradCache) -> None:
        self.recipe, self.batches, self.step = recipe, batches, step
        self.world, self.rank = step.world_size, batches.rank
        self.datasets = [self._read(folder) for folder in recipe.eval.beir]
        self.shards: ShardSet | None = None
        if recipe.eval.shards:
            self.shards = open_pairs(recipe.eval.shards, batches.shards.cache)
        names = [dataset.name for dataset in self.datasets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(
                f"eval.beir: two folders are called {min(twice)}, and figures go by that name; "
                "rename one"
            )
        check_held_out(recipe.eval.shards, batches.shards)

    @property
    def judge(self) -> dict[str, Any]:
        """The data that decide which model is best; bests of different judges do not compare."""
        chosen = self.recipe.eval
        if chosen.beir:
            return {"beir": [_place(folder) for folder in chosen.beir], "split": chosen.split}
        assert self.shards is not None
        return {"shards": self.shards.sha256, "max_records": chosen.max_records}

    def __call__(self) -> dict[str, float]:
        """Figures by name, the same on every rank: `loss`, `ndcg@10 NAME` and their mean."""
        self.step.engine.eval()
        figures: dict[str, float] = {}
        if self.shards is not None:
            figures["loss"] = self._loss(self.shards)
        values = [self._ndcg(dataset) for dataset in self.datasets]
        names = [f"ndcg@10 {dataset.name}" for dataset in self.datasets]
        figures |= dict(zip(names, values, strict=True))
        if values:
            figures["ndcg@10"] = fmean(values)
        self.step.engine.train()
        return figures

    # -- held-out loss ------------------------------------------------------------------------

    def _loss(self, shards: ShardSet) -> float:
        """Mean over the held-out records, in batches as large as those of training."""
        size, total, count = self.recipe.train.batch_size, 0.0, 0
        last = min(len(shards), self.recipe.eval.max_records)
        for first in range(0, last, size):
            batch = range(first, min(first + size, last))
            own = [i for i in batch if i % self.world == self.rank]
            if len(batch) < self.world:  # a rank would have no query
                break
            rows = self.batches.of_records([shards.read(i) for i in own], own, np.zeros(len(own)))
            total += self.step.evaluate(rows) * len(batch)
            count += len(batch)
        if not count:
            raise UserError(f"eval.shards hold {last} records, fewer than {self.world} ranks")
        return total / count

    # -- nDCG ---------------------------------------------------------------------------------

    def _read(self, folder: Path) -> _Dataset:
        splits = qrels_splits(folder)
        wanted = self.recipe.eval.split
        if wanted not in splits:
            raise UserError(f"{folder} has no split {wanted}; it has {', '.join(splits) or 'none'}")
        qrels, texts = read_qrels(folder, wanted), read_queries(folder)
        for query_id in qrels:
            if query_id not in texts:
                raise UserError(f"{folder}: qrels {wanted} judge '{query_id}', which is unknown")
        documents = list(read_corpus(folder))
        if not documents or not qrels:
            raise UserError(
                f"{folder} has nothing to judge: no documents, or no {wanted} judgements"
            )
        data = self.recipe.data
        return _Dataset(
            folder.resolve().name,
            [document.id for document in documents],
            list(qrels),
            self._own_rows([d.full_text for d in documents], "document", data.max_document_tokens),
            self._own_rows([texts[q] for q in qrels], "query", data.max_query_tokens),
            qrels,
        )

    def _own_rows(self, texts: Sequence[str], kind: Kind, max_tokens: int) -> list[list[int]]:
        own = list(texts[self.rank :: self.world])
        rows: list[list[int]] = self.batches.tokenize(own, kind, max_tokens)[0] if own else []
        return rows

    def _ndcg(self, dataset: _Dataset) -> float:
        documents_ND = self._vectors(dataset.documents, len(dataset.document_ids))
        queries_QD = self._vectors(dataset.queries, len(dataset.query_ids))
        value = torch.zeros((), dtype=torch.float64, device=self.step.device)
        if self.rank == 0:
            run = _run(dataset, queries_QD, documents_ND)
            value += fmean(score(dataset.qrels, run, [METRIC])[METRIC].values())
        if self.world > 1:
            dist.broadcast(value, 0)
        return value.item()

    def _vectors(self, rows: list[list[int]], total: int) -> Tensor:
        """Unit vectors of all ranks' texts, in the order of the folder, [total, D], float32."""
        out_ND = self.step.encode(rows)
        sizes = [len(range(rank, total, self.world)) for rank in range(self.world)]
        columns = Columns([sizes])
        columns.send(F.normalize(out_ND.float(), dim=1))
        by_rank_ND = columns.receive()
        order = np.concatenate([np.arange(rank, total, self.world) for rank in range(self.world)])
        vectors_ND = torch.empty_like(by_rank_ND)
        vectors_ND[torch.from_numpy(order).to(by_rank_ND.device)] = by_rank_ND
        return vectors_ND


def _run(dataset: _Dataset, queries_QD: Tensor, documents_ND: Tensor) -> Run:
    # one more: a query that is itself a document is left out
    depth, run = min(DEPTH + 1, len(documents_ND)), {}
    for first in range(0, len(queries_QD), QUERIES_AT_ONCE):
        scores, found = (queries_QD[first : first + QUERIES_AT_ONCE] @ documents_ND.T).topk(depth)
        for row, (values, columns) in enumerate(zip(scores.tolist(), found.tolist(), strict=True)):
            names = [dataset.document_ids[column] for column in columns]
            run[dataset.query_ids[first + row]] = dict(zip(names, values, strict=True))
    return without_queries(run, DEPTH)


def better(figures: dict[str, float], best: dict[str, Any] | None) -> bool:
    """Whether these figures beat the best so far: by nDCG where there is one, else by the loss.

    What is no number beats nothing and is beaten by any number.
    """
    name, sign = ("ndcg@10", 1) if "ndcg@10" in figures else ("loss", -1)
    new, old = figures[name], math.nan if best is None else float(best[name])
    return math.isfinite(new) and (not math.isfinite(old) or sign * new > sign * old)
