"""Any retriever behind one face: a folder of ours, or one that sentence-transformers loads.

B texts, D width.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError

from drama.data.packing import count_chunks, even_chunks
from drama.encoder import Encoder
from drama.errors import UserError, nearest
from drama.export_onnx import OnnxModel, open_graph
from drama.folder import DOCUMENT_PROMPTS, NotForEncoderError, declared_mask, read_settings
from drama.hf import model_sha256
from drama.retrieve.vectors import cut
from drama.tokenizer import Kind

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKEN_BUDGET = 8192
FEW_TOKENS = 1024  # on a CPU so many are not shared out: every share would read all weights
GRAPH_TOKENS = 64  # of a query, up to which the graph is faster

Encode = Callable[[Sequence[str], Kind], np.ndarray]


class Model(ABC):
    """A retriever that is open for inference.

    path: its folder. dim: width D of its vectors; trained_dims: those it was trained for.
    max_tokens: where it cuts texts; longest: the most that it takes. compute_dtype: by its name in
    torch. unit: what the length of a prepared text counts.
    """

    path: str
    dim: int
    trained_dims: tuple[int, ...]
    max_tokens: int
    longest: int
    compute_dtype: str
    unit: str

    @functools.cached_property
    def sha256(self) -> str:
        """See `drama.hf.model_sha256`; read once."""
        return model_sha256(self.path)

    @abstractmethod
    def prepare(self, texts: Sequence[str], kind: Kind, max_tokens: int) -> Sequence[Any]:
        """What `embed` takes; a thread may do this for one window while the model is at another."""

    @abstractmethod
    def embed(
        self, prepared: Sequence[Any], kind: Kind, max_tokens: int, dim: int, token_budget: int
    ) -> np.ndarray:
        """Vectors [B, dim] of norm 1, float32, of prepared texts in their order.

        token_budget: tokens a forward pass, about.
        """

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """How long a document is, all that the model puts around it included, before any cut."""

    def encode(
        self,
        texts: Sequence[str],
        kind: Kind,
        *,
        dim: int | None = None,
        max_tokens: int | None = None,
        token_budget: int = TOKEN_BUDGET,
    ) -> np.ndarray:
        """Vectors [B, dim] of norm 1, float32. Widths and lengths default to the model's.

        Raises:
            UserError: `dim` or `max_tokens` does not fit the model.
        """
        dim, max_tokens = self.check_dim(dim), self.check_max_tokens(max_tokens)
        if not len(texts):
            return np.empty((0, dim), np.float32)
        prepared = self.prepare(texts, kind, max_tokens)
        return self.embed(prepared, kind, max_tokens, dim, token_budget)

    def check_dim(self, dim: int | None) -> int:
        """The width to use.

        Raises:
            UserError: below 1 or wider than the model.
        """
        if dim is not None and not 1 <= dim <= self.dim:
            trained = ", ".join(map(str, self.trained_dims))
            raise UserError(
                f"dim {dim} does not fit {self.path}: 1 to {self.dim} do, trained were {trained}"
            )
        return dim or self.dim

    def check_max_tokens(self, max_tokens: int | None) -> int:
        """The length to cut at.

        Raises:
            UserError: below 2 or longer than the model takes.
        """
        if max_tokens is not None and not 2 <= max_tokens <= self.longest:
            raise UserError(
                f"max_tokens {max_tokens} does not fit {self.path}: 2 to {self.longest} do"
            )
        return max_tokens or self.max_tokens


def is_model(folder: str | Path) -> bool:
    """Whether a folder looks like a model, ours or sentence-transformers'."""
    return any((Path(folder) / name).is_file() for name in ("config.json", "modules.json"))


