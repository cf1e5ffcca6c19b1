"""The recipe of a whole augmentation: corpora by share, the kinds of records that each gives, pairs
that exist, and the shards of all of them. One strict YAML, as for training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from drama.augment.crops import CropOptions
from drama.augment.rerank import RerankOptions
from drama.augment.teacher import Search
from drama.augment.triplets import SOURCE, TripletOptions
from drama.augment.windows import MINING, PAPER, RERANK, Own, Windows, parse_ranks, spell_ranks
from drama.settings import Positive, Settings, Strict

NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a corpus or of pairs: it becomes a file's
CORPUS_KINDS = ("crops", "queries", "rerank")

Share = Annotated[float, Field(gt=0)]
# as the command line writes ranks; YAML reads a single one as a number
Ranks = Annotated[str, BeforeValidator(lambda value: spell_ranks(parse_ranks(str(value))))]
Strings = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]
PositiveAware = Annotated[float, Field(gt=0, le=1)]
Chars = Annotated[int, Field(ge=50)]


class TeacherRecipe(Strict):
    """Who ranks the documents. The paper has one retriever for English and one for the rest."""

    path: Path  # a retriever of ours, or any folder that sentence-transformers loads
    search: Search = "flat"  # hnsw: many millions of documents on a CPU


class PricesRecipe(Strict):
    """What the server takes for a million tokens, in any currency."""

    prompt_per_million: Annotated[float, Field(ge=0)]
    completion_per_million: Annotated[float, Field(ge=0)]


class LLMRecipe(Strict):
    """Who writes and orders. Only `model` and `extra` are part of what is asked."""

    model: str  # its name at the server
    base_url: str = "http://localhost:8000/v1"
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: Positive = 64  # requests in flight
    extra: dict[str, Any] = Field(default={})  # fields for every request
    max_tokens_total: Annotated[int, Field(ge=0)] | None = None  # that one start may pay for
    tokenizer: Path | None = None  # the model's own folder, for the estimate; else 4 bytes a token
    prices: PricesRecipe | None = None


class RankedRecipe(Strict):
    """Which ranks of the teacher's list become what; see `windows.Windows`."""

    depth: Positive = PAPER.depth
    positives: Ranks = spell_ranks((1, 10))
    negatives: Ranks = spell_ranks(PAPER.negatives)
    positive_aware: PositiveAware | None = None
    own: Own = PAPER.own

    @model_validator(mode="after")
    def _fits(self) -> RankedRecipe:
        self.windows()  # a UserError is a ValueError
        return self

    def windows(self) -> Windows:
        return Windows(
            self.depth,
            parse_ranks(self.positives),
            parse_ranks(self.negatives),
            self.positive_aware,
            self.own,
        )


class CropsRecipe(RankedRecipe):
    """A sentence of each document as its query."""

    chars: Ranks = "20-300"

    def options(self, seed: int) -> CropOptions:
        return CropOptions(self.windows(), seed, *parse_ranks(self.chars))


class DrawnRecipe(Strict):
    """How the model draws its answers."""

    max_tokens: Positive = 256  # of one answer
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    prompt: Path | None = None  # in the place of the shipped one


class QueriesRecipe(RankedRecipe, DrawnRecipe):
    """A query that the model writes for each document."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    document_chars: Chars = 2000


class RerankRecipe(DrawnRecipe):
    """The queries again, their documents in the model's order."""

    depth: Positive = RERANK.depth
    positives: Ranks = spell_ranks((1, 1))
    negatives: Ranks = spell_ranks(RERANK.negatives)
    positive_aware: PositiveAware | None = None
    window: Positive = 20
    step: Positive = 10
    passage_chars: Chars = 1200

    @model_validator(mode="after")
    def _fits(self) -> RerankRecipe:
        self.options()
        return self

    def options(self) -> RerankOptions:
        windows = Windows(
            self.depth,
            parse_ranks(self.positives),
            parse_ranks(self.negatives),
            self.positive_aware,
        )
        return RerankOptions(windows, self.window, self.step, self.passage_chars)


class TripletsRecipe(DrawnRecipe):
    """Query, positive and negative written without a corpus."""

    number: Positive
    languages: Strings = Field(default=["en"])
    max_tokens: Positive = 1536
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    tasks_prompt: Path | None = None
    share: Share | None = None  # of training batches; by default that of its records

    @model_validator(mode="after")
    def _fits(self) -> TripletsRecipe:
        self.options()
        return self

    def options(self) -> TripletOptions:
        return TripletOptions(self.number, tuple(self.languages), self.tasks_prompt)


class KindsRecipe(Strict):
    """What is made; null leaves one out."""

    crops: CropsRecipe | None = CropsRecipe()
    queries: QueriesRecipe | None = QueriesRecipe()
    rerank: RerankRecipe | None = RerankRecipe()
    triplets: TripletsRecipe | None = None


