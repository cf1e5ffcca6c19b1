"""Make the demo bundle that lies beside this script from full public data sets.

    python -m drama.data.demo.build PATH_TO_DATA

PATH_TO_DATA is a folder with these files (a `.jsonl.xz` holds one JSON object a line):

    beir/scifact/                               SciFact in BEIR layout, qrels train and test
    pairs/medquad/medquad.jsonl.xz              source, focus, qtype, question, answer
    pairs/scitldr-a/train.jsonl.xz              SciTLDR: source (list of abstract sentences)
    text/wikipedia-en-sample/articles.jsonl.xz  title, text

Written: pairs.jsonl.xz (training records; xz, because a hard negative repeats a document far away
in the file, beyond the window of gzip), scifact/ (a small BEIR test set) and calibration.txt.gz.
The same input and library versions give the same bytes. LICENSES.md is written by hand.
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import bm25s
import Stemmer

from drama.console import console
from drama.data.beir import read_corpus, read_qrels, read_queries
from drama.data.lines import read_objects
from drama.data.records import Document, Record
from drama.errors import exit_on_user_error
from drama.files import replacing

OUT = Path(__file__).resolve().parent
SEED = 13
QUESTIONS_PER_SOURCE = 370  # MedQuAD has nine sources, two of which hold two thirds of it
ANSWER_CHARS = (120, 900)  # shorter answers say nothing, longer ones are cut
NEGATIVES = 4
NEGATIVE_DEPTH = 40
TEST_CORPUS = 1200
TEST_DEPTH = 4
CALIBRATION_CHARS = {"wikipedia": 200_000, "medquad": 120_000, "scitldr": 80_000}
PARAGRAPH_CHARS = (200, 2000)


class Bm25:
    """English BM25 over a list of documents; ties go to the earlier document."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.stemmer = Stemmer.Stemmer("english")
        self.index = bm25s.BM25(k1=1.2, b=0.75, backend="numpy")
        texts = [f"{document.title} {document.text}" for document in documents]
        self.index.index(self._tokens(texts), show_progress=False)

    def _tokens(self, texts: list[str]) -> Any:
        return bm25s.tokenize(texts, stopwords="en", stemmer=self.stemmer, show_progress=False)

    def search(self, queries: list[str], depth: int) -> Iterator[list[Document]]:
        hits, scores = self.index.retrieve(
            self._tokens(queries), k=depth, show_progress=False, backend_selection="numpy"
        )
        for row, row_scores in zip(hits, scores, strict=True):
            ranked = sorted(zip(-row_scores, row, strict=True))
            yield [self.documents[int(hit)] for score, hit in ranked if score < 0]


def mine(
    records: list[Record], documents: list[Document], barred: Callable[[Record, Document], bool]
) -> list[Record]:
    """Give each record the first BM25 hits that are neither positives nor barred."""
    bm25 = Bm25(documents)
    mined = []
    queries = [record.query for record in records]
    for record, hits in zip(records, bm25.search(queries, NEGATIVE_DEPTH), strict=True):
        positives = {document.id for document in record.positives}
        negatives = [d for d in hits if d.id not in positives and not barred(record, d)]
        value = record.to_json() | {"negatives": [d.to_json() for d in negatives[:NEGATIVES]]}
        mined.append(Record.from_json(value))
    return mined


def normal(text: str) -> str:
    """Text for comparing queries: letters and digits, case folded."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def cut(text: str, limit: int = ANSWER_CHARS[1]) -> str:
    """The text's first sentences, white space collapsed, at most `limit` characters."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?= )", text[: limit + 1])]
    return text[: ends[-1]] if ends else text[:limit].rsplit(" ", 1)[0]


def scifact_records(folder: Path) -> list[Record]:
    """Train claims with their cited abstracts, without any claim of the test split."""
    queries, train, test = (
        read_queries(folder),
        read_qrels(folder, "train"),
        read_qrels(folder, "test"),
    )
    documents = {d.id: Document(d.text, d.title, f"scifact:{d.id}") for d in read_corpus(folder)}
    barred = {normal(queries[query_id]) for query_id in test}
    train_ids = {id_ for grades in train.values() for id_ in grades}
    test_only = {id_ for grades in test.values() for id_ in grades} - train_ids
    by_claim: dict[str, tuple[str, set[str]]] = {}
    for query_id, grades in train.items():
        claim = normal(queries[query_id])
        if claim not in barred:
            by_claim.setdefault(claim, (query_id, set()))[1].update(grades)
    records = []
    for query_id, ids in sorted(by_claim.values()):
        assert not ids & test_only, "a positive of the test split only"
        positives = tuple(documents[id_] for id_ in sorted(ids))
        records.append(
            Record(queries[query_id], positives, (), f"scifact:{query_id}", "scifact", "en")
        )
    records = mine(records, list(documents.values()), lambda record, document: False)
    assert not {normal(record.query) for record in records} & barred, "a test query leaks"
    return records


