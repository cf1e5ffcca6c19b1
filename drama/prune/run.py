"""Prune a language model by activation importance: load, measure, choose, cut, judge, write."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drama.console import console
from drama.prune.calibration import Calibration, read_calibration
from drama.prune.importance import Importance, choose, score
from drama.prune.loss import lm_loss, pass_dtype
from drama.prune.output import check_out, write_model
from drama.prune.shape import Shape, count_parameters, parse_target, plan_table
from drama.prune.source import find_llm, load_model, load_tokenizer, read_config
from drama.prune.statistics import collect
from drama.prune.surgery import Plan, cut

ROW_LENGTH = 512
HELD_OUT_TOKENS = 4096


@dataclass(frozen=True)
class PruneReport:
    """What a pruning did; losses are nats per token on text that was not scored with.

    After a dry run `out`, `plan`, the losses, the rate and `seconds` are None.
    """

    source: Shape
    target: Shape
    out: Path | None = None
    plan: Plan | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None


def prune(
    model_path: str | Path,
    target: str,
    calibration: str | Path,
    out: str | Path,
    *,
    calibration_tokens: int = 32768,
    seed: int = 0,
    dry_run: bool = False,
) -> PruneReport:
    """Prune the model at `model_path` to `target` and write it to `out` as a Hugging Face folder.

    The folder holds float32 weights, the tokenizer, and pruning.json: shapes, kept indices, scores,
    the calibration text's sha256, and the held-out loss before and after. It appears whole or not
    at all; an older pruned model at `out` is replaced. The source is only read. Runs on the GPU
    where there is one. A dry run checks every input and prints the plan, without the weights.

    Raises:
        UserError: bad model, target or calibration text (`drama.prune.source`, `parse_target`,
            `read_calibration`); `out` is the source or holds something else, or its disk is full.
    """
    start = time.perf_counter()
    where = find_llm(model_path)
    config = read_config(where)
    source = Shape.of(config)
    shape = parse_target(target, source)
    vocab_size, tied = config.vocab_size, config.tie_word_embeddings
    out = Path(out)
    num_bytes = 4 * count_parameters(shape, vocab_size, tied).total
    check_out(out, where.folder, num_bytes)
    console.print(plan_table(source, shape, vocab_size=vocab_size, tied=tied))
    tokenizer: Any = load_tokenizer(where, vocab_size)
    text = read_calibration(
        calibration,
        tokenizer,
        num_tokens=calibration_tokens,
        held_out_tokens=HELD_OUT_TOKENS,
        length=ROW_LENGTH,
        seed=seed,
    )
    if dry_run:
        return PruneReport(source, shape)

    model = load_model(where, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    dtype = pass_dtype(device)
    console.print(f"calibration passes: {dtype} on {device.type}".replace("torch.", ""))
    statistics = collect(model, text.scoring, dtype)
    importance = score(statistics, source)
    plan = choose(importance, statistics.energy, shape)
    small = cut(model, plan)
    loss_before, loss_after = (lm_loss(x, text.held_out, dtype) for x in (model, small))
    report = PruneReport(
        source=source,
        target=shape,
        out=out,
        plan=plan,
        loss_before=loss_before,
        loss_after=loss_after,
        tokens_per_s=statistics.num_tokens / statistics.seconds,
        seconds=time.perf_counter() - start,
    )
    facts = {
        "model": str(model_path),
        "calibration": _calibration_facts(calibration, text, seed),
        "scores": _score_facts(importance, plan),
        **{key: value for key, value in asdict(report).items() if key != "out"},
    }
    write_model(small, tokenizer, facts, out)
    console.print(
        f"held-out loss {loss_before:.3f} before, {loss_after:.3f} after "
        f"(perplexity {math.exp(loss_before):,.1f} and {math.exp(loss_after):,.1f})"
    )
    return report


def _calibration_facts(path: str | Path, text: Calibration, seed: int) -> dict[str, Any]:
    return {
        "file": str(path),
        "sha256": text.sha256,
        "scoring_tokens": text.scoring.numel(),
        "held_out_tokens": text.held_out.numel(),
        "row_length": ROW_LENGTH,
        "seed": seed,
    }


def _score_facts(importance: Importance, plan: Plan) -> dict[str, Any]:
    """Every layer's score, and of the other units the range of what stayed and what went."""
    layers = list(plan.layers)
    return {
        "layer": importance.layer.tolist(),
        "hidden": _ranges(importance.hidden[None], (plan.hidden,)),
        "kv_group": _ranges(importance.kv_group[layers], plan.kv_groups),
        "query_head": _ranges(importance.query_head[layers], plan.query_heads),
        "ffn": _ranges(importance.ffn[layers], plan.ffn),
    }


def _ranges(score_LU: Tensor, kept: tuple[tuple[int, ...], ...]) -> dict[str, list[float] | None]:
    """Lowest, median and highest score of the kept and of the dropped units."""
    mask_LU = torch.zeros_like(score_LU, dtype=torch.bool)
    for row, indices in enumerate(kept):
        mask_LU[row, list(indices)] = True
    return {
        name: [x.min().item(), x.median().item(), x.max().item()] if x.numel() else None
        for name, x in (("kept", score_LU[mask_LU]), ("dropped", score_LU[~mask_LU]))
    }
