"""The reports of jobs as files: where they lie, what they hold, and how they are read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from drama.errors import UserError, nearest

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
JSON, HTML = ".report.json", ".report.html"

Count = Annotated[int, Field(ge=0)]
Counts = dict[str, Count]
Numbers = dict[Annotated[int, Field(ge=0)], Count]  # counted by a number


class Twice(BaseModel):
    """Queries that came before, and near ones beside their twins."""

    exact: Count = 0
    near: Count = 0
    examples: list[tuple[str, str]] = []


class SelfRetrieval(BaseModel):
    """Shares of the queries whose own document the teacher ranks first, or finds at all; None where
    no query has one."""

    first: float | None = None
    found: float | None = None


class Example(BaseModel):
    """The beginnings of a record's texts."""

    query: str
    positive: str = ""
    negative: str = ""


class Report(BaseModel):
    """What a job writes into OUT.report.json; counters that a report lacks are empty."""

    kind: str
    read: Count
    records: Count
    dropped: Counts = {}
    sources: Counts = {}
    languages: Counts = {}
    labels: dict[str, Counts] = {}
    positives: Numbers = {}
    negatives: Numbers = {}
    negatives_left_out: Counts = {}
    query_chars: Numbers = {}
    document_chars: Numbers = {}
    own_ranks: dict[Annotated[int, Field(ge=1)] | Literal["deeper"], Count] = {}
    self_retrieval: SelfRetrieval = SelfRetrieval()
    duplicate_queries: Twice = Twice()
    llm: Counts = {}
    llm_this_run: Counts = {}
    examples: list[Example] = []
    about: dict[str, Any] = {}


def report_paths(out: Path) -> tuple[Path, Path]:
    """Where the report of a file of records lies, as JSON and as a page.

    Raises:
        UserError: no name of such a file.
    """
    stem = next((out.name.removesuffix(s) for s in SUFFIXES if out.name.endswith(s)), "")
    if not stem:
        raise UserError(f"{out}: the name must end in {' or '.join(SUFFIXES)}")
    return out.with_name(stem + JSON), out.with_name(stem + HTML)


def read_report(path: str | Path) -> tuple[str, Mapping[str, Any]]:
    """The name of a job's output, without its ending, and the report.

    path: the file of records or its report.json.

    Raises:
        UserError: no such file, or none that a job has written.
    """
    given = Path(path)
    place = given if given.name.endswith(JSON) else report_paths(given)[0]
    try:
        value = json.loads(place.read_text(encoding="utf-8"))
        Report.model_validate(value)
    except FileNotFoundError:
        there = [str(other) for other in place.parent.glob(f"*{JSON}")]
        beside = "" if given == place else f"{given} has no report: "
        raise UserError(f"{beside}{place} does not exist{nearest(str(place), there)}") from None
    except OSError as error:
        raise UserError(f"{place} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the whole"
        raise UserError(
            f"{place} is no report of a job ({where}: {fault['msg']}); give what `drama augment` "
            "or `drama mine` wrote beside its records"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is damaged ({error}); remove it and the records, run the job "
                        "again: answers of a model are in its cache") from None  # fmt: skip
    return place.name.removesuffix(JSON), value
