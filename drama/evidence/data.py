"""Turn a folder of public data sets into test sets, training pairs and texts.

    python -m drama.evidence.data DATA --out FOLDER      # or --demo, from the embedded sample

Written, the same bytes for the same input:

    FOLDER/eval/NAME/        BEIR folders, or folders of one a language
    FOLDER/pairs/GROUP.jsonl records {query, positives, source, lang}, by the groups of `pairs`
    FOLDER/text/NAME.jsonl   {text, lang}, for calibration, recovery and vocabulary
    FOLDER/sample/           crops.jsonl, asked.jsonl: texts that training data is made of;
                             languages.jsonl: texts of every set of pairs, for a vocabulary
    FOLDER/llm/              --demo alone: a language model that knows nothing
    FOLDER/counts.json       rows of each

What is in eval is in neither of the others. Questions of Natural Questions (QED) are halved by the
title of their article; all other sets go one way whole. `drama shard --decontaminate` then looks
for texts that stand in two sets.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click

from drama.console import console
from drama.data.lines import read_lines, read_objects
from drama.demo import ROOT
from drama.errors import UserError, exit_on_user_error
from drama.evidence.layouts import (
    Judged,
    Pair,
    half,
    objects,
    qed,
    required,
    squad,
    text_id,
)
from drama.evidence.pairs import group_of, pair_sets
from drama.evidence.scales import CROPPED
from drama.evidence.stand_in import write_stand_in
from drama.files import replacing_folder

BEIR = ("scifact", "cranfield", "med", "cosqa")
HELD_OUT_ROWS = 200  # of each text, for the perplexity
OF_A_LANGUAGE = 1000  # texts of each set of pairs, for the vocabulary


def prepare(data: Path, out: Path, *, crops: int = 1500, asked: int = 150) -> dict[str, int]:
    """Write everything that is found in `data`; return the counts.

    crops: how many of each text go into sample/crops.jsonl. asked: how many English ones in all
    into sample/asked.jsonl.

    Raises:
        UserError: a set is missing or damaged.
    """
    with replacing_folder(out) as folder:
        counts: dict[str, int] = {}
        for name in BEIR:
            shutil.copytree(required(data / "beir" / name), folder / "eval" / name)
            counts[f"eval/{name}"] = sum(1 for _ in objects(data / "beir" / name / "corpus.jsonl"))
        for name, (texts, questions) in _test_sets(data):
            counts[f"eval/{name}"] = len(questions)
            _write_beir(folder / "eval" / name, texts, questions)
        for name, lang, pairs in pair_sets(data):
            rows = list(_records(name, lang, pairs))
            path = folder / "pairs" / f"{group_of(name)}.jsonl"
            counts[f"pairs/{name}"] = _write(path, rows, "a")
            _write_languages(folder, rows)
        for name, lang, paragraphs in _texts(data):
            counts |= _write_text(folder / "text", name, lang, paragraphs)
        _write_calibration(folder / "text")
        counts |= _write_samples(folder, CROPPED, crops, asked)
        _write_counts(folder, counts)
    return counts


def prepare_demo(out: Path, *, pairs: int = 600, documents: int = 300,
                 crops: int = 50, asked: int = 4) -> dict[str, int]:  # fmt: skip
    """The same folders, tiny, from the sample in data/demo, and a language model to prune: enough
    to see that all of it runs."""
    sample = ROOT / "data" / "demo"
    with replacing_folder(out) as folder:
        rows = [v for _, v in islice(read_objects(sample / "pairs.jsonl.xz"), pairs)]
        counts = {"pairs/demo": _write(folder / "pairs" / "english.jsonl", rows)}
        _write_languages(folder, rows)
        texts_of = {
            q["_id"]: q["text"] for _, q in read_objects(sample / "scifact" / "queries.jsonl")
        }
        qrels = [line.split("\t") for _, line in read_lines(sample / "scifact/qrels/test.tsv")][1:]
        judged = {row[1] for row in qrels[:40]}
        texts: dict[str, str] = {}
        for _, row in read_objects(sample / "scifact" / "corpus.jsonl.gz"):
            if row["_id"] in judged or len(texts) < documents:
                texts[row["_id"]] = f"{row['title']} {row['text']}"
        questions = [(texts_of[row[0]], row[1]) for row in qrels[:40]]
        _write_beir(folder / "eval" / "scifact", texts, questions)
        counts["eval/scifact"] = len(questions)
        paragraphs = list(
            _paragraphs(line for _, line in read_lines(sample / "calibration.txt.gz"))
        )
        write_stand_in(folder / "llm", paragraphs)
        counts |= _write_text(folder / "text", "demo", "en", paragraphs)
        _write_calibration(folder / "text")
        counts |= _write_samples(folder, ["demo"], crops, asked)
        _write_counts(folder, counts)
    return counts


def _test_sets(data: Path) -> Iterator[tuple[str, Judged]]:
    for path in sorted(required(data / "multilingual" / "xquad").glob("xquad.*.json*")):
        yield f"xquad/{path.name.split('.')[1]}", squad(path)
    yield "jaquad", squad(data / "multilingual" / "jaquad" / "jaquad_dev.json")
    yield "qed", _paired(pair for pair in qed(data) if half(pair[1]) == 0)
    yield "long/qmsum", _qmsum(data / "long" / "qmsum")
    yield "long/squality", _squality(data / "long" / "squality")
    yield "long/covidqa", squad(data / "long" / "covidqa" / "200423_covidQA.json")
    for path in sorted(required(data / "long" / "debian-handbook").glob("*.jsonl*")):
        rows = [row for _, row in read_objects(path)]
        texts = {row["section"]: row["text"] for row in rows}
        lang = path.name.split(".")[0].replace("-", "_")
        yield f"handbook/{lang}", (texts, [(row["title"], row["section"]) for row in rows])


def _texts(data: Path) -> Iterator[tuple[str, str, Iterable[str]]]:
    articles = objects(data / "text" / "wikipedia-en-sample" / "articles.jsonl")
    yield (
        "wikipedia-en",
        "en",
        _paragraphs(line for row in articles for line in [*row["text"].split("\n"), ""]),
    )
    answers = objects(data / "pairs" / "medquad" / "medquad.jsonl")
    yield "medquad", "en", (row["answer"][:1000].replace("\n", " ") for row in answers)
    for lang in ("de", "es", "ru", "zh_CN"):
        rows = objects(data / "text" / "debian-descriptions" / f"{lang}.jsonl")
        yield f"debian-{lang}", lang, (row["description"].replace("\n", " ") for row in rows)


def _paired(pairs: Iterable[Pair]) -> Judged:
    texts, questions = {}, []
    for query, _, text in pairs:
        texts[text_id(text)] = text
        questions.append((query, text_id(text)))
    return texts, questions


def _qmsum(folder: Path) -> Judged:
    texts, questions = {}, []
    for part in ("train", "val"):
        for row in objects(folder / f"{part}.jsonl"):
            said = [f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"]]
            texts[row["meeting_id"]] = "\n".join(said)
            questions += [(q["query"], row["meeting_id"]) for q in row["specific_query_list"]]
    return texts, questions


def _squality(folder: Path) -> Judged:
    texts, questions = {}, []
    for part in ("train", "dev"):
        for row in objects(folder / f"{part}.jsonl"):
            id_ = row["metadata"]["passage_id"]
            texts[id_] = row["document"]
            # the first asks for the plot, of every story alike
            questions += [(q["question_text"], id_) for q in row["questions"][1:]]
    return texts, questions


def _paragraphs(lines: Iterable[str], least: int = 200, most: int = 1000) -> Iterator[str]:
    """Neighbouring lines joined to texts of some hundred characters; an empty line ends one."""
    text = ""
    for line in lines:
        text = f"{text} {line.strip()}".strip()
        if len(text) > least and (not line.strip() or len(text) > most):
            yield text[: 2 * most]
            text = ""
        elif not line.strip():
            text = ""


def _records(name: str, lang: str, pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    for query, title, text in pairs:
        if query.strip() and text.strip():
            document = {"title": title, "text": text} if title else {"text": text}
            yield {"query": query, "positives": [document], "source": name, "lang": lang}


def _write_text(folder: Path, name: str, lang: str, texts: Iterable[str]) -> dict[str, int]:
    """Every n-th text is held out, a fifth at most; the others stay."""
    rows = [{"text": text, "lang": lang} for text in texts if text.strip()]
    every = max(5, len(rows) // HELD_OUT_ROWS)
    held = _write(folder / f"held-out-{name}.jsonl", rows[::every])
    kept = (row for number, row in enumerate(rows) if number % every)
    return {
        f"text/{name}": _write(folder / f"{name}.jsonl", kept),
        f"text/held-out-{name}": held,
    }


def _write_calibration(folder: Path, rows: int = 150) -> None:
    """Some of every text, evenly spread, as the plain text that `drama prune` scores with."""
    texts: list[str] = []
    for path in sorted(folder.glob("[!h]*.jsonl")):
        own = [row["text"] for row in objects(path)]
        texts += _spread(own, rows)
    (folder / "calibration.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def _write_samples(folder: Path, names: Sequence[str], crops: int, asked: int) -> dict[str, int]:
    """Texts that training data is made of; the first of `names` is English."""
    texts = {name: list(objects(folder / "text" / f"{name}.jsonl")) for name in names}
    sampled = [row for rows in texts.values() for row in _spread(rows, crops)]
    return {
        "sample/crops": _write(folder / "sample" / "crops.jsonl", sampled),
        "sample/asked": _write(folder / "sample" / "asked.jsonl", _spread(texts[names[0]], asked)),
    }


def _write_languages(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Queries too: those in some languages have their answer in another."""
    some = rows[:: 1 + len(rows) // OF_A_LANGUAGE]
    texts = ({"text": f"{row['query']} {row['positives'][0]['text'][:600]}"} for row in some)
    _write(folder / "sample" / "languages.jsonl", texts, "a")


def _spread(rows: list[Any], count: int) -> list[Any]:
    """So many of them, evenly spread."""
    return rows[:: max(1, len(rows) // max(1, count))][:count]


def _write_beir(folder: Path, texts: dict[str, str], questions: list[tuple[str, str]]) -> None:
    _write(folder / "corpus.jsonl", ({"_id": i, "title": "", "text": t} for i, t in texts.items()))
    _write(folder / "queries.jsonl",
           ({"_id": f"q{n}", "text": q} for n, (q, _) in enumerate(questions)))  # fmt: skip
    (folder / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\t{d}\t1" for n, (_, d) in enumerate(questions))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write(path: Path, rows: Iterable[Any], mode: str = "w") -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open(mode, encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_counts(folder: Path, counts: dict[str, int]) -> None:
    (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


@click.command()
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option("--demo", is_flag=True, help="From the embedded sample, tiny.")
@click.option("--crops", type=click.IntRange(1), default=1500, show_default=True)
@click.option("--asked", type=click.IntRange(0), default=150, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path | None, demo: bool, crops: int, asked: int, out: Path) -> None:
    """Write test sets, pairs and texts from DATA."""
    with exit_on_user_error("evidence data"):
        if (data is None) != demo:
            raise UserError("give a folder of data sets, or --demo")
        if data is None:
            counts = prepare_demo(out, crops=crops, asked=asked)
        else:
            counts = prepare(data, out, crops=crops, asked=asked)
        for name, count in counts.items():
            console.print(f"{name}: {count:,}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
