"""Training pairs of the evidence, out of public sets that are no test set of it.

Four groups, each a source of the mixture: `english` (questions, abstracts and stories; the
experiments 1 to 4 train on these alone), `questions` in other languages, `software` (packages and
commands, described shortly and at length), `news` (sentences and what follows them).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path

from drama.data.lines import read_lines, read_objects
from drama.errors import UserError
from drama.evidence.layouts import (
    Judged,
    Pair,
    half,
    objects,
    packed,
    qed,
    read_json,
    required,
    squad,
)
from drama.evidence.scales import ENGLISH

FOLLOWING = 2  # sentences of news behind the one that asks
# codes of NTREX's files where ISO 639-1 or the other sets have another for the language
NEWS_CODES = {
    "arb": "ar", "ben": "bn", "bul": "bg", "ces": "cs", "dan": "da", "deu": "de", "ell": "el",
    "eng": "en", "fas": "fa", "fin": "fi", "fra": "fr", "heb": "he", "hin": "hi", "hun": "hu",
    "ind": "id", "ita": "it", "jpn": "ja", "kor": "ko", "msa": "ms", "nld": "nl", "pol": "pl",
    "por": "pt", "por-BR": "pt_BR", "ron": "ro", "rus": "ru", "slk": "sk", "spa": "es",
    "srp-Cyrl": "sr", "swe": "sv", "tam": "ta", "tel": "te", "tha": "th",
    "tur": "tr", "ukr": "uk", "urd": "ur", "vie": "vi", "zho-CN": "zh_CN",
    "zho-TW": "zh_TW",
}  # fmt: skip


def pair_sets(data: Path) -> Iterator[tuple[str, str, Iterable[Pair]]]:
    """Name, language and pairs of every set.

    Raises:
        UserError: one is missing or damaged.
    """
    yield from _english(data / "pairs")
    yield "qed", "en", (pair for pair in qed(data) if half(pair[1]) == 1)
    yield from _questions(data / "multilingual")
    yield from _software(data / "text")
    yield from _news(data / "multilingual" / "ntrex")


def group_of(name: str) -> str:
    """The file that a set of pairs goes into: one source of a mixture."""
    if name in ENGLISH:
        return "english"
    kind = name.partition("-")[0]
    return {"debian": "software", "tldr": "software", "news": "news"}.get(kind, "questions")


def _english(pairs: Path) -> Iterator[tuple[str, str, Iterable[Pair]]]:
    answered = objects(pairs / "medquad" / "medquad.jsonl")
    yield "medquad", "en", ((row["question"], "", row["answer"]) for row in answered)
    sections = {
        (row["story"], row["section"]): row["text"]
        for row in objects(pairs / "fairytaleqa" / "sections.jsonl")
    }
    stories = (
        (row["question"], row["story"].replace("-", " "), sections[row["story"], number])
        for row in objects(pairs / "fairytaleqa" / "questions.jsonl")
        for number in row["sections"][:1]
        if (row["story"], number) in sections
    )
    yield "fairytaleqa", "en", stories
    papers = objects(pairs / "scitldr-a" / "train.jsonl")
    yield (
        "scitldr",
        "en",
        ((row["target"][0], row["title"] or "", " ".join(row["source"])) for row in papers),
    )
    found = read_json(pairs / "pubmedqa" / "ori_pqal.json").values()
    yield "pubmedqa", "en", ((row["QUESTION"], "", " ".join(row["CONTEXTS"])) for row in found)


def _questions(languages: Path) -> Iterator[tuple[str, str, Iterable[Pair]]]:
    yield "jaquad", "ja", _asked(squad(languages / "jaquad" / "jaquad_train.json"))
    jsquad = _asked(squad(languages / "jsquad" / "valid-v1.3.json"))
    # a text there is "title [SEP] paragraph"
    split = ((question, text.rpartition(" [SEP] ")) for question, _, text in jsquad)
    yield "jsquad", "ja", ((question, title, text) for question, (title, _, text) in split)
    for name in ("dev", "trial"):
        yield f"cmrc-{name}", "zh_CN", _asked(squad(languages / f"cmrc2018/cmrc2018_{name}.json"))
    yield "drcd", "zh_TW", _asked(squad(languages / "drcd" / "DRCD_dev.json"))
    yield "arcd", "ar", _asked(squad(languages / "arcd" / "arcd-train.json"))
    # one set a language: its files are of several parts and languages of the answer
    paths = sorted(_required_files(languages / "afriqa"), key=lambda path: path.name.split(".")[2])
    for lang, parts in groupby(paths, key=lambda path: path.name.split(".")[2]):
        rows = chain.from_iterable(read_objects(path) for path in list(parts))
        pairs = ((r["question_lang"], "", r["context"]) for _, r in rows if r.get("context"))
        yield f"afriqa-{lang}", lang, pairs


def _software(texts: Path) -> Iterator[tuple[str, str, Iterable[Pair]]]:
    for path in _required_files(texts / "debian-descriptions"):
        lang = path.name.split(".")[0]
        packages = (row for _, row in read_objects(path))
        yield (
            f"debian-{lang}",
            lang,
            ((row["synopsis"], row["package"], row["description"]) for row in packages),
        )
    for path in _required_files(texts / "tldr"):
        lang = path.name.split(".")[0]
        lang = "zh_CN" if lang == "zh" else lang
        pages = (row for _, row in read_objects(path))
        yield f"tldr-{lang}", lang, ((r["description"], r["command"], _examples(r)) for r in pages)


def _examples(page: dict[str, list[list[str]]]) -> str:
    return "\n".join(f"{what}: {line}" for what, line in page["examples"])


def _news(folder: Path) -> Iterator[tuple[str, str, Iterable[Pair]]]:
    """A sentence asks for what follows it, in its own language.

    Every second one stands before that, as in a crop: with it the words are learned, without it
    what goes with them.
    """
    documents = [line for _, line in read_lines(packed(folder / "DOCUMENT_IDS.tsv"))]
    for path in _required_files(folder, "newstest2019-*.txt*"):
        code = path.name.split(".")[1]
        lang = NEWS_CODES.get(code, code)
        sentences = [line for _, line in read_lines(path)]
        if len(sentences) != len(documents):
            raise UserError(f"{path}: {len(sentences)} lines, DOCUMENT_IDS has {len(documents)}")
        yield f"news-{lang}", lang, _followed(sentences, documents)


def _followed(sentences: list[str], documents: list[str]) -> Iterator[Pair]:
    for number, sentence in enumerate(sentences):
        first, last = number + number % 2, number + FOLLOWING
        places = range(first, min(last + 1, len(sentences)))
        text = [sentences[place] for place in places if documents[place] == documents[number]]
        yield sentence, "", " ".join(text)


def _asked(judged: Judged) -> Iterator[Pair]:
    texts, questions = judged
    return ((question, "", texts[id_]) for question, id_ in questions)


def _required_files(folder: Path, pattern: str = "*.jsonl*") -> list[Path]:
    found = sorted(required(folder).glob(pattern))
    if not found:
        raise UserError(f"{folder}: no {pattern} in it")
    return found
