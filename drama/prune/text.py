"""Text by domain as rows of token ids: tokenised once, memory-mapped, drawn in a fixed order.

    FOLDER/NAME.bin   int32 token ids, documents closed by EOS, one after another
           NAME.json  what they were made from; written last

R rows of a global batch, N tokens a row, K domains.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drama.console import progress
from drama.data.lines import open_raw, parse_object, read_lines
from drama.data.plain import decode_plain, read_plain
from drama.errors import UserError
from drama.files import recovered, replacing

DOCUMENTS_AT_ONCE = 512


def documents(path: str | Path) -> Iterator[str]:
    """The documents of a text file: UTF-8, plain or packed (.gz, .xz, .zst).

    A file with .jsonl or .ndjson in its name holds a JSON object a line, with `text` (a `title` is
    put before it); of any other blank lines separate them, and a very long one comes in pieces.

    Raises:
        UserError: unreadable, or a JSON line without `text`; the message names file and line.
    """
    if holds_json_lines(path):
        for number, line in read_lines(path):
            if line.strip():
                yield text_of(path, number, line).strip()
        return
    for number, document in read_plain(path):
        try:
            yield decode_plain(document)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None


def holds_json_lines(path: str | Path) -> bool:
    """Whether a file's name says that each of its lines is a JSON object."""
    return bool({".jsonl", ".ndjson"} & set(Path(path).suffixes))


def text_of(path: str | Path, number: int, line: str | bytes) -> str:
    """The document in one line of JSON, its title before the text.

    Raises:
        UserError: no JSON object, or without `text`; the message names file and line.
    """
    try:
        row = parse_object(line)
    except UserError as error:
        raise UserError(f"{path}:{number}: {error}") from None
    text, title = row.get("text"), row.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str):
        raise UserError(f'{path}:{number}: no text; a line must be {{"text": "..."}}')
    return f"{title}\n{text}" if title else text


def sha256_of(path: str | Path) -> str:
    """Of the bytes as they lie there."""
    with open_raw(path) as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()


class Domain:
    """Rows [N] of one domain, of which `held_out`, evenly spread, are never drawn."""

    def __init__(self, name: str, ids: np.ndarray, length: int, held_out: int, seed: int) -> None:
        self.name, self.length = name, length
        self._rows = ids[: len(ids) // length * length].reshape(-1, length)
        count = len(self._rows)
        self._held_out = np.unique(np.arange(held_out) * count // max(1, held_out))
        self._training = np.setdiff1d(np.arange(count), self._held_out)
        self._seed = [seed, zlib.crc32(name.encode())]
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        """Rows to train on."""
        return len(self._training)

    def draw(self, number: int) -> np.ndarray:
        """The row that is drawn as `number`-th, from 0: a new permutation every epoch."""
        epoch, place = divmod(number, len(self))
        if epoch != self._epoch:
            rng = np.random.default_rng([*self._seed, epoch])
            self._order, self._epoch = rng.permutation(self._training), epoch
        row: np.ndarray = self._rows[self._order[place]]
        return row

    @property
    def held_out_rows(self) -> Tensor:
        """Rows to judge by, int64 [held_out, N]."""
        return torch.from_numpy(self._rows[self._held_out].astype(np.int64))


class TextStream:
    """Global batches out of several domains: a function of seed, step, weights and what has been
    drawn so far, never of the ranks."""

    def __init__(self, domains: Sequence[Domain], seed: int) -> None:
        self.domains, self._seed = list(domains), seed
        self.drawn = {domain.name: 0 for domain in domains}

    def batch(
        self, step: int, weights: Mapping[str, float], num_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Token ids [R, N] and the domain's number of each row [R], both int64.

        Systematic sampling: a domain gets its share of the rows to within one, and over many steps
        exactly.
        """
        share = np.array([weights[domain.name] for domain in self.domains])
        offset = np.random.default_rng([self._seed, step]).random()
        places = (np.arange(num_rows) + offset) / num_rows * share.sum()
        chosen = np.searchsorted(np.cumsum(share), places, side="right")
        chosen = np.minimum(chosen, len(share) - 1)
        rows = []
        for number in chosen:
            domain = self.domains[number]
            rows.append(domain.draw(self.drawn[domain.name]))
            self.drawn[domain.name] += 1
        return torch.from_numpy(np.stack(rows).astype(np.int64)), torch.from_numpy(chosen)


def tokenise(
    name: str,
    paths: Sequence[str | Path],
    tokenizer: Any,
    folder: Path,
    *,
    max_tokens: int,
    identity: str,
) -> Path:
    """Write a domain's token ids under `folder`, or find them there; return the `.bin` file.

    Documents come from the files in turn, so that a long one does not crowd out the others.
    max_tokens: stop there; a run that needs fewer reads no further. identity: says which tokenizer
    it is; ids of another one are written anew.

    Raises:
        UserError: see `documents`; no file, or no text in any.
    """
    target, facts = folder / f"{name}.bin", folder / f"{name}.json"
    wanted = {
        "files": {str(path): sha256_of(path) for path in paths},
        "tokenizer": identity,
        "max_tokens": max_tokens,
    }
    if facts.is_file() and target.is_file():
        stored = json.loads(facts.read_text(encoding="utf-8"))
        if stored == wanted | {"tokens": target.stat().st_size // 4}:
            return target
    facts.unlink(missing_ok=True)
    recovered(target)
    written = 0
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = _in_turn([documents(path) for path in paths])
    with replacing(target) as temporary, temporary.open("wb") as file, progress() as bar:
        task = bar.add_task(f"tokens of {name}", total=max_tokens, note="")
        while written < max_tokens and (texts := list(islice(stream, DOCUMENTS_AT_ONCE))):
            for ids in tokenizer(texts, verbose=False)["input_ids"]:
                ids = ids + (eos if ids[-1:] != eos else [])
                np.array(ids, np.int32).tofile(file)
                written += len(ids)
            bar.update(task, completed=min(written, max_tokens))
    if not written:
        shown = ", ".join(str(path) for path in paths)
        raise UserError(f"data.domains.{name}: no text in {shown}; give text files")
    with replacing(facts) as temporary:
        text = json.dumps(wanted | {"tokens": written}, indent=1)
        temporary.write_text(text, encoding="utf-8")
    return target


def _in_turn(streams: list[Iterator[str]]) -> Iterator[str]:
    while streams:
        for stream in list(streams):
            if (text := next(stream, None)) is None:
                streams.remove(stream)
            else:
                yield text


def open_domain(name: str, file: Path, *, length: int, held_out: int, seed: int) -> Domain:
    """Map a domain's token ids.

    Raises:
        UserError: too few for the held-out rows and one more.
    """
    ids = np.memmap(file, np.int32, mode="r")
    domain = Domain(name, ids, length, held_out, seed)
    if not len(domain):
        raise UserError(
            f"data.domains.{name}: too short: {len(ids):,} tokens are fewer than "
            f"{held_out + 1} rows of {length:,} ({held_out} of them held out); give more text, or "
            "lower data.length or data.held_out_rows"
        )
    return domain


def find_texts(name: str, paths: Sequence[str | Path]) -> None:
    """Refuse files that are not there before anything slow begins.

    Raises:
        UserError: with the first one.
    """
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"data.domains.{name}: {path} is no file; give text files, .jsonl too")
