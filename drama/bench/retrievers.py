"""One retriever folder, open in everything that runs it: ours, sentence-transformers, onnxruntime.

What is not installed, or has no graph in the folder, is left out. Texts are drawn from real ones.

B texts, D width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from drama.data.records import Record
from drama.data.sources import read_source
from drama.encoder import Encoder
from drama.errors import UserError
from drama.export_onnx import INT8, NEEDED, PLAIN, OnnxModel
from drama.retrieve.models import TOKEN_BUDGET, Precision, open_model

# largest difference of a number of a unit vector to float32's; the lowest cosine for 8 bits
GATE = {"float32": 1e-4, "bfloat16": 3e-2}
INT8_COSINE = 0.95
NO_GRAPH = "ours without the graph"
SHORT = 32  # texts in a batch of sentence-transformers, its default


@dataclass(frozen=True)
class Way:
    """One way to turn texts into vectors, as its users call it.

    tokenize: texts to what `embed` takes. encode: texts to vectors, whole.
    """

    name: str
    dtype: str
    tokenize: Callable[[list[str]], Any]
    embed: Callable[[Any], np.ndarray]
    encode: Callable[[list[str]], np.ndarray]


class Checked(NamedTuple):
    """How far a way's vectors are from the reference's, and whether it may be timed."""

    difference: float
    cosine: float
    passed: bool


def open_ways(folder: Path, device: torch.device, *, queries: bool) -> list[Way]:
    """Every way that is here: float32 on a CPU, bf16 on a GPU.

    Args:
        queries: ours as a server opens it, with the folder's graph, and without. Otherwise also our
            bf16 on a CPU, which is slower there than float32.
    """
    cpu = device.type == "cpu"
    ways = [_ours("ours", folder, device, None if cpu else "bf16", graph=queries)]
    if cpu and queries and (folder / PLAIN).is_file():
        ways.append(_ours(NO_GRAPH, folder, device, None))
    if cpu and not queries:
        ways.append(_ours("ours bf16", folder, device, "bf16"))
    if importlib.util.find_spec("sentence_transformers"):
        ways.append(_theirs(folder, device))
    if cpu and importlib.util.find_spec("onnxruntime"):
        for name, file in (("onnxruntime", PLAIN), ("onnxruntime int8", INT8)):
            if (folder / file).is_file():
                ways.append(_onnx(name, folder, folder / file))
    return ways


def graphs_for(device: torch.device) -> Literal["int8"] | None:
    """Which ONNX graphs to export for `open_ways`: none without the packages, or on a GPU."""
    here = all(importlib.util.find_spec(name) for name in NEEDED)
    return "int8" if here and device.type == "cpu" else None


def _ours(
    name: str, folder: Path, device: torch.device, precision: Precision | None, graph: bool = False
) -> Way:
    model = open_model(folder, device=device, precision=precision, graph=graph)
    return Way(
        name,
        model.compute_dtype,
        lambda texts: model.prepare(texts, "query", model.max_tokens),
        lambda rows: model.embed(rows, "query", model.max_tokens, model.dim, TOKEN_BUDGET),
        lambda texts: model.encode(texts, "query"),
    )


def _theirs(folder: Path, device: torch.device) -> Way:
    from sentence_transformers import SentenceTransformer

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = SentenceTransformer(
        str(folder), device=str(device), local_files_only=True, model_kwargs={"dtype": dtype}
    )

    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        found = model.tokenizer(
            texts, padding=True, truncation=True, max_length=model.max_seq_length,
            return_tensors="pt",
        )  # fmt: skip
        return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}

    @torch.inference_mode()
    def embed(features: dict[str, torch.Tensor]) -> np.ndarray:
        vectors: np.ndarray = model(dict(features))["sentence_embedding"].float().cpu().numpy()
        return vectors

    def encode(texts: list[str]) -> np.ndarray:
        vectors: np.ndarray = model.encode_query(texts, batch_size=SHORT, show_progress_bar=False)
        return vectors

    name = str(dtype).removeprefix("torch.")
    return Way("sentence-transformers", name, tokenize, embed, encode)


def _onnx(name: str, folder: Path, graph: Path) -> Way:
    encoder = Encoder.from_pretrained(folder)
    tokenize = partial(encoder.tokenize, kind="query")
    del encoder.backbone
    model = OnnxModel(graph)

    def encode(texts: list[str]) -> np.ndarray:
        """Sorted by length and padded by 32, as sentence-transformers does it."""
        rows = tokenize(texts)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        parts = [order[i : i + SHORT] for i in range(0, len(order), SHORT)]
        vectors_BD = np.concatenate([model([rows[i] for i in part]) for part in parts])
        out_BD = np.empty_like(vectors_BD)
        out_BD[order] = vectors_BD
        return out_BD

    return Way(
        name, "int8" if graph.name == Path(INT8).name else "float32", tokenize, model, encode
    )


def reference(folder: Path, device: torch.device) -> Callable[[list[str]], np.ndarray]:
    """Vectors by transformers' own padded forward in float32, one text at a time."""
    encoder = Encoder.from_pretrained(folder, device=device)

    @torch.inference_mode()
    def encode(texts: list[str]) -> np.ndarray:
        found = []
        for row in encoder.tokenize(texts, "query"):
            ids_1L = torch.tensor([row], device=device)
            mask_1L = torch.ones_like(ids_1L)
            states_1LD = encoder.backbone(input_ids=ids_1L, attention_mask=mask_1L)[0]
            last_D = (
                states_1LD[0, -1] if encoder.settings.pooling == "last" else states_1LD[0].mean(0)
            )
            found.append(torch.nn.functional.normalize(last_D[: encoder.dim], dim=0).cpu().numpy())
        return np.stack(found)

    return encode


