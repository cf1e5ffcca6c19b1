"""Cut a model's vocabulary to what a corpus needs: choose the tokens, rewrite tokenizer and model.

V ids of the old tokenizer, K kept.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drama.errors import UserError
from drama.hf import build_lm
from drama.prune.merges import BytePairs
from drama.prune.source import quiet

# rows of an embedding: GPUs multiply whole tiles of this size fastest
MULTIPLE = 64


def parse_size(text: str) -> int:
    """Read a number of tokens: "32000", or "32k" for 32,000 (as Llama 2's 32k vocabulary is).

    Raises:
        UserError: anything else, or 0.
    """
    match = re.fullmatch(r"(\d+)(k?)", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise UserError(
            f"keep '{text}': give a number of tokens, such as 32000 or 32k (k is 1,000)"
        )
    return int(match[1]) * (1000 if match[2] else 1)


def whole_tiles(num_tokens: int) -> int:
    """`num_tokens` rounded up to a multiple of `MULTIPLE`, as 8k, 16k, 32k and 64k already are."""
    return -(-num_tokens // MULTIPLE) * MULTIPLE


def choose_tokens(
    pairs: BytePairs, counts_V: np.ndarray, num_kept: int, required: Iterable[int] = ()
) -> tuple[int, ...]:
    """Choose which ids stay; returns K of them, rising, K being `num_kept` rounded up to 64.

    What must stay: the alphabet (byte tokens, or every single character where there is no fallback
    to them), added and special tokens, and `required`. The other places go to the tokens that are
    used most. A token is used where it stands in the tokenised corpus and where a longer token is
    merged from it; without it each use is about one token more. A part is used at least as often as
    the whole, so the most used tokens bring all their parts, and by this count no other choice
    gives a shorter corpus. Tokens that it never uses fill the rest in the order of their ids, which
    is mostly that of the tokenizer's training.

    Raises:
        UserError: more than the tokenizer has, or fewer than must stay.
    """
    must = pairs.closure(pairs.alphabet() | pairs.special() | set(required))
    size, least = whole_tiles(num_kept), whole_tiles(len(must))
    most = len(pairs.ids) // MULTIPLE * MULTIPLE
    if least > most:
        raise UserError(
            f"keep {num_kept:,}: {len(must):,} of the tokenizer's {len(pairs.ids):,} tokens must "
            "stay, so there is nothing to cut; leave the vocabulary as it is"
        )
    if size > most:
        raise UserError(
            f"keep {num_kept:,}: the tokenizer has {len(pairs.ids):,} tokens; "
            f"the nearest valid choice is {most} (a multiple of {MULTIPLE})"
        )
    if size < least:
        raise UserError(
            f"keep {num_kept:,}: {len(must):,} tokens must stay (single bytes or characters, and "
            f"special tokens); the nearest valid choice is {least}"
        )
    uses = _uses(pairs, counts_V)
    order = sorted(
        set(pairs.ids.values()) - must,
        key=lambda i: (-uses.get(i, 0), i not in pairs.reachable, i),
    )
    kept = set(must)
    while len(kept) < size:  # a second round only where a token and its parts found no room
        for number in order:
            # several at once only among equals: a part that is used as often may have a higher id
            new = pairs.closure((number,), kept)
            if len(new) <= size - len(kept):
                kept |= new
    return tuple(sorted(kept))


def _uses(pairs: BytePairs, counts_V: np.ndarray) -> dict[int, int]:
    """How many tokens of the corpus each id saves, standing alone or inside longer ones."""
    uses = {number: int(counts_V[number]) for number in pairs.vocab.values()}
    # parts are shorter than the whole, so a token's own count is complete when its turn comes
    for token, number in sorted(pairs.vocab.items(), key=lambda item: -len(item[0])):
        for part in pairs.parts.get(number, ()):
            uses[part] += uses[number]
        if len(token) == 1 and pairs.falls_back:
            uses[number] *= max(1, len(token.encode()) - 1)
    return uses


def cut_tokenizer(tokenizer: Any, pairs: BytePairs, kept: Sequence[int]) -> Any:
    """Return a tokenizer of the same class that knows the `kept` ids alone, numbered from 0.

    `pairs` is the tokenizer taken apart, `kept` from `choose_tokens`. A text whose tokens are all
    kept, with what they are merged from, is split as before: of the merges that ran on it none is
    missing, and none is new. Every text that came back from encode and decode still does.

    Raises:
        UserError: a tokenizer class that does not read its ids from tokenizer.json.
    """
    state = pairs.cut(kept)
    new = {old: number for number, old in enumerate(kept)}
    with tempfile.TemporaryDirectory() as folder, quiet():
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        small = type(tokenizer).from_pretrained(folder)
    if small.get_vocab() != {token: new[i] for token, i in pairs.ids.items() if i in new}:
        raise UserError(
            f"{type(tokenizer).__name__}: this class does not take its ids from tokenizer.json, so "
            "its vocabulary cannot be cut; save the tokenizer as PreTrainedTokenizerFast"
        )
    return small


def configured_ids(configs: Iterable[Any], rows: int) -> set[int]:
    """The ids below `rows` that configurations name: begin, end, padding and the like."""
    named = [number for config in configs for _, ids in _named_ids(config) for number in ids]
    return {number for number in named if 0 <= number < rows}


def cut_vocabulary(model: Any, kept: Sequence[int]) -> Any:
    """Return a new model of the same class with the rows `kept` of embedding and output layer.

    For Llama, Mistral, Qwen2 and Qwen3 with a language-model head. Row r of the result is row
    `kept[r]` of `model`, to the bit; ids in configuration and generation configuration follow, and
    one that is no row of the old model (such as -1) becomes None. The other weights are shared with
    `model`, not copied.

    Raises:
        UserError: ids that do not rise or are no rows, or that lack one a configuration names.
    """
    rows = model.config.vocab_size
    if list(kept) != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] >= rows:
        raise UserError(f"kept ids: must rise, and lie between 0 and {rows - 1} (the model's rows)")
    if missing := configured_ids((model.config, model.generation_config), rows) - set(kept):
        raise UserError(
            f"kept ids: {min(missing)} is missing, which the model's configuration names as a "
            "special token; keep it"
        )
    new = {old: number for number, old in enumerate(kept)}
    config = _renumbered(model.config, new)
    config.vocab_size = len(kept)
    index_K = torch.tensor(list(kept), device=model.device)
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name].index_select(0, index_K)
    small = build_lm(config, state)
    small.model.rotary_emb.to(model.device)
    small.generation_config = _renumbered(model.generation_config, new)
    return small


def _named_ids(config: Any) -> list[tuple[str, list[int]]]:
    """(name, ids) of every `..._token_id` that is set, one id or several."""
    return [
        (name, value if isinstance(value, list) else [value])
        for name, value in vars(config).items()
        if name.endswith("_token_id") and value is not None
    ]


def _renumbered(config: Any, new: dict[int, int]) -> Any:
    config = copy.deepcopy(config)
    for name, numbers in _named_ids(config):
        found = [new[number] for number in numbers if number in new]
        several = isinstance(getattr(config, name), list)
        setattr(config, name, (found if several else found[0]) if found else None)
    return config