def medquad_records(rows: list[dict[str, Any]], rng: random.Random) -> list[Record]:
    """Questions of all sources in equal parts; every answer to a question is a positive."""
    by_question: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if len(cut(row["answer"])) >= ANSWER_CHARS[0]:
            by_question[normal(row["question"])].append(row)
    by_source: dict[str, list[str]] = defaultdict(list)
    for question, group in sorted(by_question.items()):
        by_source[group[0]["source"]].append(question)
    records = []
    documents: dict[str, Document] = {}
    topics: dict[str, set[tuple[str, str]]] = defaultdict(set)  # document id to its topics
    query_topics: dict[str, set[tuple[str, str]]] = {}
    for _, questions in sorted(by_source.items()):
        for question in sorted(rng.sample(questions, min(QUESTIONS_PER_SOURCE, len(questions)))):
            group = by_question[question]
            answers = {d.id: d for d in (Document(cut(row["answer"])) for row in group)}
            query = " ".join(group[0]["question"].split()).replace(" ?", "?")
            query_id = f"medquad:{group[0]['id']}"
            records.append(Record(query, tuple(answers.values()), (), query_id, "medquad", "en"))
            query_topics[query_id] = {(row["focus"].casefold(), row["qtype"]) for row in group}
            for id_ in answers:
                topics[id_] |= query_topics[query_id]
            documents |= answers
    # An answer on the same topic (disease and kind of question) under another wording is no
    # negative.
    return mine(
        records,
        [documents[id_] for id_ in sorted(documents)],
        lambda record, document: bool(topics[document.id] & query_topics[record.query_id]),
    )


def test_collection(folder: Path, rng: random.Random) -> tuple[list[Document], dict[str, str]]:
    """A sub-corpus with every positive of the test split, and the test queries."""
    queries, qrels = read_queries(folder), read_qrels(folder, "test")
    queries = {query_id: queries[query_id] for query_id in qrels}
    corpus = list(read_corpus(folder))
    kept = {id_ for grades in qrels.values() for id_ in grades}
    ranked = list(Bm25(corpus).search(list(queries.values()), TEST_DEPTH))
    for rank in range(TEST_DEPTH):
        for hits in ranked:
            if len(kept) < TEST_CORPUS and rank < len(hits):
                kept.add(hits[rank].id)
    rest = [document.id for document in corpus if document.id not in kept]
    kept.update(rng.sample(rest, max(TEST_CORPUS - len(kept), 0)))
    return [document for document in corpus if document.id in kept], queries


def calibration(
    data: Path, rows: list[dict[str, Any]], pairs: list[Record], rng: random.Random
) -> str:
    """Paragraphs of three kinds in random order, blank lines between."""
    used = {d.id for record in pairs for d in (*record.positives, *record.negatives)}
    asked = {normal(record.query) for record in pairs}
    wikipedia = [
        paragraph
        for _, row in read_objects(data / "text/wikipedia-en-sample/articles.jsonl.xz")
        for paragraph in row["text"].split("\n\n")
    ]
    medquad = [
        row["answer"]
        for row in rows
        if normal(row["question"]) not in asked and Document(cut(row["answer"])).id not in used
    ]
    scitldr = [
        " ".join(row["source"]) for _, row in read_objects(data / "pairs/scitldr-a/train.jsonl.xz")
    ]
    chosen: list[str] = []
    kinds = {"wikipedia": wikipedia, "medquad": medquad, "scitldr": scitldr}
    for kind, texts in kinds.items():
        room = CALIBRATION_CHARS[kind]
        paragraphs = sorted({" ".join(text.split()) for text in texts})
        for paragraph in rng.sample(paragraphs, len(paragraphs)):
            if room > 0 and PARAGRAPH_CHARS[0] <= len(paragraph) <= PARAGRAPH_CHARS[1]:
                chosen.append(paragraph)
                room -= len(paragraph)
    rng.shuffle(chosen)
    return "\n\n".join(chosen) + "\n"


def wikipedia_titles(data: Path, kept: set[str]) -> str:
    """Titles of the articles that kept paragraphs are from; page histories name the authors."""
    titles = [
        row["title"]
        for _, row in read_objects(data / "text/wikipedia-en-sample/articles.jsonl.xz")
        if any(" ".join(part.split()) in kept for part in row["text"].split("\n\n"))
    ]
    return "".join(f"{title}\n" for title in titles)


def write(path: Path, text: str) -> None:
    """Write text, packed as the name says."""
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, 9, mtime=0)
    elif path.suffix == ".xz":
        data = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    console.print(f"{path.relative_to(OUT)}: {len(data):,} bytes")


def json_lines(values: Iterable[dict[str, Any]]) -> str:
    """One compact JSON object a line."""
    return "".join(
        json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n" for value in values
    )


def main(data: Path) -> None:
    """Build every file of the bundle."""
    scifact = data / "beir/scifact"
    rows = [row for _, row in read_objects(data / "pairs/medquad/medquad.jsonl.xz")]
    pairs = scifact_records(scifact) + medquad_records(rows, random.Random(SEED))
    pairs.sort(key=lambda record: record.query_id)
    assert len({normal(record.query) for record in pairs}) == len(pairs), "a query comes twice"
    corpus, queries = test_collection(scifact, random.Random(SEED))
    console.print(f"{len(pairs)} records, {len(corpus)} documents, {len(queries)} queries")
    write(OUT / "pairs.jsonl.xz", json_lines(record.to_json() for record in pairs))
    write(
        OUT / "scifact/corpus.jsonl.gz",
        json_lines({"_id": d.id, "title": d.title, "text": d.text} for d in corpus),
    )
    write(
        OUT / "scifact/queries.jsonl",
        json_lines({"_id": query_id, "text": text} for query_id, text in queries.items()),
    )
    (OUT / "scifact/qrels").mkdir(exist_ok=True)
    shutil.copyfile(scifact / "qrels/test.tsv", OUT / "scifact/qrels/test.tsv")
    text = calibration(data, rows, pairs, random.Random(SEED))
    write(OUT / "calibration.txt.gz", text)
    write(OUT / "wikipedia-titles.txt", wikipedia_titles(data, set(text.strip().split("\n\n"))))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m drama.data.demo.build PATH_TO_DATA")
    with exit_on_user_error("build"):
        main(Path(sys.argv[1]))
