"""A tiny random retriever and a small BEIR folder, both real files of the real formats."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from drama.retrieve.vectors import VectorsManifest, write_ids

DOCUMENTS = [
    ("d1", "Vaccines", "Vaccination trains the immune system to recognise a virus."),
    ("d2", "Honey bees", "A colony of bees stores honey and pollinates the flowers around it."),
    ("d3", "Volcanoes", "Magma rises through the crust and an eruption covers land with ash."),
    ("d4", "", "Bread rises because yeast turns sugar into carbon dioxide."),
    ("d5", "Tides", "The pull of the moon and the sun moves the water of the oceans."),
    ("d6", "Photosynthesis", "Leaves turn light, water and carbon dioxide into sugar."),
    ("d7", "Immune cells", "White blood cells recognise a virus and produce antibodies."),
    ("d8", "Empty", ""),
]
QUERIES = {
    "q1": "how does the immune system recognise a virus",
    "q2": "what makes bread rise",
    "q3": "why do oceans have tides",
    "q4": "this query is not judged",
}
QRELS = {"q1": {"d1": 2, "d7": 1}, "q2": {"d4": 1, "gone": 1}, "q3": {"d5": 1, "d3": 0}}


def save_model(folder: Path, seed: int = 0) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<pad>", "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    LlamaModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[[int], Path]:
    return lambda seed: save_model(tmp_path / f"model-{seed}", seed)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "facts"
    rows = [{"_id": id_, "title": title, "text": text} for id_, title, text in DOCUMENTS]
    write_jsonl(folder / "corpus.jsonl", rows)
    write_jsonl(
        folder / "queries.jsonl", [{"_id": id_, "text": text} for id_, text in QUERIES.items()]
    )
    lines = [f"{q}\t{d}\t{grade}" for q, grades in QRELS.items() for d, grade in grades.items()]
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
    )
    return folder


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str, list[dict[str, str]]], Path]:
    return lambda name, rows: write_jsonl(tmp_path / name, rows)


def write_gz(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_miracl(root: Path, lang: str) -> Path:
    """As miracl/miracl and miracl/miracl-corpus have it."""
    folder = root / f"miracl-v1.0-{lang}"
    for kind in ("topics", "qrels"):
        (folder / kind).mkdir(parents=True)
    name = f"miracl-v1.0-{lang}-dev.tsv"
    topics = [f"{id_}\t{text}\n" for id_, text in QUERIES.items()]
    (folder / "topics" / f"topics.{name}").write_text("".join(topics), encoding="utf-8")
    qrels = [f"{q}\tQ0\t{d}\t{g}\n" for q, grades in QRELS.items() for d, g in grades.items()]
    (folder / "qrels" / f"qrels.{name}").write_text("".join(qrels), encoding="utf-8")
    rows = [{"docid": id_, "title": title, "text": text} for id_, title, text in DOCUMENTS]
    corpus = root / f"miracl-corpus-v1.0-{lang}"
    for number, part in ((0, rows[:3]), (2, rows[3:5]), (10, rows[5:])):
        write_gz(corpus / f"docs-{number}.jsonl.gz", part)
    return folder


def write_mldr(root: Path, lang: str) -> Path:
    """As Shitao/MLDR has it."""
    folder = root / f"mldr-v1.0-{lang}"
    rows = [{"docid": i, "text": f"{title} {text}".strip()} for i, title, text in DOCUMENTS]
    write_gz(folder / "corpus.jsonl.gz", rows)
    asked = [
        {
            "query_id": query,
            "query": QUERIES[query],
            "positive_passages": [{"docid": d, "text": ""} for d, g in grades.items() if g],
            "negative_passages": [],
        }
        for query, grades in QRELS.items()
    ]
    write_gz(folder / "test.jsonl.gz", asked)
    write_gz(folder / "train.jsonl.gz", asked[:1])
    return folder


def write_parquet(root: Path, name: str) -> Path:
    """As BeIR/NAME and BeIR/NAME-qrels have it."""
    folder = root / name
    tables = {
        "corpus": [{"_id": i, "title": title, "text": text} for i, title, text in DOCUMENTS],
        "queries": [{"_id": i, "title": "", "text": text} for i, text in QUERIES.items()],
    }
    for kind, rows in tables.items():
        (folder / kind).mkdir(parents=True)
        half = len(rows) // 2
        for number, part in enumerate((rows[:half], rows[half:])):
            file = folder / kind / f"{kind}-{number:05}-of-00002.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), file)
    lines = [f"{q}\t{d}\t{g}\n" for q, grades in QRELS.items() for d, g in grades.items()]
    (folder / "qrels").mkdir()
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(header + "".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def jsonl_gz() -> Callable[[Path, list[dict[str, Any]]], None]:
    return write_gz


@pytest.fixture
def upstream() -> SimpleNamespace:
    """The content of `dataset`, and functions that write it as upstream does."""
    return SimpleNamespace(
        documents=DOCUMENTS,
        queries=QUERIES,
        judged={query: QUERIES[query] for query in QRELS},
        qrels=QRELS,
        miracl=write_miracl,
        mldr=write_mldr,
        parquet=write_parquet,
    )


@pytest.fixture(scope="session")
def save_vectors() -> Callable[..., Path]:
    """Write a vectors folder of any array, as `encode_corpus` leaves one."""

    def save(folder: Path, vectors_ND: np.ndarray, corpus: str = "corpus.jsonl") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vectors.npy", vectors_ND)
        write_ids(folder / "ids.txt", [f"d{i}" for i in range(len(vectors_ND))])
        VectorsManifest(
            model="model",
            model_sha256="0" * 64,
            corpus=corpus,
            corpus_sha256="0" * 64,
            rows=len(vectors_ND),
            kind="document",
            max_tokens=64,
            dim=vectors_ND.shape[1],
            dtype=vectors_ND.dtype.name,
            compute_dtype="float32",
            window=2048,
            token_budget=8192,
        ).write(folder / "manifest.json")
        return folder

    return save
