"""Small made-up inputs in the layouts in which the real sets are published."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from drama.errors import UserError
from drama.evidence.data import prepare, prepare_demo

LANGS = ("de", "es", "ru", "zh_CN")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    pack(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def pack(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".xz":
        path.write_bytes(lzma.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def squad(path: Path, paragraphs: dict[str, list[str]]) -> None:
    found = [
        {"context": context, "qas": [{"id": q, "question": q, "answers": []} for q in asked]}
        for context, asked in paragraphs.items()
    ]
    pack(path, json.dumps({"version": "1", "data": [{"title": "t", "paragraphs": found}]}))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "sets"
    for name in ("scifact", "cranfield", "med", "cosqa"):
        folder = root / "beir" / name
        jsonl(folder / "corpus.jsonl.xz", [{"_id": "1", "title": "T", "text": f"of {name}"}])
        jsonl(folder / "queries.jsonl.xz", [{"_id": "7", "text": "what"}])
        pack(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\n7\t1\t1\n")
    languages, pairs, long = root / "multilingual", root / "pairs", root / "long"
    for lang in ("en", "zh"):
        squad(
            languages / "xquad" / f"xquad.{lang}.json.xz",
            {f"first {lang}": [f"{lang} a", f"{lang} b"], f"second {lang}": [f"{lang} c"]},
        )
    squad(languages / "jaquad" / "jaquad_dev.json.xz", {"開発": ["問い"]})
    squad(languages / "jaquad" / "jaquad_train.json.xz", {"訓練": ["質問", "何"]})
    for name in ("dev", "trial"):
        squad(languages / "cmrc2018" / f"cmrc2018_{name}.json.xz", {f"中文{name}": [f"问{name}"]})
    squad(languages / "drcd" / "DRCD_dev.json.xz", {"繁體": ["問"]})
    squad(languages / "jsquad" / "valid-v1.3.json.xz", {"梅雨 [SEP] 雨": ["いつ"]})
    squad(languages / "arcd" / "arcd-train.json.xz", {"نص": ["سؤال"]})
    jsonl(
        languages / "afriqa" / "gold_span_passages.afriqa.swa.en.train.jsonl.xz",
        [
            {"question_lang": "swali", "question_translated": "question", "context": "passage"},
            {"question_lang": "bila", "question_translated": "without", "context": None},
        ],
    )
    jsonl(
        languages / "afriqa" / "gold_span_passages.afriqa.swa.en.dev.jsonl.xz",
        [{"question_lang": "dev", "question_translated": "dev", "context": "dev"}],
    )
    news = languages / "ntrex"
    pack(news / "DOCUMENT_IDS.tsv.xz", "bbc\n" * 4 + "rt\n" * 2)
    for code in ("src.eng", "ref.ell", "ref.hau"):
        lines = "".join(f"{code[4:]} {number}\n" for number in range(6))
        pack(news / f"newstest2019-{code}.txt.xz", lines)

    answers = [f"Answer {i}. " + "Long words of medicine. " * 20 for i in range(12)]
    jsonl(
        pairs / "medquad" / "medquad.jsonl.xz",
        [{"question": f"What is {i}?", "answer": a} for i, a in enumerate(answers)],
    )
    jsonl(
        pairs / "fairytaleqa" / "sections.jsonl.xz",
        [{"story": "the-fox", "section": 2, "text": "A fox came."}],
    )
    jsonl(
        pairs / "fairytaleqa" / "questions.jsonl.xz",
        [
            {"story": "the-fox", "sections": [2, 3], "question": "Who came?"},
            {"story": "the-fox", "sections": [9], "question": "Lost?"},
        ],
    )
    jsonl(
        pairs / "scitldr-a" / "train.jsonl.xz",
        [{"title": "Nets", "source": ["One.", "Two."], "target": ["Short.", "Other."]}],
    )
    pack(
        pairs / "pubmedqa" / "ori_pqal.json.xz",
        json.dumps({"1": {"QUESTION": "Does it?", "CONTEXTS": ["It", "does."]}}),
    )
    jsonl(
        pairs / "nq-qed-dev" / "qed-dev-pairs.jsonl.xz",
        [
            {"question": f"q {i}", "title": f"title {i}", "paragraph": f"paragraph {i}"}
            for i in range(40)
        ],
    )

    turns = [{"speaker": "A", "content": "Hello"}, {"speaker": "B", "content": "Bye"}]
    for part in ("train", "val"):
        jsonl(
            long / "qmsum" / f"{part}.jsonl.xz",
            [
                {
                    "meeting_id": part,
                    "meeting_transcripts": turns,
                    "specific_query_list": [{"query": f"why {part}", "answer": "x"}],
                }
            ],
        )
    for part in ("train", "dev"):
        asked = [{"question_text": f"{word} {part}"} for word in ("plot", "who", "where")]
        jsonl(
            long / "squality" / f"{part}.jsonl.xz",
            [{"metadata": {"passage_id": part}, "document": f"story {part}", "questions": asked}],
        )
    squad(long / "covidqa" / "200423_covidQA.json.xz", {"paper": ["virus?"]})
    jsonl(
        long / "debian-handbook" / "pt-BR.jsonl.xz",
        [{"section": "1.1", "title": "Título", "text": "Texto"}],
    )

    for lang in LANGS:
        jsonl(
            root / "text" / "debian-descriptions" / f"{lang}.jsonl.xz",
            [
                {
                    "package": f"p{i}",
                    "synopsis": f"synopsis {lang} {i}",
                    "description": f"line one {lang} {i}\nline two",
                }
                for i in range(10)
            ],
        )
    jsonl(
        root / "text" / "tldr" / "de.jsonl.xz",
        [
            {
                "command": "ls",
                "description": "Liste",
                "examples": [["Alle", "ls -a"], ["Lang", "-l"]],
            }
        ],
    )
    lines = "\n".join(f"Sentence {i} of an article about something long." for i in range(120))
    jsonl(root / "text" / "wikipedia-en-sample" / "articles.jsonl.xz", [{"text": lines}])
    return root


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_layout_becomes_a_set(data: Path, tmp_path: Path) -> None:
    counts = prepare(data, tmp_path / "out", crops=4, asked=3)
    out = tmp_path / "out"
    assert (out / "eval/scifact/qrels/test.tsv").read_bytes() == (
        data / "beir/scifact/qrels/test.tsv"
    ).read_bytes()
    assert judged(out / "eval/xquad/zh") == {
        "zh a": "first zh",
        "zh b": "first zh",
        "zh c": "second zh",
    }
    assert judged(out / "eval/jaquad") == {"問い": "開発"}
    hello = "A: Hello\nB: Bye"
    assert judged(out / "eval/long/qmsum") == {"why train": hello, "why val": hello}
    assert judged(out / "eval/long/squality") == {
        f"{word} {part}": f"story {part}" for part in ("train", "dev") for word in ("who", "where")
    }
    assert judged(out / "eval/handbook/pt_BR") == {"Título": "Texto"}
    by_source: dict[str, list[tuple[str, str, str]]] = {}
    for group in ("english", "questions", "software", "news"):
        for row in read(out / "pairs" / f"{group}.jsonl"):
            text = row["positives"][0].get("title", "") + "|" + row["positives"][0]["text"]
            by_source.setdefault(row["source"], []).append((row["query"], text, row["lang"]))
    assert by_source["fairytaleqa"] == [("Who came?", "the fox|A fox came.", "en")]
    assert by_source["scitldr"] == [("Short.", "Nets|One. Two.", "en")]
    assert by_source["pubmedqa"] == [("Does it?", "|It does.", "en")]
    assert by_source["jaquad"] == [("質問", "|訓練", "ja"), ("何", "|訓練", "ja")]
    assert by_source["cmrc-trial"] == [("问trial", "|中文trial", "zh_CN")]
    assert by_source["jsquad"] == [("いつ", "梅雨|雨", "ja")]
    assert by_source["afriqa-swa"] == [("dev", "|dev", "swa"), ("swali", "|passage", "swa")]
    assert by_source["tldr-de"] == [("Liste", "ls|Alle: ls -a\nLang: -l", "de")]
    assert by_source["debian-de"][0] == ("synopsis de 0", "p0|line one de 0\nline two", "de")
    assert len(read(out / "sample" / "asked.jsonl")) == counts["sample/asked"] == 3
    assert json.loads((out / "counts.json").read_text()) == counts


def test_news_asks_for_what_follows(data: Path, tmp_path: Path) -> None:
    prepare(data, tmp_path / "out")
    rows = read(tmp_path / "out" / "pairs" / "news.jsonl")
    assert {(row["source"], row["lang"]) for row in rows} == {
        ("news-el", "el"), ("news-hau", "hau"), ("news-en", "en"),
    }  # fmt: skip
    own = {row["query"]: row["positives"][0]["text"] for row in rows if row["lang"] == "el"}
    numbers = {query[-1]: text.replace("ell ", "") for query, text in own.items()}
    # with the sentence where its number is even; never beyond its article of 0 to 3 or 4 and 5
    assert numbers == {"0": "0 1 2", "1": "2 3", "2": "2 3", "4": "4 5"}


def test_news_that_does_not_fit_its_articles_is_named(data: Path, tmp_path: Path) -> None:
    pack(data / "multilingual" / "ntrex" / "newstest2019-ref.ell.txt.xz", "ena\n")
    with pytest.raises(UserError, match=r"ref\.ell\.txt\.xz: 1 lines, DOCUMENT_IDS has 6"):
        prepare(data, tmp_path / "out")


def judged(folder: Path) -> dict[str, str]:
    """The text of every question, by way of the qrels."""
    texts = {row["_id"]: row["text"] for row in read(folder / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in read(folder / "queries.jsonl")}
    lines = (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]
    return {queries[q]: texts[d] for q, d, _ in (line.split("\t") for line in lines)}


def test_what_is_tested_is_not_trained_on(data: Path, tmp_path: Path) -> None:
    prepare(data, tmp_path / "out")
    asked = judged(tmp_path / "out" / "eval" / "qed")
    trained = {
        row["query"]: row["positives"][0]["text"]
        for row in read(tmp_path / "out" / "pairs" / "english.jsonl")
        if row["source"] == "qed"
    }
    assert asked
    assert trained
    assert not asked.keys() & trained.keys()
    assert asked | trained == {f"q {i}": f"paragraph {i}" for i in range(40)}


def test_held_out_texts_are_in_no_other_file(data: Path, tmp_path: Path) -> None:
    prepare(data, tmp_path / "out")
    for name in ("medquad", "debian-ru", "wikipedia-en"):
        held = {row["text"] for row in read(tmp_path / "out/text" / f"held-out-{name}.jsonl")}
        kept = {row["text"] for row in read(tmp_path / "out/text" / f"{name}.jsonl")}
        assert held
        assert kept
        assert not held & kept
        calibration = (tmp_path / "out/text/calibration.txt").read_text()
        assert not any(text in calibration for text in held)


def test_the_same_bytes_again(data: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        prepare(data, tmp_path / out / "real")
        prepare_demo(tmp_path / out / "demo")
    one, two = (content(tmp_path / out) for out in ("one", "two"))
    assert one == two
    assert "demo/llm/model.safetensors" in one


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_missing_set_is_named(data: Path, tmp_path: Path) -> None:
    (data / "multilingual" / "drcd" / "DRCD_dev.json.xz").unlink()
    with pytest.raises(UserError, match="DRCD_dev.json is missing; docs/evidence.md says"):
        prepare(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_set_and_an_empty_folder_are_named(data: Path, tmp_path: Path) -> None:
    pack(data / "multilingual" / "arcd" / "arcd-train.json.xz", '{"data": [')
    with pytest.raises(UserError, match=r"arcd-train\.json\.xz: invalid JSON"):
        prepare(data, tmp_path / "out")
    pack(data / "multilingual" / "arcd" / "arcd-train.json.xz", '{"data": [{"title": "t"}]}')
    with pytest.raises(UserError, match=r"not in SQuAD's layout: KeyError\('paragraphs'\)"):
        prepare(data, tmp_path / "out")
    squad(data / "multilingual" / "arcd" / "arcd-train.json.xz", {"نص": ["سؤال"]})
    (data / "text" / "tldr" / "de.jsonl.xz").unlink()
    with pytest.raises(UserError, match=r"tldr: no \*\.jsonl\* in it"):
        prepare(data, tmp_path / "out")


def test_a_vocabulary_sees_queries_and_texts_of_every_set(data: Path, tmp_path: Path) -> None:
    prepare(data, tmp_path / "out")
    texts = "\n".join(row["text"] for row in read(tmp_path / "out/sample/languages.jsonl"))
    for part in ("swali passage", "質問 訓練", "hau 4", "What is 3?"):
        assert part in texts


def test_the_stand_in_is_a_language_model(tmp_path: Path) -> None:
    prepare_demo(tmp_path / "out", crops=5, asked=0)
    assert read(tmp_path / "out" / "sample" / "asked.jsonl") == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "llm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "llm")
    ids = tokenizer("Proteins größer als 5 nm, 蛋白质", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Proteins größer als 5 nm, 蛋白质"
    assert ids.shape[1] < len("Proteins größer als 5 nm, 蛋白质".encode())  # it merges
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
