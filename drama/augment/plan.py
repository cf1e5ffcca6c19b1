"""What an augmentation is going to ask, and what it costs: a table, before the first call."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from drama.augment.cache import Totals
from drama.augment.chat import BYTES_PER_TOKEN
from drama.augment.corpus import ABOUT, Survey, survey
from drama.augment.estimate import (
    QUERY_ANSWER,
    RANKED_PASSAGE,
    SAMPLE,
    Expected,
    expected_queries,
    expected_rerank,
    expected_triplets,
    token_counter,
)
from drama.augment.job import Standing
from drama.augment.recipe import AugmentRecipe, LLMRecipe
from drama.augment.teacher import Retrieval
from drama.augment.triplets import SOURCE

Out = Callable[[str], Path]


@dataclass(frozen=True)
class Plan:
    """All jobs of a recipe, and what is paid of them already."""

    rows: list[Expected]
    llm: LLMRecipe | None
    paid: Totals

    @property
    def calls_left(self) -> int:
        return max(0, sum(row.calls for row in self.rows) - self.paid.answers)

    def parts(self) -> Iterator[Table | str]:
        """The table, and below it how it was counted, what is left, and its price."""
        table = Table("records", *("documents", "calls", "prompt", "answers", "tokens from"))
        table.title = "tokens"
        for column in table.columns[1:5]:
            column.justify = "right"
        for row in self.rows:
            told = f"{row.measured:,} answers" if row.measured else "an estimate"
            values = (row.documents, row.calls, row.prompt_tokens, row.completion_tokens)
            table.add_row(
                row.name, *(f"{value:,}" for value in values), told if row.calls else "no model"
            )
        calls, prompt, answers = self._sums()
        table.add_section()
        table.add_row("all", "", f"{calls:,}", f"{prompt:,}", f"{answers:,}")
        yield table
        if self.llm is not None:
            yield from self._notes(self.llm, calls, prompt, answers)

    def _sums(self) -> tuple[int, int, int]:
        rows = self.rows
        return (
            sum(row.calls for row in rows),
            sum(row.prompt_tokens for row in rows),
            sum(row.completion_tokens for row in rows),
        )

    def _notes(self, llm: LLMRecipe, calls: int, prompt: int, answers: int) -> Iterator[str]:
        by = f"by the tokenizer of {llm.tokenizer}" if llm.tokenizer else _BY_BYTES
        yield (
            f"estimates: prompts made of {SAMPLE} documents of each corpus, counted {by}; answers "
            f"assumed, {QUERY_ANSWER} tokens a query and {RANKED_PASSAGE} a passage in an order; "
            "thoughts are not counted, and reranking at most"
        )
        left = (
            max(0, prompt - self.paid.prompt_tokens),
            max(0, answers - self.paid.completion_tokens),
        )
        if self.paid.answers:
            yield (
                f"paid already: {self.paid.answers:,} answers, {self.paid.prompt_tokens:,} + "
                f"{self.paid.completion_tokens:,} tokens; left: {self.calls_left:,} calls, "
                f"{left[0]:,} + {left[1]:,} tokens"
            )
        if llm.prices is not None:
            prices = llm.prices.prompt_per_million, llm.prices.completion_per_million
            costs = [tokens * price / 1e6 for tokens, price in zip(left, prices, strict=True)]
            yield (
                f"price: prompts {costs[0]:,.2f}, answers {costs[1]:,.2f}, together "
                f"{sum(costs):,.2f} (in the money of llm.prices)"
                + (" for what is left" if self.paid.answers else "")
            )
        budget = llm.max_tokens_total
        if budget is not None and budget < sum(left):
            yield (
                f"llm.max_tokens_total {budget:,} pays for {budget / sum(left):.0%} of that; then "
                "the run ends, and the same command goes on"
            )


_BY_BYTES = f"at {BYTES_PER_TOKEN} bytes each (llm.tokenizer would count them)"


def make_plan(
    recipe: AugmentRecipe,
    corpora: Mapping[str, Retrieval],
    out: Out,
    paid: Totals,
    *,
    keep: bool,
) -> Plan:
    """Read the corpora, and count what their jobs will ask.

    Args:
        out: the file of a job, by its name. keep: copy the corpora into their work folders, as the
            jobs need them; else what is not there yet is read through only.

    Raises:
        UserError: from reading a corpus, fewer documents than are to be drawn, or a tokenizer that
            cannot be read.
    """
    kinds, rows = recipe.kinds, list[Expected]()
    count = token_counter(recipe.llm.tokenizer if recipe.llm else None)
    for name, retrieval in corpora.items():
        found = _survey(retrieval, recipe.seed, keep=keep)
        if kinds.crops is not None:
            rows.append(Expected(f"{name}-crops", found.total))
        written = Standing.of(out(f"{name}-queries"))
        if kinds.queries is not None:
            rows.append(
                expected_queries(
                    f"{name}-queries", found.total, found.sample, kinds.queries, count, written
                )
            )
        if kinds.rerank is not None:
            standing = Standing.of(out(f"{name}-rerank"))
            queries = written.records if written.is_done else found.total
            rows.append(
                expected_rerank(
                    f"{name}-rerank", found.total, queries, found.sample, kinds.rerank, count,
                    standing,
                )
            )  # fmt: skip
    if kinds.triplets is not None:
        standing = Standing.of(out(SOURCE))
        rows.append(expected_triplets(SOURCE, recipe.seed, kinds.triplets, count, standing))
    return Plan(rows, recipe.llm, paid)


def _survey(retrieval: Retrieval, seed: int, *, keep: bool) -> Survey:
    """How many documents are worked on, and some of them."""
    if keep or (retrieval.work / "corpus" / ABOUT).is_file():
        corpus = retrieval.read()
        numbers = random.Random(seed).sample(range(len(corpus)), min(SAMPLE, len(corpus)))
        return Survey(len(corpus), [corpus[number].document for number in sorted(numbers)])
    found = survey(retrieval.sources, retrieval.text_column, sample=SAMPLE, seed=seed)
    if retrieval.draw is None:
        return found
    retrieval.draw.check(found.total, ", ".join(source.path for source in retrieval.sources))
    return Survey(retrieval.draw.number, found.sample)