def check(way: Way, texts: list[str], want_BD: np.ndarray) -> Checked:
    """Hold a way against the reference, by both its faces."""
    # numpy's maximum of a NaN is NaN, Python's may be the other number
    both_2BD = np.stack([way.encode(texts), way.embed(way.tokenize(texts))])
    difference = float(np.abs(both_2BD - want_BD).max())
    cosine = float((both_2BD * want_BD).sum(2).min())
    passed = cosine >= INT8_COSINE if way.dtype == "int8" else difference <= GATE[way.dtype]
    return Checked(difference, cosine, passed)


def read_texts(source: Path, count: int) -> list[str]:
    """The first `count` different documents of records, in their order.

    Raises:
        UserError: the source holds fewer.
    """
    return _first(source, count, "documents", lambda record: record.positives[0].full_text)


def read_queries(source: Path, count: int) -> list[str]:
    """The same of queries."""
    return _first(source, count, "queries", lambda record: record.query)


def _first(source: Path, count: int, what: str, text: Callable[[Record], str]) -> list[str]:
    found: dict[str, None] = {}
    for record in read_source(source):
        found[text(record)] = None
        if len(found) == count:
            return list(found)
    raise UserError(f"{source}: {len(found)} different {what}, {count} are asked for")


def exact_texts(
    tokenize: Callable[[Sequence[str]], list[list[int]]],
    texts: Sequence[str],
    tokens: int,
    count: int,
) -> list[str]:
    """Texts of exactly so many tokens each, cut out of the running words of `texts`.

    Raises:
        UserError: the words are too few.
    """
    words = " ".join(texts).split()
    found: list[str] = []
    for start in range(0, len(words), 7):
        # as many words as tokens are never too few; each has one at least
        (row,) = tokenize([" ".join(words[start : start + tokens])])
        low, high = 1, min(tokens, len(words) - start)
        if len(row) < tokens:
            break
        while low < high:
            middle = (low + high) // 2
            (row,) = tokenize([" ".join(words[start : start + middle])])
            low, high = (low, middle) if len(row) >= tokens else (middle + 1, high)
        text = " ".join(words[start : start + low])
        if len(tokenize([text])[0]) == tokens:
            found.append(text)
        if len(found) == count:
            return found
    raise UserError(
        f"the texts are too short for {count} of {tokens} tokens; give others by --pairs"
    )
