"""A whole augmentation, as its recipe says: from corpora and pairs to shards with named sources.

RUN/recipe.yaml  work/CORPUS/  answers.sqlite  records/{CORPUS-KIND,PAIRS}.jsonl.gz  shards/
augment.html

What costs nothing comes first: corpora, vectors, crops, mined pairs. Then the language model is
asked, corpus by corpus. Every step finds what it did before, so the same command goes on after
whatever ended it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drama.augment.asking import Asking
from drama.augment.cache import Cache, Totals
from drama.augment.corpus import Draw, read_records
from drama.augment.crops import make_crops
from drama.augment.endpoint import ALIVE_S, Endpoint
from drama.augment.given import Given
from drama.augment.llm import IncompleteError
from drama.augment.mine import mine
from drama.augment.page import write_run
from drama.augment.patience import Limits
from drama.augment.plan import Plan, make_plan
from drama.augment.prompts import Prompt
from drama.augment.queries import make_queries
from drama.augment.recipe import AugmentRecipe, CorpusRecipe, DrawnRecipe, PairsRecipe
from drama.augment.rerank import rerank
from drama.augment.teacher import Retrieval
from drama.augment.triplets import SOURCE, make_triplets
from drama.console import console
from drama.data.beir import is_beir
from drama.data.manifest import MANIFEST
from drama.data.sharding import ShardingOptions, available_cores, shard_sources
from drama.data.sources import Source
from drama.data.writer import check_target
from drama.errors import UserError, nearest
from drama.files import locked, stamp
from drama.settings import check_same_run
from drama.tokenizer import load_tokenizer

# of the llm, what no answer depends on
FREE = {
    "llm": {"base_url", "api_key_env", "concurrency", "max_tokens_total", "tokenizer", "prices"}
}
TEACHER_FILES = ("config.json", "modules.json")
Report = dict[str, Any]


def show_plan(recipe: AugmentRecipe) -> Plan:
    """Check the recipe's parts, read its corpora, and print what it will ask and cost. Nothing is
    written, loaded or sent.

    Raises:
        UserError: a part that is missing or cannot be; a run folder of another recipe.
    """
    return _Run(recipe).show_plan(dry=True)


def augment(recipe: AugmentRecipe) -> Path:
    """Make what the recipe says, or what of it is missing; return RUN/shards.

    Raises:
        UserError: as `show_plan`, and a server that nobody reaches, before the first paid call; a
            budget that is spent, or what ended a job: the same call goes on.
    """
    run = _Run(recipe)
    recipe.output.mkdir(parents=True, exist_ok=True)
    with locked(recipe.output / ".lock"):
        return run.run()


class _Run:
    """A recipe whose parts were all found; nothing is written yet."""

    def __init__(self, recipe: AugmentRecipe) -> None:
        self.recipe, self.output = recipe, recipe.output
        self.stored = self.output / "recipe.yaml"
        self.cache = self.output / "answers.sqlite"
        self.reports: dict[str, Report] = {}
        if self.stored.is_file():
            check_same_run(AugmentRecipe.load(self.stored), recipe, FREE)
        check_target(self.output / "shards")
        drawn = recipe.drawn()
        self.corpora = {
            name: self._retrieval(name, corpus, drawn[name])
            for name, corpus in recipe.corpora.items()
        }
        self.pairs = {name: _source(f"pairs.{name}", p.source) for name, p in recipe.pairs.items()}
        self.mined = {
            name: self._searched(name, pairs)
            for name, pairs in recipe.pairs.items()
            if pairs.mine is not None
        }
        self.before = Totals()  # of the cache, when this start began
        self.paid = 0  # tokens, by the jobs of this start that are done
        self._check()

    def _retrieval(self, name: str, corpus: CorpusRecipe, drawn: int | None) -> Retrieval:
        return Retrieval(
            tuple(_source(f"corpora.{name}", source) for source in corpus.sources),
            self._teacher(f"corpora.{name}.teacher", corpus.teacher),
            self.output / "work" / name,
            corpus.text,
            self.recipe.teacher.search,
            None if drawn is None else Draw(drawn, self.recipe.seed),
        )

    def _searched(self, name: str, pairs: PairsRecipe) -> Retrieval:
        assert pairs.mine is not None
        sources = pairs.mine.corpus or [pairs.source]
        return Retrieval(
            tuple(_source(f"pairs.{name}.mine", source) for source in sources),
            self._teacher(f"pairs.{name}.mine.teacher", pairs.mine.teacher),
            self.output / "work" / name,
            search=self.recipe.teacher.search,
        )

    def _teacher(self, where: str, own: Path | None) -> str:
        path = own or self.recipe.teacher.path
        if not any((path / name).is_file() for name in TEACHER_FILES):
            raise UserError(
                f"{where if own else 'teacher.path'} {path} is no model folder; give a retriever "
                "of ours, or any that sentence-transformers loads"
            )
        return str(path)

    def _check(self) -> None:
        """Refuse what would only show after the first paid call."""
        kinds, shards = self.recipe.kinds, self.recipe.shards
        for name, source in self.pairs.items():
            where, record = next(read_records(source))
            if not isinstance(record, UserError) and record.is_text:
                record = UserError("a text without a query; give pairs")
            if isinstance(record, UserError):
                raise UserError(f"pairs.{name}: {where}: {record}")
        for folder in shards.decontaminate:
            if not is_beir(folder):
                raise UserError(f"shards.decontaminate: {folder} is no BEIR folder (corpus.jsonl)")
        if shards.tokenizer is not None:
            load_tokenizer(shards.tokenizer)
        for kind in ("queries", "rerank", "triplets"):
            if (options := getattr(kinds, kind)) is not None:
                Prompt.load(kind, options.prompt)
                self._asking(options).open()
        if kinds.triplets is not None:
            Prompt.load("tasks", kinds.triplets.tasks_prompt)

    def run(self) -> Path:
        """All steps, or what of them is missing."""
        if not all(path.exists() for path in self._outs()):
            self._check_server()
            self.show_plan()
            self.recipe.save(self.stored)
        for name, retrieval in self.corpora.items():
            self._crops(name, retrieval)
        for name, retrieval in self.mined.items():
            self._mined(name, retrieval)
        for name, retrieval in self.corpora.items():
            self._queries(name, retrieval)
            self._rerank(name, retrieval)
        self._triplets()
        shards = self._shards()
        page = write_run(
            [self.out(name) for name in self.reports],
            self.output / "augment.html",
            f"Augmentation {self.recipe.name}",
        )
        _say(f"{page}: what was kept, and examples; {page.with_suffix('.json').name} has the same")
        _say(f"next: deepspeed launchers/train.py --recipe RECIPE --set 'data.shards=[{shards}]'")
        return shards

    def show_plan(self, *, dry: bool = False) -> Plan:
        """Read the corpora and print what is going to be asked. dry: keep none of them."""
        self.before = self._totals()
        plan = make_plan(self.recipe, self.corpora, self.out, self.before, keep=not dry)
        for part in plan.parts():
            console.print(part, markup=False, highlight=False, soft_wrap=True)
        if dry and plan.calls_left:
            try:
                self._check_server()
            except UserError as error:
                _say(f"this needs no server, but the run will: {error}")
        return plan

    def out(self, name: str) -> Path:
        """The file of a kind of a corpus, of mined pairs, or of the triplets."""
        return self.output / "records" / f"{name}.jsonl.gz"

    def _outs(self, *, paid: bool = False) -> list[Path]:
        """All files of records that come of the recipe. paid: only those that the model makes."""
        kinds = [kind for kind in self.recipe.corpus_kinds if not paid or kind != "crops"]
        names = [f"{name}-{kind}" for name in self.corpora for kind in kinds]
        names += [SOURCE] if self.recipe.kinds.triplets else []
        return [self.out(name) for name in (*names, *(() if paid else self.mined))]

    def _crops(self, name: str, retrieval: Retrieval) -> None:
        crops, out = self.recipe.kinds.crops, self.out(f"{name}-crops")
        if crops is not None:
            options = crops.options(self.recipe.seed)
            self._done(f"{name}-crops", lambda: make_crops(retrieval, out, options))
        elif not all(path.exists() for path in self._outs(paid=True)):
            retrieval.open()  # a teacher that fails does so before anything is paid

    def _mined(self, name: str, retrieval: Retrieval) -> None:
        given, pairs, out = self.recipe.pairs[name].mine, self.pairs[name], self.out(name)
        assert given is not None
        windows = given.windows()
        self._done(name, lambda: mine([pairs], retrieval, out, windows))

    def _queries(self, name: str, retrieval: Retrieval) -> None:
        queries, out = self.recipe.kinds.queries, self.out(f"{name}-queries")
        if queries is not None:
            windows, chars = queries.windows(), queries.document_chars
            self._asked(
                f"{name}-queries",
                queries,
                lambda asking: make_queries(retrieval, out, asking, windows, chars),
            )

    def _rerank(self, name: str, retrieval: Retrieval) -> None:
        """Of the queries that the model wrote, as in the paper, section 3.1.3."""
        reranked, out = self.recipe.kinds.rerank, self.out(f"{name}-rerank")
        if reranked is not None:
            given, options = [Source.parse(self.out(f"{name}-queries"))], reranked.options()
            self._asked(
                f"{name}-rerank",
                reranked,
                lambda asking: rerank(given, retrieval, out, asking, options),
            )

    def _triplets(self) -> None:
        if (triplets := self.recipe.kinds.triplets) is not None:
            out, options = self.out(SOURCE), triplets.options()
            self._asked(SOURCE, triplets, lambda asking: make_triplets(out, asking, options))

    def _asked(self, name: str, options: DrawnRecipe, job: Callable[[Asking], Report]) -> None:
        try:
            self._done(name, lambda: job(self._asking(options)))
        except IncompleteError:
            llm = self.recipe.llm
            assert llm is not None
            assert llm.max_tokens_total is not None
            paid = self._totals().tokens - self.before.tokens
            raise UserError(
                f"llm.max_tokens_total {llm.max_tokens_total:,} is spent ({paid:,} tokens were "
                f"paid) and {name} not complete; the same command goes on, for as many more"
            ) from None

    def _done(self, name: str, job: Callable[[], Report]) -> None:
        was_there = self.out(name).exists()
        report = self.reports[name] = job()
        if not was_there:
            usage = report.get("llm_this_run", {})
            self.paid += usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
            dropped = ", ".join(f"{why} {count:,}" for why, count in report["dropped"].items())
            text = f"{name}: {report['records']:,} records of {report['read']:,}"
            _say(f"{text}; dropped: {dropped}" if dropped else text)
            if bare := report["negatives"].get("0", 0):
                _say(f"  without a hard negative: {bare:,}; the corpus is short for these ranks")

    def _asking(self, options: DrawnRecipe) -> Asking:
        llm = self.recipe.llm
        assert llm is not None
        left = llm.max_tokens_total
        if left is not None:  # one budget for all jobs of this start
            left = max(0, left - self.paid)
        return Asking(
            llm.model,
            llm.base_url,
            self.cache,
            options.max_tokens,
            options.temperature,
            options.top_p,
            self.recipe.seed,
            options.prompt,
            llm.extra,
            llm.api_key_env,
            Limits(llm.concurrency, max_tokens_total=left),
        )

    def _totals(self) -> Totals:
        if not self.cache.is_file():
            return Totals()
        cache = Cache(self.cache)
        try:
            return cache.totals()
        finally:
            cache.close()

    def _check_server(self) -> None:
        """See that somebody answers, at no cost; without a budget nobody is asked."""
        llm = self.recipe.llm
        if llm is None or llm.max_tokens_total == 0:
            return
        if all(out.exists() for out in self._outs(paid=True)):
            return
        endpoint = Endpoint(llm.base_url, llm.model, llm.api_key_env, ALIVE_S)
        try:
            names = asyncio.run(_models(endpoint))
        except UserError as error:
            raise UserError(
                f"{error}; start the server, or do what needs none with "
                "`--set llm.max_tokens_total=0`"
            ) from None
        if names and llm.model not in names:
            _say(f"{llm.base_url} does not list {llm.model}{nearest(llm.model, names)}")

    def _shards(self) -> Path:
        out, shards, sources = self.output / "shards", self.recipe.shards, self._sources()
        read = [source.path for source in sources] + [str(path) for path in shards.decontaminate]
        changed = [file[2] for path in read for file in stamp(path)]
        manifest = out / MANIFEST
        if manifest.is_file() and manifest.stat().st_mtime_ns >= max(changed):
            _say(f"{out} is there already")
            return out
        options = ShardingOptions(
            shard_bytes=shards.shard_mb * 2**20,
            tokenizer=shards.tokenizer,
            query_prefix=shards.query_prefix,
            document_prefix=shards.document_prefix,
            max_tokens=shards.max_tokens,
            decontaminate=tuple(map(str, shards.decontaminate)),
        )
        made = shard_sources(sources, out, options, workers=available_cores()).manifest
        counts = ", ".join(f"{name} {count:,}" for name, count in made.counts("source").items())
        _say(f"{out}: {made.num_records:,} records in {len(made.shards)} shards ({counts})")
        for reason, count in sorted(made.left_out.items()):
            _say(f"  left out, {reason}: {count:,}")
        return out

    def _sources(self) -> list[Source]:
        """What goes into the shards, with its part of a training batch: of a corpus its share, in
        equal parts for its kinds; of all else the given share, or what its records are beside
        those of the corpora."""
        recipe, kinds = self.recipe, self.recipe.corpus_kinds
        names = {
            f"{name}-{kind}": corpus.share / len(kinds)
            for name, corpus in recipe.corpora.items()
            for kind in kinds
        }
        made = sum(self.reports[name]["records"] for name in names)
        a_record = sum(corpus.share for corpus in recipe.corpora.values()) / made
        sources = [_named(name, self.out(name), weight) for name, weight in names.items()]
        if (triplets := recipe.kinds.triplets) is not None:
            weight = triplets.share or a_record * self.reports[SOURCE]["records"]
            sources.append(_named(SOURCE, self.out(SOURCE), weight))
        for name, pairs in recipe.pairs.items():
            path = self.out(name) if pairs.mine is not None else self.pairs[name].path
            weight = pairs.share or a_record * len(Given([Source.parse(path)]))
            sources.append(_named(name, path, weight))
        return sources


async def _models(endpoint: Endpoint) -> list[str]:
    endpoint.open()
    try:
        return await endpoint.models()
    finally:
        await endpoint.close()


def _source(where: str, spec: str) -> Source:
    try:
        return Source.parse(spec)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _named(name: str, path: str | Path, weight: float) -> Source:
    return Source(str(path), name, weight, named=True)


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
