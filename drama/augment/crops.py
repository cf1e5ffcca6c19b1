"""Crops: one random sentence of a document is the query, and the teacher finds its documents.

Ma et al. 2025, "DRAMA" (arXiv 2502.18460), section 3.1.1; the idea is that of cropping as in
Contriever and DRAGON. It needs a teacher and no LLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from drama.augment.corpus import Corpus, CorpusDocument
from drama.augment.job import Dropped, Job, Kept, Step
from drama.augment.pairs import retrieved_pairs
from drama.augment.sentences import pieces
from drama.augment.teacher import Retrieval, Teacher
from drama.augment.windows import PAPER, Windows
from drama.errors import UserError

BATCH = 1024  # documents whose queries are searched, and written, together
NO_TEXT, NOTHING_FITS = "no text, only a title", "no sentence of a fitting length"


@dataclass(frozen=True)
class CropOptions:
    """What the crops depend on, besides corpus and teacher.

    least, most: characters of a query, see `sentences.length`.

    Raises:
        UserError: lengths that do not ascend from 1.
    """

    windows: Windows = PAPER
    seed: int = 0
    least: int = 20
    most: int = 300

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise UserError(f"chars {self.least}-{self.most}: the lengths must ascend from 1")


def make_crops(retrieval: Retrieval, out: str | Path, options: CropOptions) -> dict[str, Any]:
    """Write a record for each document that has a fitting sentence; return the report.

    Raises:
        UserError: from `Job` and `Retrieval`.
    """
    given = asdict(options)
    about = {**retrieval.about(), **given.pop("windows"), **given}
    with Job(out, "crops", about) as job:
        if job.report is not None:
            return job.report
        corpus, teacher = retrieval.open()
        return job.run(_steps(corpus, teacher, options, job.start), len(corpus))


def crop(item: CorpusDocument, content: int, options: CropOptions) -> str | Dropped:
    """The sentence that is drawn from a document: a function of the seed and of its content.

    content: the document's entry in `Corpus.contents`.
    """
    if not item.document.text.strip():
        return Dropped(NO_TEXT)
    found = pieces(item.document.text, options.least, options.most)
    if not found:
        return Dropped(NOTHING_FITS)
    digest = blake2b(f"{options.seed} {content}".encode(), digest_size=8).digest()
    return found[int.from_bytes(digest, "little") % len(found)]


def _steps(corpus: Corpus, teacher: Teacher, options: CropOptions, start: int) -> Iterator[Step]:
    for batch in corpus.batches(BATCH, start):
        drawn = [crop(item, int(corpus.contents[item.number]), options) for item in batch]
        queries = [
            (query, item)
            for query, item in zip(drawn, batch, strict=True)
            if isinstance(query, str)
        ]
        pairs = iter(retrieved_pairs(corpus, teacher, options.windows, "crop", queries))
        results: list[Kept | Dropped] = [
            next(pairs) if isinstance(query, str) else query for query in drawn
        ]
        yield Step(batch[-1].number + 1, results)
