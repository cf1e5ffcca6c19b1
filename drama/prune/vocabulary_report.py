"""What a vocabulary cut costs and saves: longer texts, fewer weights, bits per byte.

Losses per token of two vocabularies cannot be compared, since their tokens differ; bits per byte of
the same text can.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from drama.console import progress
from drama.errors import UserError
from drama.prune.corpus import count_tokens
from drama.prune.loss import inference, next_token_loss
from drama.prune.merges import BytePairs
from drama.prune.vocabulary import choose_tokens, cut_tokenizer, parse_size

# 16k characters, 4k tokens of English: enough to tell cuts apart, and quick on a CPU
JUDGED_TEXTS = 32
JUDGED_CHARACTERS = 512


@dataclass(frozen=True)
class VocabularyReport:
    """What a vocabulary cut does; pairs are (before, after), on held-out text of the corpus.

    corpus: sha256 by file. entries: tokens of the tokenizer. rows: of the embedding, which may have
    some to spare before. kept_share: of the held-out tokens, those that are kept. After a dry run
    `bits_per_byte` is empty, otherwise it holds the source, the model cut in shape (where it is)
    and the written model.
    """

    corpus: dict[str, str]
    entries: tuple[int, int]
    rows: tuple[int, int]
    kept_share: float
    tokens_per_character: tuple[float, float]
    tokens_per_word: tuple[float, float]
    bits_per_byte: tuple[float, ...] = ()


@dataclass(frozen=True)
class VocabularyPlan:
    """A vocabulary cut that is decided: K kept ids, the new tokenizer, texts to judge with."""

    kept: tuple[int, ...]
    tokenizer: Any
    texts: tuple[str, ...]
    report: VocabularyReport


def plan_vocabulary(
    tokenizer: Any,
    corpus: Sequence[str | Path],
    keep: str,
    *,
    rows: int,
    required: Iterable[int] = (),
    seed: int = 0,
) -> VocabularyPlan:
    """Count a corpus, choose `keep` tokens and cut the tokenizer; reads no weights.

    rows: of the model's embedding. required: ids to keep besides those of the tokenizer
    (`vocabulary.configured_ids`).

    Raises:
        UserError: no BOS or EOS token, a required id without a token; see also `parse_size`,
            `BytePairs`, `count_tokens`, `choose_tokens`, `cut_tokenizer`.
    """
    num_kept = parse_size(keep)
    pairs = BytePairs(tokenizer)
    _start_token(tokenizer)
    if unknown := set(required) - set(pairs.ids.values()):
        raise UserError(
            f"the model's configuration names token {min(unknown)}, which the tokenizer does not "
            "have; mend the *_token_id of config.json and generation_config.json"
        )
    # a choice out of range is refused before a long corpus is read
    choose_tokens(pairs, np.zeros(1 + max(pairs.ids.values()), np.int64), num_kept, required)
    found = count_tokens(corpus, tokenizer, seed=seed)
    kept = choose_tokens(pairs, found.counts_V, num_kept, required)
    small = cut_tokenizer(tokenizer, pairs, kept)
    before, after = (_encode(x, found.held_out) for x in (tokenizer, small))
    lengths = [sum(map(len, ids)) for ids in (before, after)]
    staying = set(kept)
    num_characters = sum(map(len, found.held_out))
    num_words = sum(len(text.split()) for text in found.held_out)
    report = VocabularyReport(
        corpus=found.sha256,
        entries=(len(pairs.ids), len(kept)),
        rows=(rows, len(kept)),
        kept_share=sum(i in staying for ids in before for i in ids) / lengths[0],
        tokens_per_character=(lengths[0] / num_characters, lengths[1] / num_characters),
        tokens_per_word=(lengths[0] / num_words, lengths[1] / num_words),
    )
    # from all over the corpus: several files may be several languages
    spread = found.held_out[:: -(-len(found.held_out) // JUDGED_TEXTS)]
    judged = tuple(text[:JUDGED_CHARACTERS] for text in spread)
    return VocabularyPlan(kept, small, judged, report)


def vocabulary_table(report: VocabularyReport, *, hidden: int, tied: bool) -> Table:
    """Lay tokens, lengths of held-out text and weights side by side."""
    table = Table(title="vocabulary plan")
    for heading in ("", "before", "after", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    weights = [rows * hidden * (1 if tied else 2) / 1e6 for rows in report.rows]
    for label, (old, new), form in (
        ("tokens", report.entries, ",d"),
        ("tokens per character", report.tokens_per_character, ".3f"),
        ("tokens per word", report.tokens_per_word, ".3f"),
        ("embedding and head (M)", weights, ",.2f"),
    ):
        table.add_row(label, format(old, form), format(new, form), f"{new / old:.1%}")
    table.add_row("saved (M)", "", f"{weights[0] - weights[1]:,.2f}", "")
    table.add_row("corpus' tokens that stay", "", f"{report.kept_share:.2%}", "")
    return table


def bits_per_byte(
    model: Any, tokenizer: Any, texts: Sequence[str], dtype: torch.dtype = torch.float32
) -> float:
    """Mean bits that the model needs for a byte (UTF-8) of the texts; all tokens count.

    Each text is a row of its own behind one start token (BOS, else EOS), so all models see the same
    characters, whatever their tokens.

    Raises:
        UserError: the tokenizer has neither BOS nor EOS.
    """
    start = _start_token(tokenizer)
    nats = 0.0
    with inference(model.device, dtype), progress() as bar:
        task = bar.add_task("bits per byte", total=len(texts), note="texts")
        for ids in _encode(tokenizer, texts):
            ids_N = torch.tensor([start, *ids], device=model.device)
            logits_NV = model(ids_N[None], use_cache=False).logits[0]
            nats += next_token_loss(logits_NV, ids_N).item()
            bar.update(task, advance=1)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def bits_line(bits: Sequence[float]) -> str:
    """ "0.9 before, 1.1 after", or with the model cut in shape alone between them."""
    names = ("before", "after") if len(bits) == 2 else ("before", "cut in shape", "after")
    return ", ".join(f"{value:.3f} {name}" for name, value in zip(names, bits, strict=True))


def _start_token(tokenizer: Any) -> int:
    for number in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if number is not None:
            return int(number)
    raise UserError(
        "the tokenizer has neither a BOS nor an EOS token; name one in tokenizer_config.json"
    )


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
