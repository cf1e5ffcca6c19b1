"""Encode a corpus into a vectors folder, on one process or on many ranks; a killed run goes on.

Documents are taken in windows of a few thousand; inside a window they are sorted by length and
packed. See `fill.py` for the order of the work and `docs/encoding.md` for what is guaranteed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from drama.errors import UserError
from drama.retrieve.corpus import Corpus, read_windows
from drama.retrieve.fill import (
    Window,
    begin_vectors,
    fill_vectors,
    filling,
    inputs_of,
    needs_filling,
)
from drama.retrieve.models import TOKEN_BUDGET, Model, Precision, open_model
from drama.retrieve.vectors import Vectors, VectorsManifest, read_vectors
from drama.tokenizer import Kind

if TYPE_CHECKING:
    from drama.distributed import Ranks  # DeepSpeed is slow to import

Storage = Literal["float32", "float16"]


def encode_corpus(
    corpus_path: str | Path,
    model: str | Path | Model,
    out: str | Path,
    *,
    kind: Kind = "document",
    max_tokens: int | None = None,
    dim: int | None = None,
    dtype: Storage = "float32",
    precision: Precision | None = None,
    token_budget: int = TOKEN_BUDGET,
    window: int = 2048,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> Vectors:
    """Encode every document of a corpus into the folder `out` (see `vectors.py` for its files).

    Args:
        corpus_path: a BEIR folder, or a .jsonl file of {_id, title, text}; .gz and .xz too.
        model: its folder, or one that is open.
        kind: which of the model's prefixes is put in front.
        max_tokens: where texts are cut; default the model's.
        dim: width of the vectors, at most the model's; default all of it.
        dtype: of the stored vectors; float16 halves the folder.
        precision: what the model computes in, see `open_model`.
        token_budget: tokens a forward pass.
        window: documents sorted by length together and recorded as done together.
        overwrite: replace vectors of other inputs that `out` holds, and damaged ones, instead of
            refusing.
        ranks: who shares the work; every rank calls this.

    Raises:
        UserError: an empty or faulty corpus, a bad model folder, `dim` wider than the model, `out`
            holding other vectors or being written by another job, too little disk, or a model that
            gives vectors with NaN.
    """
    if dtype not in ("float32", "float16"):
        raise UserError(f"dtype {dtype} is not a storage type; float32 and float16 are")
    for name, value in (("token_budget", token_budget), ("window", window)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    on_main: Callable[[Callable[[], None]], None] = _call if ranks is None else ranks.on_main
    scanned: list[Corpus] = []
    on_main(lambda: scanned.append(Corpus.scan(corpus_path)))  # its faults before a slow load
    if not isinstance(model, Model):
        device = None if ranks is None else ranks.device
        model = open_model(model, precision=precision, device=device)
    opened, folder = model, Path(out)
    width, limit = opened.check_dim(dim), opened.check_max_tokens(max_tokens)

    lock = ExitStack()  # of the main rank, which begins

    def begin() -> None:
        (corpus,) = scanned
        if overwrite or needs_filling(folder):
            lock.enter_context(filling(folder))
        manifest = VectorsManifest(
            model=str(Path(opened.path).resolve()),
            model_sha256=opened.sha256,
            corpus=str(corpus.path),
            corpus_sha256=corpus.sha256,
            rows=len(corpus.ids),
            kind=kind,
            max_tokens=limit,
            dim=width,
            dtype=dtype,
            compute_dtype=opened.compute_dtype,
            window=window,
            token_budget=token_budget,
        )
        begin_vectors(folder, manifest, corpus.ids, overwrite=overwrite)

    def windows(numbers: Iterable[int]) -> Iterator[Window]:
        for number, documents in read_windows(corpus_file, window, numbers):
            texts = [document.full_text for document in documents]
            items = opened.prepare(texts, kind, limit)
            yield Window(number, items, [document.id for document in documents])

    with lock:
        on_main(begin)
        corpus_file = Path(inputs_of(folder).corpus)
        fill_vectors(
            folder,
            windows,
            lambda items: opened.embed(items, kind, limit, width, token_budget),
            unit=opened.unit,
            ranks=ranks,
        )
    return read_vectors(folder, values=ranks is None or ranks.is_main)


def _call(work: Callable[[], None]) -> None:
    work()
