"""The recipe of an augmentation: what it refuses, and how documents are shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from drama.augment.crops import CropOptions
from drama.augment.recipe import AugmentRecipe
from drama.augment.rerank import RerankOptions
from drama.augment.windows import MINING, PAPER, RERANK
from drama.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MINIMAL: dict[str, Any] = {
    "name": "small",
    "output": "runs/small",
    "teacher": {"path": "teacher"},
    "llm": {"model": "tiny"},
    "corpora": {"en": {"sources": ["a.jsonl"], "share": 2}, "de": {"sources": "b.jsonl"}},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def fault(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        AugmentRecipe.load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"recipe {path}: ")


def test_defaults_are_the_papers(path: Path) -> None:
    recipe = AugmentRecipe.load(path, ["pairs.sft={source: p.jsonl, mine: {}}"])
    kinds = recipe.kinds
    assert recipe.corpus_kinds == ["crops", "queries", "rerank"]
    assert kinds.triplets is None
    assert kinds.crops is not None
    assert kinds.crops.options(7) == CropOptions(seed=7)
    assert kinds.queries is not None
    assert kinds.queries.windows() == PAPER
    assert (kinds.queries.temperature, kinds.queries.top_p) == (0.8, 0.9)
    assert kinds.rerank is not None
    assert kinds.rerank.options() == RerankOptions(RERANK)
    assert (kinds.rerank.temperature, kinds.rerank.top_p) == (0, 1)
    mined = recipe.pairs["sft"].mine
    assert mined is not None
    assert mined.windows() == MINING
    assert recipe.corpora["de"].sources == ["b.jsonl"]


def test_the_shipped_one_is_the_papers_mix() -> None:
    recipe = AugmentRecipe.load(ROOT / "recipes" / "augment-drama.yaml")
    assert recipe.drawn() == {"enweb": 500_000, "mwiki": 250_000, "mweb": 250_000}
    plain = AugmentRecipe.load(ROOT / "recipes" / "augment-drama.yaml", ["kinds={}"])
    assert recipe.kinds == plain.kinds  # what it spells out are the defaults


def test_a_saved_recipe_reads_back_equal(path: Path, tmp_path: Path) -> None:
    sets = ["kinds.rerank.positives=1", "kinds.crops.chars=5-50", "kinds.triplets={number: 9}"]
    recipe = AugmentRecipe.load(path, sets)
    recipe.save(tmp_path / "run" / "recipe.yaml")
    assert AugmentRecipe.load(tmp_path / "run" / "recipe.yaml") == recipe
    assert recipe.kinds.rerank is not None
    assert recipe.kinds.rerank.positives == "1-1"


@pytest.mark.parametrize(
    ("total", "shares", "want"),
    [
        (400, [2, 1, 1], [200, 100, 100]),
        (401, [2, 1, 1], [200, 101, 100]),
        (10, [1, 1, 1], [3, 4, 3]),
        (7, [0.5, 0.25, 0.25], [4, 1, 2]),
        (1000, [1], [1000]),
    ],
)
def test_documents_are_shared_out_to_the_last_one(
    path: Path, total: int, shares: list[float], want: list[int]
) -> None:
    corpora = {f"c{n}": {"sources": ["x"], "share": share} for n, share in enumerate(shares)}
    tree = {**MINIMAL, "corpora": corpora, "documents": total}
    drawn = list(AugmentRecipe.from_tree(tree).drawn().values())
    assert drawn == want
    assert sum(drawn) == total
    exact = [total * share / sum(shares) for share in shares]
    assert all(abs(got - right) <= 1 for got, right in zip(drawn, exact, strict=True))


def test_documents_of_each_corpus_or_all(path: Path) -> None:
    assert AugmentRecipe.load(path).drawn() == {"en": None, "de": None}
    one = AugmentRecipe.load(path, ["corpora.de.documents=5"])
    assert one.drawn() == {"en": None, "de": 5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind={}", "unknown key kind (did you mean 'kinds'?)"),
        ("kinds.crop={}", "unknown key kinds.crop (did you mean 'crops'?)"),
        ("kinds.crops.dept=3", "unknown key kinds.crops.dept (did you mean 'depth'?)"),
        ("corpora.en.shares=3", "unknown key corpora.en.shares (did you mean 'share'?)"),
        ("pairs.x={source: a, min: {}}", "unknown key pairs.x.min (did you mean 'mine'?)"),
        ("llm.prices={prompt_per_million: 1}", "llm.prices.completion_per_million is missing"),
        ("corpora={}", "corpora: "),
        ("corpora.en.share=0", "corpora.en.share: "),
        ("kinds.crops.negatives=5-50", "kinds.crops: positives 1-10 must end before negatives 5"),
        ("kinds.queries.positives=ten", "kinds.queries.positives: 'ten' is no range"),
        ("kinds.rerank.step=30", "kinds.rerank: window 20, step 30"),
        ("kinds.triplets={number: 3, languages: [xx]}", "kinds.triplets: languages: 'xx' is not"),
        ("kinds.queries=null", "kinds.rerank orders documents for the queries of kinds.queries"),
        ("kinds={crops: null, queries: null, rerank: null}", "kinds: give one of crops, queries"),
        ("llm=null", "kinds.queries asks a language model, but llm is missing"),
        ("pairs.en-crops={source: a}", "pairs.en-crops: corpora.en has a file of this name"),
        ("pairs.en={source: a}", "pairs.en: corpora.en has a file of this name"),
        ("pairs.triplets={source: a}", "pairs.triplets: kinds.triplets has a file of this name"),
        ("corpora={a/b: {sources: x}}", "corpora.a/b: the name becomes a file's"),
        ("documents=1", "documents 1 is too few to be shared out"),
    ],
)
def test_one_line_says_what_is_wrong(path: Path, override: str, message: str) -> None:
    assert fault(path, override).startswith(message)


def test_documents_are_not_said_twice(path: Path) -> None:
    said = fault(path, "documents=10", "corpora.en.documents=5")
    assert said.startswith("documents is shared out among the corpora, but corpora.en.documents is")


def test_crops_alone_need_no_model(path: Path) -> None:
    sets = ["llm=null", "kinds={queries: null, rerank: null}"]
    assert AugmentRecipe.load(path, sets).corpus_kinds == ["crops"]
