"""A BPE tokenizer taken apart: its tokens, and the two parts that each one is merged from."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from drama.errors import UserError

# sentencepiece writes a space so; decoders turn it back before they join bytes, so that a fallback
# to its bytes would not come back as a space
SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class BytePairs:
    """A fast tokenizer's tokenizer.json, and what it says about each token.

    state: the parsed tokenizer.json. ids: token to id, added tokens included. parts: per id that
    merges produce, the ids of the two parts in its last merge. Added tokens have none: they are
    cut out of the text before any merge.
    reachable: ids that some text yields.

    Which of several merges produces a token does not depend on the text around it: merges inside
    its span run in the order of their rank as they would were the span alone, and one across its
    border would have made it part of something else. So each token is tokenised alone, once.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises:
        UserError: a slow tokenizer, another model than BPE, or a BPE with affixes.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__}: a vocabulary cut needs a fast tokenizer "
                "(tokenizer.json); save the model's fast one"
            )
        self.state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        self.model: dict[str, Any] = self.state["model"]
        kind = self.model["type"]
        if kind != "BPE":
            raise UserError(
                f"tokenizer model '{kind}': its vocabulary cannot be cut; only BPE can (Llama, "
                "Mistral, Qwen, SmolLM), so leave the vocabulary as it is"
            )
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self.model[key]:
                raise UserError(
                    f"tokenizer with {key} '{self.model[key]}': its vocabulary cannot be cut; "
                    "only BPE without affixes can, so leave the vocabulary as it is"
                )
        self.vocab: dict[str, int] = self.model["vocab"]
        self.added = {token["id"] for token in self.state["added_tokens"]}
        self.ids = self.vocab | {x["content"]: x["id"] for x in self.state["added_tokens"]}
        self.parts: dict[int, tuple[int, int]] = {}
        self.reachable: set[int] = set(self.added)
        self.byte_ids = {i for token, i in self.vocab.items() if _BYTE.fullmatch(token)}
        # whether a character without a token becomes its bytes, so that it need not be kept
        self.falls_back = self.model["byte_fallback"] and len(self.byte_ids) == 256
        self._derive()

    def _derive(self) -> None:
        ranks = {(a, b): rank for rank, (a, b) in enumerate(self.model["merges"])}
        whole_words = self.model["ignore_merges"]
        for token, number in self.vocab.items():
            if number in self.added:
                continue
            pair = _last_merge(token, self.vocab, ranks)
            if pair is not None:
                self.parts[number] = (self.vocab[pair[0]], self.vocab[pair[1]])
            if pair is not None or len(token) == 1 or whole_words or number in self.byte_ids:
                self.reachable.add(number)

    def alphabet(self) -> set[int]:
        """Ids without which some text could no longer be encoded and decoded: the byte tokens
        where characters fall back to them, otherwise every token of one character (with
        byte-level BPE, a byte)."""
        characters = {
            i
            for token, i in self.vocab.items()
            if len(token) == 1 and (token == SPACE or not self.falls_back)
        }
        return self.byte_ids | characters

    def special(self) -> set[int]:
        """Ids that tokenizer.json names: added tokens, the post-processor's, padding, unknown."""
        named = {holder[key] for holder, key in id_slots(self.state)}
        unknown = self.model["unk_token"]
        return named | ({self.ids[unknown]} if unknown in self.ids else set())

    def closure(
        self, ids: Iterable[int], known: set[int] | frozenset[int] = frozenset()
    ) -> set[int]:
        """`ids` and all that they are merged from, less what is `known` with its own parts."""
        found: set[int] = set()
        open_ids = [i for i in ids if i not in known]
        while open_ids:
            number = open_ids.pop()
            if number not in found and number not in known:
                found.add(number)
                open_ids += self.parts.get(number, ())
        return found

    def cut(self, kept: Iterable[int]) -> dict[str, Any]:
        """Return a tokenizer.json of the kept ids alone, numbered 0, 1, ... in their old order.

        Merges whose parts and result stay remain in their order; everything else is as it was.
        """
        new = {old: number for number, old in enumerate(sorted(kept))}
        vocab = {token: new[old] for token, old in self.vocab.items() if old in new}
        merges = [
            pair
            for pair in self.model["merges"]
            if pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab
        ]
        state = copy.deepcopy({k: value for k, value in self.state.items() if k != "model"})
        state["model"] = self.model | {
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": merges,
        }
        for holder, key in id_slots(state):
            holder[key] = new[holder[key]]
        return state


def id_slots(state: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Every place of a tokenizer.json outside the model that holds an id, as (container, key)."""
    for token in state["added_tokens"]:
        yield token, "id"
    if state["padding"]:
        yield state["padding"], "pad_id"
    if state["post_processor"]:
        yield from _processor_slots(state["post_processor"])


def _processor_slots(processor: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    kind = processor["type"]
    if kind == "Sequence":
        for inner in processor["processors"]:
            yield from _processor_slots(inner)
    elif kind == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            for place in range(len(special["ids"])):
                yield special["ids"], place
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for key in ("sep", "cls"):
            yield processor[key], 1


def _last_merge(
    token: str, vocab: dict[str, int], ranks: dict[tuple[str, str], int]
) -> tuple[str, str] | None:
    """The merge that completes `token` when it is tokenised alone; None where none does."""
    parts = list(token)
    if len(parts) == 1 or any(part not in vocab for part in parts):
        return None
    pair: tuple[str, str] | None = None
    while len(parts) > 1:
        # the lowest rank first, and of equals the leftmost
        rank, place = min(
            (ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(parts))
        )
        if rank == len(ranks):
            return None
        pair = (parts[place], parts[place + 1])
        parts[place : place + 2] = [pair[0] + pair[1]]
    return pair
