"""Do other libraries give the embeddings that we give? Asked of a folder that was exported.

    library x padded or one by one x length x dimensions: the largest absolute difference

Of every length there is one batch: a text of that many tokens, one of a third and one of a few, so
that padding is part of it. Narrower vectors are the first dimensions of the wide ones, of norm 1.

B texts, L tokens, D width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from drama.encoder import Encoder
from drama.errors import UserError
from drama.export_onnx import PLAIN, OnnxModel
from drama.export_onnx import TOLERANCE as ONNX_TOLERANCE
from drama.sample import SAMPLE

TOLERANCE = 1e-5  # float32
LENGTHS = (32, 128, 512, 2048, 8192)

Embed = Callable[[Sequence[str]], np.ndarray]  # one batch, whole width


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of a library's embeddings to ours.

    way: "padded", the batch at once, or "unpadded", text by text. length: tokens of the longest
    text.
    """

    library: str
    way: str
    length: int
    dim: int
    value: float


def compare(
    folder: str | Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    dims: Sequence[int] | None = None,
) -> list[Difference]:
    """Compare transformers, sentence-transformers where it is installed, and the folder's ONNX
    graph where there is one, with our packed embeddings, all in float32.

    Args:
        lengths: in tokens; the model's limit takes the place of those beyond it.
        dims: default those that the model was trained for.

    Raises:
        UserError: a difference above 1e-5 (ONNX: 1e-4), named.
    """
    folder = Path(folder)
    encoder = Encoder.from_pretrained(folder)
    lengths = sorted({min(length, encoder.max_tokens) for length in lengths})
    found = []
    batches = {length: _texts(encoder, length) for length in lengths}
    ours = {n: encoder.encode(texts, "document") for n, texts in batches.items()}
    for library, embed in _libraries(folder, encoder):
        for length, texts in batches.items():
            padded_BD = embed(texts)
            unpadded_BD = np.concatenate([embed([text]) for text in texts])
            for way, theirs_BD in (("padded", padded_BD), ("unpadded", unpadded_BD)):
                for dim in dims or encoder.matryoshka_dims:
                    gap_BD = np.abs(_cut(theirs_BD, dim) - _cut(ours[length], dim))
                    found.append(Difference(library, way, length, dim, float(gap_BD.max())))
    for one in found:
        allowed = ONNX_TOLERANCE if one.library == "onnxruntime" else TOLERANCE
        if not one.value <= allowed:
            raise UserError(
                f"{folder}: {one.library}, {one.way}, {one.length} tokens, {one.dim} dims differs "
                f"from our embeddings by {one.value:.1e}, more than {allowed:g}"
            )
    return found


def table(differences: Sequence[Difference]) -> Table:
    """A row for each library, way and width, a column for each length."""
    lengths = sorted({one.length for one in differences})
    title = "largest difference to our embeddings, by tokens of the longest text"
    shown = Table(title=title, title_justify="left")
    for name in ("library", "way", "dims"):
        shown.add_column(name, no_wrap=True)
    for length in lengths:
        shown.add_column(f"{length:,}", justify="right", no_wrap=True)
    values = {(d.library, d.way, d.dim, d.length): d.value for d in differences}
    for library, way, dim in dict.fromkeys((d.library, d.way, d.dim) for d in differences):
        cells = [f"{values[library, way, dim, length]:.1e}" for length in lengths]
        shown.add_row(library, way, str(dim), *cells)
    return shown


def _texts(encoder: Encoder, length: int) -> list[str]:
    """Texts of `length` tokens, of a third and of a few: long ones are cut by every library."""
    words = " ".join(SAMPLE)
    text = words
    while len(encoder.tokenize([text], "document", length)[0]) < length:
        text = f"{text} {words}"
    return [_of_tokens(encoder, text, n) for n in (length, max(2, length // 3), 5)]


def _of_tokens(encoder: Encoder, text: str, length: int) -> str:
    """The longest beginning of a text that has at most `length` tokens, without space around it:
    sentence-transformers before 5.4 strips texts."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(encoder.tokenize([text[:middle]], "document", 2**30)[0]) <= length
        low, high = (middle, high) if fits else (low, middle - 1)
    return text[:low].strip()


def _libraries(folder: Path, encoder: Encoder) -> Iterator[tuple[str, Embed]]:
    """One after the other, so that one model is in memory at a time beside ours."""
    yield "transformers", _transformers(folder, encoder)
    if importlib.util.find_spec("sentence_transformers") is not None:
        yield _sentence_transformers(folder, encoder)
    if (folder / PLAIN).is_file() and importlib.util.find_spec("onnxruntime") is not None:
        graph = OnnxModel(folder / PLAIN)
        yield "onnxruntime", lambda texts: graph(encoder.tokenize(texts, "document"))


def _transformers(folder: Path, encoder: Encoder) -> Embed:
    """As the model card says: `AutoModel`, no remote code, pooled by hand."""
    settings = encoder.settings
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def embed(texts: Sequence[str]) -> np.ndarray:
        batch = tokenizer(
            [settings.document_prefix + text for text in texts],
            padding=True,
            truncation=True,
            max_length=settings.max_tokens,
            return_tensors="pt",
        )
        with torch.no_grad():
            states_BLD = model(**batch).last_hidden_state
        pooled_BD = _pooled(states_BLD, batch["attention_mask"], settings.pooling)
        vectors_BD: np.ndarray = F.normalize(pooled_BD[:, : encoder.dim], dim=1).numpy()
        return vectors_BD

    return embed


def _sentence_transformers(folder: Path, encoder: Encoder) -> tuple[str, Embed]:
    import sentence_transformers

    retriever = sentence_transformers.SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"torch_dtype": torch.float32}
    )
    name = f"sentence-transformers {sentence_transformers.__version__}"

    def embed(texts: Sequence[str]) -> np.ndarray:
        vectors_BD: np.ndarray = retriever.encode(
            list(texts), prompt_name="document", batch_size=len(texts), show_progress_bar=False
        )
        assert vectors_BD.shape[1] == encoder.dim, f"{name} gives {vectors_BD.shape[1]} dims"
        return vectors_BD

    return name, embed


def _pooled(states_BLD: Tensor, mask_BL: Tensor, pooling: str) -> Tensor:
    if pooling == "mean":
        mask_BL1 = mask_BL[..., None].float()
        return (states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
    last_B = mask_BL.sum(1) - 1
    return states_BLD[torch.arange(len(last_B)), last_B]


def _cut(vectors_BD: np.ndarray, dim: int) -> np.ndarray:
    cut_BD = vectors_BD[:, :dim]
    unit_BD: np.ndarray = cut_BD / np.linalg.norm(cut_BD, axis=1, keepdims=True)
    return unit_BD
