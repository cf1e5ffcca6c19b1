"""Suites: which test sets make a benchmark, and where they are, in a YAML.

    name: beir-13                 # its average is published under this name
    metric: nDCG@10               # the headline
    split: test
    folders: ["{name}"]           # of a set, below the root; the first that is there
    hub:                          # what --download fetches
      - {repo: "BeIR/{name}", files: ["corpus/*.parquet"], to: "{name}"}
    datasets:
      - {name: scifact, queries: 300, documents: 5183}

{name}, {lang} and {split} stand for those of a set. A set may have `split`, `lang`, `group` and
`path` (its folder, when no pattern fits) of its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drama.console import console
from drama.errors import UserError, nearest
from drama.retrieve.datasets import Dataset, at_folder
from drama.retrieve.measures import check_metrics

SHIPPED = Path(__file__).with_name("suites")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fetch(_Strict):
    """Files of a dataset repository of the hub, and the folder below the root they go to."""

    repo: str
    files: list[str]
    to: str = "."


class Entry(_Strict):
    """One test set of a suite."""

    name: Name
    path: str | None = None
    split: str | None = None
    lang: str = ""
    group: str = ""
    queries: int = 0
    documents: int = 0


class Suite(_Strict):
    """A benchmark; see the top of the file."""

    name: Name
    metric: str = "nDCG@10"
    split: str = "test"
    folders: list[str] = ["{name}"]
    hub: list[Fetch] = []
    datasets: Annotated[list[Entry], Field(min_length=1)]


def shipped_suites() -> list[str]:
    """The names of the suites that come with the project."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_suite(name: str | Path) -> Suite:
    """A shipped suite by its name, or one from a YAML file.

    Raises:
        UserError: neither, or a file that is no suite.
    """
    path = SHIPPED / f"{name}.yaml" if str(name) in shipped_suites() else Path(name)
    if not path.is_file():
        raise UserError(
            f"no suite '{name}'{nearest(str(name), shipped_suites())}; there are "
            f"{', '.join(shipped_suites())}, or give a YAML file"
        )
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise UserError(f"{path}: {where}: {fault['msg']}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    check_metrics([suite.metric])
    names = [entry.name for entry in suite.datasets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: two datasets are called {twice}")
    return suite


def suite_datasets(suite: Suite, root: str | Path, split: str | None = None) -> list[Dataset]:
    """The sets of a suite below a root folder.

    Raises:
        UserError: one is missing; names it, and where it was looked for.
    """
    found, missing = [], []
    for entry in suite.datasets:
        words = _words(suite, entry, split)
        patterns = [entry.path] if entry.path else suite.folders
        homes = [Path(root) / _filled(pattern, words) for pattern in patterns]
        here = next((d for home in homes if (d := at_folder(home, words["split"]))), None)
        if here is None:
            missing.append((entry.name, homes))
        else:
            fields = entry.model_dump(include={"name", "group", "lang", "queries", "documents"})
            found.append(replace(here, **fields))
    if missing:
        name, homes = missing[0]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"suite {suite.name}: {name}{more} not found; looked for "
            f"{' and '.join(map(str, homes))}"
            + ("; --download fetches what is missing" if suite.hub else "")
        )
    return found


def published_sizes() -> dict[str, tuple[int, int]]:
    """By the name of a set of the shipped suites: how many queries and documents it has."""
    entries = [entry for name in shipped_suites() for entry in load_suite(name).datasets]
    return {entry.name: (entry.queries, entry.documents) for entry in entries}


def download(suite: Suite, root: str | Path, split: str | None = None, **options: Any) -> None:
    """Fetch a suite's sets from the Hugging Face hub; files that are there already stay.

    Args:
        options: go to `huggingface_hub.snapshot_download`.

    Raises:
        UserError: the suite names no repositories, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import snapshot_download

    if not suite.hub:
        raise UserError(f"suite {suite.name} names no repositories of the hub to download from")
    for entry in suite.datasets:
        words = _words(suite, entry, split)
        for fetch in suite.hub:
            repo = _filled(fetch.repo, words)
            target = Path(root) / _filled(fetch.to, words)
            console.print(f"{entry.name}: {repo} to {target}", soft_wrap=True, markup=False)
            try:
                snapshot_download(
                    repo,
                    repo_type="dataset",
                    local_dir=target,
                    allow_patterns=[_filled(pattern, words) for pattern in fetch.files],
                    **options,
                )
            except Exception as error:  # the hub's own kinds, the network's and the disk's
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise UserError(
                    f"{entry.name}: cannot download {repo} ({reason}); what is there stays, start "
                    "again to go on"
                ) from error


def _words(suite: Suite, entry: Entry, split: str | None) -> dict[str, str]:
    split = split or entry.split or suite.split
    return {"name": entry.name, "lang": entry.lang, "split": split}


def _filled(pattern: str, words: dict[str, str]) -> str:
    for key, word in words.items():
        pattern = pattern.replace(f"{{{key}}}", word)
    return pattern
