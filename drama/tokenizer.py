"""Text to token ids as the retriever sees them: prefix, text, EOS, cut at a limit and counted."""

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
    """Load a fast tokenizer from a model folder and make it append EOS.

    The post-processor is rewritten, so a saved copy appends EOS for every consumer. What the
    tokenizer puts in front of a text (BOS, where it has one) stays.

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
    return appending_eos(tokenizer, folder)


def appending_eos(tokenizer: Any, where: str | Path) -> Any:
    """Make a loaded tokenizer append EOS, pad on the right, and neither pad nor cut by itself.

    Raises:
        UserError: no fast tokenizer, or no EOS token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{where}: the tokenizer has no fast version (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: the tokenizer has no EOS token; every text must end in one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.backend_tokenizer.no_padding()  # some tokenizer.json files bring both
    tokenizer.backend_tokenizer.no_truncation()
    _append_eos(tokenizer)
    return tokenizer


def _append_eos(tokenizer: Any) -> None:
    around = tokenizer("a")["input_ids"]
    if around[-1] == tokenizer.eos_token_id:
        return
    front = tokenizer("")["input_ids"]
    names = [*tokenizer.convert_ids_to_tokens(front), tokenizer.eos_token]
    template = " ".join([*names[:-1], "$A", names[-1]])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template,
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in set(names)],
    )


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
        """Return ids per text, at most `max_tokens` long with EOS last, and how many were cut.

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
        eos = self.tokenizer.eos_token_id
        rows, num_cut = [], 0
        # a list straight into the Rust tokenizer: one call, all texts
        for encoding in self.tokenizer.backend_tokenizer.encode_batch(texts):
            ids = encoding.ids
            if len(ids) > max_tokens:
                num_cut += 1
                ids = [*ids[: max_tokens - 1], eos]
            rows.append(ids)
        return rows, num_cut
