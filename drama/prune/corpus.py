"""The corpus that a vocabulary is cut to: read it once, count its tokens, hold a part out.

V ids, of which a tokenizer may leave some unused.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.progress import Progress
from tokenizers import Tokenizer

from drama.console import progress
from drama.data.lines import decode_line, open_raw, read_raw_lines
from drama.errors import UserError
from drama.prune.text import holds_json_lines, sha256_of, text_of

TEXT_CHARACTERS = 4096
BATCH_CHARACTERS = 2**18
HELD_OUT_EVERY = 20
HELD_OUT_TEXTS = 1024


@dataclass(frozen=True)
class Corpus:
    """What one pass over a corpus found.

    counts_V: how often the tokenizer produces each id, int64, the held-out texts left out.
    held_out: texts to judge a cut by. sha256: of each file's bytes as they lie on disk.
    """

    counts_V: np.ndarray
    held_out: tuple[str, ...]
    sha256: dict[str, str]


def count_tokens(paths: Sequence[str | Path], tokenizer: Any, *, seed: int = 0) -> Corpus:
    """Count a fast tokenizer's tokens in text files, in one pass.

    A file is UTF-8, plain or packed: JSON lines by its name, read as `text.documents` does, or
    else plain text, read in paragraphs. Both come in pieces of at most `TEXT_CHARACTERS`, cut
    before white space. One in `HELD_OUT_EVERY` is held out, and of these `HELD_OUT_TEXTS` at random
    are kept as such. So memory is bounded by the longest line, whatever the corpus' size.

    Raises:
        UserError: a file that is missing, no text, or damaged; fewer than two pieces in all.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    counts_V = np.zeros(1 + max(backend.get_vocab().values()), dtype=np.int64)
    held_out = _HeldOut(random.Random(seed))
    start = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("counting tokens", total=_num_bytes(paths), note="")
        for texts in _batches(paths, held_out, bar):
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            ids = np.fromiter(chain.from_iterable(x.ids for x in encodings), dtype=np.int64)
            counts_V += np.bincount(ids, minlength=len(counts_V))
            rate = counts_V.sum() / (time.perf_counter() - start)
            bar.update(task, note=f"bytes, {counts_V.sum():,} tokens, {rate:,.0f} tokens/s")
    if not held_out.texts:
        raise UserError(
            f"{', '.join(map(str, paths))}: {held_out.seen} paragraphs of text, a vocabulary needs "
            "at least 2 (one is held out), and many to be of use; give a larger corpus"
        )
    return Corpus(counts_V, tuple(held_out.texts), {str(path): sha256_of(path) for path in paths})


class _HeldOut:
    """A uniform sample of every `HELD_OUT_EVERY`-th text (reservoir sampling)."""

    def __init__(self, rng: random.Random) -> None:
        self.texts: list[str] = []
        self.seen = 0
        self._rng = rng
        self._candidates = 0

    def swap(self, text: str) -> str | None:
        """Take `text` or let it pass; return what is to be counted, the one let out or `text`."""
        self.seen += 1
        # from the second on, so that two texts are enough
        if self.seen % HELD_OUT_EVERY != 2:
            return text
        self._candidates += 1
        if len(self.texts) < HELD_OUT_TEXTS:
            self.texts.append(text)
            return None
        place = self._rng.randrange(self._candidates)
        if place < HELD_OUT_TEXTS:
            text, self.texts[place] = self.texts[place], text
        return text


def _batches(paths: Sequence[str | Path], held_out: _HeldOut, bar: Progress) -> Iterator[list[str]]:
    """Texts to count, in batches of `BATCH_CHARACTERS`; shows the bytes read."""
    batch: list[str] = []
    size = done = 0
    for path in map(Path, paths):
        with open_raw(path) as raw:
            for text in _texts(path, raw):
                counted = held_out.swap(text)
                if counted is None:
                    continue
                batch.append(counted)
                size += len(counted)
                if size >= BATCH_CHARACTERS:
                    yield batch
                    batch, size = [], 0
                    # the reader closes a plain file after its last line
                    if not raw.closed:
                        bar.update(bar.task_ids[0], completed=done + raw.tell())
        done += _num_bytes([path])
        bar.update(bar.task_ids[0], completed=done)
    if batch:
        yield batch


def _texts(path: Path, raw: IO[bytes]) -> Iterator[str]:
    documents = _json_texts(path, raw) if holds_json_lines(path) else _paragraphs(path, raw)
    for document in documents:
        yield from _pieces(document)


def _json_texts(path: Path, raw: IO[bytes]) -> Iterator[str]:
    for number, line in read_raw_lines(path, raw):
        if line.strip() and (text := text_of(path, number, line)).strip():
            yield text


def _paragraphs(path: Path, raw: IO[bytes]) -> Iterator[str]:
    """Paragraphs with the blank lines behind them, for line ends are tokens too."""
    lines: list[str] = []
    size = 0
    for number, raw_line in read_raw_lines(path, raw):
        try:
            line = decode_line(raw_line)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if line.strip():
            if lines and (not lines[-1].strip() or size + len(line) >= TEXT_CHARACTERS):
                yield "".join(lines)
                lines, size = [], 0
        elif not lines:
            continue
        lines.append(line + "\n")
        size += len(line) + 1
    if lines:
        yield "".join(lines)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > TEXT_CHARACTERS:
        end = start + TEXT_CHARACTERS
        at = max(text.rfind(space, start + 1, end) for space in "\n ")
        end = at if at > start else end
        yield text[start:end]
        start = end
    yield text[start:]


def _num_bytes(paths: Sequence[str | Path]) -> int:
    """Size of the files that are there; one that is not is refused where it is opened."""
    return sum(path.stat().st_size for path in map(Path, paths) if path.is_file())
