"""What a step of recovery costs beside transformers' own step of the same model on the same texts.

Same engine, ZeRO stage, precision and optimizer. Transformers pads the texts to the longest and
holds their logits whole; or it cuts their concatenation into rows of equal length, where texts see
each other. Ours is timed with all texts in one chunk, in chunks of half of that, with blocks
computed again, and with a parent to imitate.

B texts, N tokens of the longest.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
from torch import Tensor

from drama.bench.plain_lm import PlainLM
from drama.bench.rows import Rows, interleaved, peak_bytes
from drama.console import console
from drama.data.texts import TextBatch
from drama.prune.recovery import Recoverer

IGNORED = -100  # a label that transformers' loss leaves out
PART = 2


def padded(batch: TextBatch, pad_id: int) -> dict[str, Tensor]:
    """The texts as transformers takes them: padded on the right, [B, N]."""
    rows = [torch.from_numpy(row.astype("int64")) for row in batch.rows]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in rows], batch_first=True)
    return {
        "input_ids": pad(padding_value=pad_id),
        "attention_mask": mask,
        "labels": pad(padding_value=IGNORED),
    }


def in_rows(batch: TextBatch, length: int) -> dict[str, Tensor]:
    """The texts end to end, cut into rows of equal length; what does not fill one is left out."""
    ids = torch.cat([torch.from_numpy(row.astype("int64")) for row in batch.rows])
    ids_BN = ids[: len(ids) // length * length].view(-1, length)
    return {"input_ids": ids_BN, "labels": ids_BN}


def check(ours: Recoverer, plain: PlainLM, batch: TextBatch, whole: dict[str, Tensor]) -> None:
    """Refuse to time two ways that do not compute the same: losses before the first step, and the
    norms of its gradient."""
    sums, counts = ours.step_runner.evaluate(batch, len(ours.texts.sources))
    mine = sum(sums) / sum(counts)
    with torch.no_grad():
        on_device = {name: x.to(plain.device) for name, x in whole.items()}
        theirs = plain.engine(**on_device, use_cache=False).loss.item()
    limit = 1e-2 if ours.recipe.train.precision == "bf16" else 1e-4
    assert abs(mine - theirs) < limit * theirs, (mine, theirs)
    ours.step_runner.token_budget = batch.num_tokens
    norm = ours.step_runner.step(batch).grad_norm
    plain.step([whole])
    assert abs(norm - plain.grad_norm) < 10 * limit * plain.grad_norm, (norm, plain.grad_norm)
    console.print(
        f"same loss, {mine:.5f} and {theirs:.5f}, and norm of the gradient, {norm:.4f} and "
        f"{plain.grad_norm:.4f}",
        highlight=False,
    )


def measure(
    alone: Recoverer, imitating: Recoverer, plain: PlainLM, rows: Rows, *, seconds: float
) -> dict[str, tuple[float, float]]:
    """Time the ways in turn; add rows of tokens/s, peak memory and seconds by phase.

    alone, imitating: with and without a parent, of the same model and texts. Returns tokens/s and
    MiB by way.
    """
    recipe, device = alone.recipe, alone.ranks.device
    batch = alone.texts.batches[0]
    pad_id = alone.tokenizer.pad_token_id
    whole = padded(batch, alone.config.eos_token_id if pad_id is None else pad_id)
    check(alone, plain, batch, whole)
    blocks = in_rows(batch, min(recipe.data.length, batch.num_tokens))
    phases: dict[str, dict[str, float]] = {}

    def theirs(name: str, passes: dict[str, Tensor], steps: bool = True) -> None:
        (plain.step if steps else plain.backward)([passes])
        phases[name] = plain.seconds

    def ours(
        name: str, recoverer: Recoverer, budget: int, recompute: bool, steps: bool = True
    ) -> None:
        runner = recoverer.step_runner
        runner.token_budget, recoverer.student.recompute = budget, recompute
        phases[name] = (runner.step if steps else runner.backward)(batch).seconds

    all_at_once = batch.num_tokens
    smaller = -(-all_at_once // PART)
    smaller = max(smaller, int(batch.rows.lengths.max()))
    runs: dict[str, Any] = {}
    add = functools.partial
    runs["transformers, padded"] = add(theirs, "transformers, padded", whole)
    runs["transformers, rows of equal length"] = add(
        theirs, "transformers, rows of equal length", blocks
    )
    for name, recoverer, budget, recompute in (
        ("packed, one chunk", alone, all_at_once, False),
        ("packed, half the budget", alone, smaller, False),
        ("packed, one chunk, blocks again", alone, all_at_once, True),
        ("packed, one chunk, parent", imitating, all_at_once, False),
    ):
        runs[name] = add(ours, name, recoverer, budget, recompute)
    times = interleaved(runs, device, seconds=seconds, rounds=8)
    last, lengths = dict(phases), batch.rows.lengths
    config = {
        "model": recipe.model.path.name,
        "texts": len(lengths),
        "tokens": batch.num_tokens,
        "longest": int(lengths.max()),
        "slots": len(lengths) * int(lengths.max()),
        "vocabulary": alone.config.vocab_size,
        "precision": recipe.train.precision,
        "deepspeed": recipe.train.deepspeed,
    }
    found: dict[str, tuple[float, float]] = {}
    for name, spent in times.items():
        provider = "transformers" if name.startswith("transformers") else "ours"
        tokens = blocks["input_ids"].numel() if "rows of" in name else batch.num_tokens
        rates = [tokens / second for second in spent]
        # the optimizer's own temporaries, the same in all ways, would hide what differs
        memory = peak_bytes(functools.partial(runs[name], steps=False), device) / 2**20
        rows.add(provider, "step", "tokens/s", name, rates, config)
        rows.add(provider, "forward and backward", "MiB", name, [memory], config)
        for phase, value in last[name].items():
            rows.add(provider, phase, "seconds", name, [value], config)
        found[name] = (statistics.median(rates), memory)
    return found