def open_model(
    folder: str | Path,
    *,
    precision: Precision | None = None,
    device: torch.device | str | None = None,
    graph: bool = False,
) -> Model:
    """Load a retriever for inference.

    Args:
        precision: default fp32; on a GPU bf16 for a folder of ours, the folder's own type for one
            of sentence-transformers.
        device: default the GPU where there is one.
        graph: in float32 on a CPU, take the folder's ONNX graph for a short query that comes
            alone, where `export` wrote one and onnxruntime is installed: the shorter the query,
            the more it gains. Opening takes longer, weights are held twice, and such a query's
            vector differs from the one that it gets in a batch by rounding.

    Raises:
        UserError: no model folder, weights or tokenizer missing, a mask that is not the declared
            one, a graph that is not the model's, an unknown precision, or sentence-transformers is
            needed and not installed.
    """
    if not is_model(folder):
        raise UserError(f"{folder}: not a model folder (config.json is missing)")
    if precision is not None and precision not in PRECISIONS:
        raise UserError(
            f"precision '{precision}' is none{nearest(precision, PRECISIONS)}; "
            f"there are {', '.join(PRECISIONS)}"
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = PRECISIONS[precision] if precision else None
    if _is_ours(Path(folder)):
        default = torch.bfloat16 if device.type == "cuda" else torch.float32
        encoder = Encoder.from_pretrained(folder, dtype=dtype or default, device=device)
        encoder.prepack()
        exact = (device.type, dtype or default) == ("cpu", torch.float32)
        return OurModel(
            encoder, folder, open_graph(Path(folder), encoder) if graph and exact else None
        )
    return OtherModel(folder, dtype, device)


class OurModel(Model):
    """Texts are packed. On a CPU chunks run side by side, each on one thread; a few texts take all
    threads where the weights are prepacked. The bits of a vector depend neither on the number of
    threads nor on the chunk it comes in, but for short queries where there is a `graph`."""

    unit = "tokens"

    def __init__(
        self, encoder: Encoder, folder: str | Path, graph: OnnxModel | None = None
    ) -> None:
        self.encoder, self.path, self.graph = encoder, str(folder), graph
        self.dim, self.trained_dims = encoder.dim, encoder.matryoshka_dims
        self.max_tokens = encoder.max_tokens
        self.longest = encoder.longest
        self.compute_dtype = _name(next(encoder.parameters()).dtype)

    def prepare(self, texts: Sequence[str], kind: Kind, max_tokens: int) -> list[list[int]]:
        return self.encoder.tokenize(texts, kind, max_tokens)

    def embed(
        self,
        prepared: Sequence[list[int]],
        kind: Kind,
        max_tokens: int,
        dim: int,
        token_budget: int,
    ) -> np.ndarray:
        alone = kind == "query" and len(prepared) == 1 and len(prepared[0]) <= GRAPH_TOKENS
        if self.graph is not None and alone:
            return cut(self.graph(prepared), dim)
        few = sum(map(len, prepared)) <= FEW_TOKENS and self.encoder.prepacked is not None
        if few or self.encoder.device.type != "cpu":
            return self.encoder.embed(prepared, dim=dim, token_budget=token_budget)
        order = sorted(range(len(prepared)), key=lambda i: len(prepared[i]))
        lengths = [len(prepared[i]) for i in order]
        vectors_BD = np.empty((len(prepared), dim), np.float32)

        def fill(chunk: list[int]) -> None:
            rows = [order[i] for i in chunk]
            vectors_BD[rows] = self.encoder.embed(
                [prepared[i] for i in rows], dim=dim, token_budget=sys.maxsize
            )

        with _one_thread_each() as workers, ThreadPoolExecutor(workers) as pool:
            # as many for each worker: three chunks take two of them as long as four
            rounds = -(-count_chunks(lengths, token_budget) // workers)
            chunks = even_chunks(lengths, min(rounds * workers, len(prepared)))
            list(pool.map(fill, chunks))
        return vectors_BD

    def count_tokens(self, text: str) -> int:
        return len(self.encoder.tokenize([text], "document", sys.maxsize)[0])


class OtherModel(Model):
    """A folder of sentence-transformers, with its own prompts for queries and documents."""

    unit = "characters"

    def __init__(self, folder: str | Path, dtype: torch.dtype | None, device: torch.device) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError(
                f"{folder} is not for our encoder; pip install sentence-transformers to use it"
            ) from None
        _check_tokenizer(Path(folder))
        try:
            self.retriever: Any = SentenceTransformer(
                str(folder), device=str(device), local_files_only=True
            )
            if dtype is not None:
                self.retriever.to(dtype)
            probe = self.retriever.encode_document(
                ["width"], show_progress_bar=False, convert_to_numpy=True
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{folder}: sentence-transformers cannot load the model: {reason}"
            ) from error
        self._check_mask(Path(folder))
        self.path, self.dim = str(folder), probe.shape[1]
        self.trained_dims = (self.dim,)
        limit = self.retriever.max_seq_length
        self.longest = int(min(_positions(self.retriever) or sys.maxsize, 2**31))
        self.max_tokens = int(limit or self.longest)
        self.longest = max(self.longest, self.max_tokens)
        self.compute_dtype = _name(next(self.retriever.parameters()).dtype)

    def prepare(self, texts: Sequence[str], kind: Kind, max_tokens: int) -> Sequence[str]:
        return texts

    def embed(
        self,
        prepared: Sequence[str],
        kind: Kind,
        max_tokens: int,
        dim: int,
        token_budget: int,
    ) -> np.ndarray:
        call = self.retriever.encode_query if kind == "query" else self.retriever.encode_document
        self.retriever.max_seq_length = max_tokens
        vectors_BD = call(
            list(prepared),
            prompt=self._prompt(kind),
            batch_size=max(1, token_budget // max_tokens),
            show_progress_bar=False,
            convert_to_numpy=True,
        ).astype(np.float32)
        return cut(vectors_BD, dim)

    def count_tokens(self, text: str) -> int:
        whole = self._prompt("document") + text
        return len(self.retriever.tokenizer(whole, verbose=False)["input_ids"])

    def _prompt(self, kind: Kind) -> str:
        """As `drama.folder.read_settings`: sentence-transformers itself takes an empty "document"
        before a "passage"."""
        names = ("query",) if kind == "query" else DOCUMENT_PROMPTS
        prompts = self.retriever.prompts
        return next((prompts[name] for name in names if prompts.get(name)), "")

    def _check_mask(self, folder: Path) -> None:
        """Refuse a model whose mask is not the declared one, where its folder declares any.

        The last word of a text is another, beside a longer text; do the tokens before notice?
        """
        config = getattr(getattr(self.retriever[0], "auto_model", None), "config", None)
        declared = declared_mask(config, folder)
        if declared is None:
            return
        rows = []
        for last in ("moon", "sea"):
            texts = [f"one two three four five {last}", "one two three four five six seven " * 3]
            states = self.retriever.encode(
                texts, output_value="token_embeddings", show_progress_bar=False
            )
            rows.append(states[0].float().cpu())
        before = min(map(len, rows)) // 2  # half the tokens are the same whatever tokens are
        sees_ahead = not torch.equal(rows[0][:before], rows[1][:before])
        if sees_ahead == (declared == "causal"):
            real = "bidirectional" if sees_ahead else "causal"
            raise UserError(
                f"{folder}: declared {declared}, but sentence-transformers runs it {real}; check "
                "is_causal in config.json and the transformers version"
            )


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Operations run on one thread; yields how many of them may run side by side.

    torch's CPU products sum in another order when several threads share one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _is_ours(folder: Path) -> bool:
    """Whether `Encoder` runs the folder whole: the architecture, and no module besides."""
    if not (folder / "config.json").is_file():
        return False
    try:
        read_settings(folder)
    except NotForEncoderError:
        return False
    return True


def _check_tokenizer(folder: Path) -> None:
    """transformers would make up an empty one for some architectures.

    Raises:
        UserError: no file of a vocabulary, neither in the folder nor in that of the first module.
    """
    names = ("tokenizer.json", "vocab.*", "*.model")
    if not any(path for at in ("", "0*/") for name in names for path in folder.glob(at + name)):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json is missing); copy it there")


def _positions(retriever: Any) -> int | None:
    config = getattr(getattr(retriever[0], "auto_model", None), "config", None)
    return getattr(config, "max_position_embeddings", None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