class CorpusRecipe(Strict):
    """Text that queries are made from, and that is searched for them."""

    sources: Strings  # whatever `drama augment crops` takes
    share: Share = 1.0  # of `documents`, and of training batches
    documents: Positive | None = None  # to draw; default by share of the recipe's, or all
    text: str | None = None  # the text stands in this column
    teacher: Path | None = None  # in the place of teacher.path


class MineRecipe(Strict):
    """New hard negatives for pairs; see `drama mine`."""

    corpus: list[str] = Field(default=[])  # what is searched; default the pairs' documents
    depth: Positive = MINING.depth
    negatives: Ranks = spell_ranks(MINING.negatives)
    positive_aware: PositiveAware | None = MINING.share
    teacher: Path | None = None  # in the place of teacher.path

    @model_validator(mode="after")
    def _fits(self) -> MineRecipe:
        self.windows()
        return self

    def windows(self) -> Windows:
        return Windows(self.depth, None, parse_ranks(self.negatives), self.positive_aware)


class PairsRecipe(Strict):
    """Pairs that exist. They enter as they are, but for mined negatives."""

    source: str  # any layout that `drama shard` reads
    share: Share | None = None  # of training batches; by default that of its records
    mine: MineRecipe | None = None


class ShardsOut(Strict):
    """How the shards are written; see `drama shard`."""

    shard_mb: Positive = 256
    tokenizer: str | None = None  # a model folder: store token ids too
    query_prefix: str = "Query: "
    document_prefix: str = ""
    max_tokens: Positive = 8192
    decontaminate: list[Path] = Field(default=[])  # BEIR folders


class AugmentRecipe(Settings):
    """One augmentation. `output` is the run folder."""

    teacher: TeacherRecipe
    llm: LLMRecipe | None = None
    corpora: dict[str, CorpusRecipe] = Field(min_length=1)
    documents: Positive | None = None  # to draw from all corpora together, by share
    kinds: KindsRecipe = KindsRecipe()
    pairs: dict[str, PairsRecipe] = Field(default={})
    shards: ShardsOut = ShardsOut()

    @model_validator(mode="after")
    def _fits(self) -> AugmentRecipe:
        kinds = self.kinds
        if not self.corpus_kinds:
            raise ValueError(f"kinds: give one of {', '.join(CORPUS_KINDS)}")
        if kinds.rerank is not None and kinds.queries is None:
            raise ValueError(
                "kinds.rerank orders documents for the queries of kinds.queries, which is null; "
                "set kinds.rerank null too, or give kinds.queries"
            )
        asked = [name for name in ("queries", "rerank", "triplets") if getattr(kinds, name)]
        if asked and self.llm is None:
            raise ValueError(
                f"kinds.{asked[0]} asks a language model, but llm is missing; give it, or set "
                f"kinds.{asked[0]} null"
            )
        for name, corpus in self.corpora.items():
            if self.documents is not None and corpus.documents is not None:
                raise ValueError(
                    f"documents is shared out among the corpora, but corpora.{name}.documents is "
                    "set too; leave one of them out"
                )
        if 0 in self.drawn().values():
            raise ValueError(
                f"documents {self.documents} is too few to be shared out: a corpus would get none"
            )
        self._fit_names()
        return self

    def _fit_names(self) -> None:
        taken = {SOURCE: "kinds.triplets"}
        for corpus in self.corpora:
            taken |= {f"{corpus}-{kind}": f"corpora.{corpus}" for kind in CORPUS_KINDS}
            taken[corpus] = f"corpora.{corpus}"
        for section, names in (("corpora", self.corpora), ("pairs", self.pairs)):
            for name in names:
                if not NAME.fullmatch(name):
                    raise ValueError(
                        f"{section}.{name}: the name becomes a file's; use letters, digits, - and _"
                    )
                if section == "pairs" and name in taken:
                    raise ValueError(
                        f"pairs.{name}: {taken[name]} has a file of this name; take another"
                    )

    @property
    def corpus_kinds(self) -> list[str]:
        """The kinds that every corpus gives."""
        return [kind for kind in CORPUS_KINDS if getattr(self.kinds, kind) is not None]

    def drawn(self) -> dict[str, int | None]:
        """How many documents of each corpus are drawn; None: all. By share they add up to
        `documents` exactly, each within one of its share."""
        if self.documents is None:
            return {name: corpus.documents for name, corpus in self.corpora.items()}
        return dict(_shared_out(self.documents, self.corpora))


def _shared_out(total: int, corpora: Mapping[str, CorpusRecipe]) -> Iterator[tuple[str, int]]:
    ends = list(accumulate(corpus.share for corpus in corpora.values()))
    marks = [0, *(round(total * end / ends[-1]) for end in ends)]
    for name, (start, end) in zip(corpora, pairwise(marks), strict=True):
        yield name, end - start
