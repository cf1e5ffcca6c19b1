"""The model that another was cut from, as recovery reads it: frozen, packed, in the student's ids.

P predictions, E width of the parent, V vocabulary of the student.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from drama.attention import ATTENTION_NAME
from drama.console import console
from drama.errors import UserError
from drama.prune.output import REPORT_NAME
from drama.prune.predictions import Chunk
from drama.prune.shape import Shape
from drama.prune.source import find_llm, load_model, load_tokenizer, read_config
from drama.prune.student import Alignment, ParentStates, read_states
from drama.prune.vocabulary import cut_vocabulary


class Parent:
    """Opens a language model for students of the same tokens.

    Every rank holds it whole, in the precision of the run. `sha256` is of its files.

    Raises:
        UserError: see `drama.prune.source`; or a tokenizer that lacks a token of the student's.
    """

    def __init__(
        self, path: Path, tokenizer: Any, vocab_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        where = find_llm(path)
        config = read_config(where)
        self.sha256 = where.sha256
        own = load_tokenizer(where, config.vocab_size)
        model = load_model(where, config, dtype)
        kept = shared_ids(own, config.vocab_size, tokenizer, vocab_size, path)
        if kept is not None:
            model = cut_vocabulary(model, kept)
        self.shape, self.max_tokens = Shape.of(config), config.max_position_embeddings
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model.to(device).requires_grad_(False)

    @torch.no_grad()
    def __call__(self, chunk: Chunk, alignment: Alignment | None = None) -> ParentStates:
        """What it makes of a chunk's predictions."""
        blocks = [block for _, block in alignment.pairs] if alignment else []
        final_PE, states = read_states(self.model.model, chunk, causal=True, wanted=set(blocks))
        weight_VE = self.model.lm_head.weight
        return ParentStates(final_PE, weight_VE, [states[block] for block in blocks])


def shared_ids(
    own: Any, rows: int, students: Any, students_rows: int, where: Path
) -> tuple[int, ...] | None:
    """The parent's id of each of the student's tokens; None where they are the same ids.

    Raises:
        UserError: a token that the parent does not have.
    """
    vocab, wanted = own.get_vocab(), students.get_vocab()
    if vocab == wanted and rows == students_rows:
        return None
    missing = [token for token in wanted if token not in vocab]
    if missing or len(wanted) != students_rows:
        what = f"has no token {missing[0]!r}" if missing else "has other rows"
        raise UserError(
            f"model.parent {where}: {what}, so its logits say nothing of the student's tokens; "
            "name the model that the student was cut from"
        )
    return tuple(vocab[token] for token, _ in sorted(wanted.items(), key=lambda item: item[1]))


def align(student: Path, layers: int, parent: Shape) -> Alignment:
    """Which states of the parent the student's should be like, from pruning.json.

    A block's output should be what the parent's next block that stayed reads, the last one's what
    the parent's head reads. Cuts of cuts are followed back to a model of the parent's shape. Where
    the origin is unknown, blocks are paired by depth, nothing is known of the channels, and a
    warning says so.
    """
    kept, channels = _origin(student, parent)
    if kept is None or len(kept) != layers:
        kept, channels = [i * parent.layers // layers for i in range(layers)], None
        console.print(
            f"[yellow]warning:[/] {REPORT_NAME} of {student} does not lead back to the parent: "
            "states are paired by depth, through a map that begins at random"
        )
    after = [*(block - 1 for block in kept[1:]), parent.layers - 1]
    return Alignment(tuple(enumerate(after)), None if channels is None else tuple(channels))


def _origin(folder: Path, parent: Shape) -> tuple[list[int] | None, list[int] | None]:
    """Layers and channels of the parent that a chain of cuts has left."""
    layers: list[int] | None = None
    channels: list[int] | None = None
    seen: set[Path] = set()
    while folder.resolve() not in seen:  # a folder may have been moved over its own source
        seen.add(folder.resolve())
        try:
            facts = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
            plan, source, folder = facts.get("plan"), facts["source"], Path(facts["model"])
        except (OSError, ValueError, KeyError, TypeError):
            return None, None
        if plan is not None:
            layers = [plan["layers"][i] for i in layers] if layers else plan["layers"]
            channels = [plan["hidden"][i] for i in channels] if channels else plan["hidden"]
        if source == vars(parent):
            everything = list(range(parent.layers)), list(range(parent.hidden))
            return (layers, channels) if layers else everything
    return None, None
