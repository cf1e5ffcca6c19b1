"""Text to token ids as the retriever sees them: prefix, text, EOS, cut at a limit and counted.

A retriever of others may end its texts otherwise: what its tokenizer puts around a text stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from drama.data.records import Record
from drama.errors import UserError

Kind = Literal["query", "document"]


def load_tokenizer(path: str | Path) -> Any:
    """Load a fast tokenizer from a model folder.

    A language model's is made to append EOS: its post-processor is rewritten, so a saved copy
    appends EOS for every consumer. What it puts in front of a text (BOS, where it has one) stays.
    A retriever's (the folder has a modules.json) stays as it was trained, EOS or not.

    Raises:
        UserError: no tokenizer in the folder, no fast tokenizer, or no EOS token.
    """
    folder = Path(path)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json is missing); copy it there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: the tokenizer cannot be read: {error}") from error
    is_retriever = (folder / "modules.json").is_file()
    return _prepared(tokenizer, folder) if is_retriever else appending_eos(tokenizer, folder)


def appending_eos(tokenizer: Any, where: str | Path) -> Any:
    """Make a loaded tokenizer append EOS, pad on the right, and neither pad nor cut by itself.

    Raises:
        UserError: no fast tokenizer, or no EOS token.
    """
    _append_eos(_prepared(tokenizer, where))
    return tokenizer


def _prepared(tokenizer: Any, where: str | Path) -> Any:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{where}: the tokenizer has no fast version (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: the tokenizer has no EOS token; every text must end in one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.backend_tokenizer.no_padding()  # some tokenizer.json files bring both
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def _append_eos(tokenizer: Any) -> None:
    if _tail(tokenizer)[-1:] == [tokenizer.eos_token_id]:
        return
    front = tokenizer("")["input_ids"]
    names = [*tokenizer.convert_ids_to_tokens(front), tokenizer.eos_token]
    template = " ".join([*names[:-1], "$A", names[-1]])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template,
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in set(names)],
    )


def _tail(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer appends to a text."""
    encode = tokenizer.backend_tokenizer.encode
    whole, bare = encode("a").ids, encode("a", add_special_tokens=False).ids
    starts = range(len(whole) - len(bare) + 1)
    at = next(i for i in starts if whole[i : i + len(bare)] == bare)
    tail: list[int] = whole[at + len(bare) :]
    return tail


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of what decides a text's token ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


@dataclass(frozen=True)
class TextEncoder:
    """Tokenises texts for one retriever; picklable, so data workers can carry it."""

    tokenizer: Any
    query_prefix: str = ""
    document_prefix: str = ""

    def __call__(
        self, texts: Sequence[str], kind: Kind, max_tokens: int
    ) -> tuple[list[list[int]], int]:
        """Return ids per text, at most `max_tokens` long with EOS last (or what the tokenizer
        appends), and how many were cut.

        Raises:
            UserError: one string instead of several, or a kind other than query and document.
        """
        if isinstance(texts, str):
            raise UserError("texts is one string; give a list of texts")
        if kind not in ("query", "document"):
            raise UserError(f"kind '{kind}' must be query or document")
        prefix = self.query_prefix if kind == "query" else self.document_prefix
        return self._encode([prefix + text for text in texts], max_tokens)

    def queries(self, records: Sequence[Record], max_tokens: int) -> tuple[list[list[int]], int]:
        """The records' queries, each after its own prompt or else the query prefix."""
        texts = [(record.prompt or self.query_prefix) + record.query for record in records]
        return self._encode(texts, max_tokens)

    def _encode(self, texts: list[str], max_tokens: int) -> tuple[list[list[int]], int]:
        tail = _tail(self.tokenizer)
        rows, num_cut = [], 0
        # a list straight into the Rust tokenizer: one call, all texts
        for encoding in self.tokenizer.backend_tokenizer.encode_batch(texts):
            # a text without any token has no vector, and packing no place for it
            ids = encoding.ids or [self.tokenizer.eos_token_id]
            if len(ids) > max_tokens:
                num_cut += 1
                ids = [*ids[: max_tokens - len(tail)], *tail]
            rows.append(ids)
        return rows, num_cut
