"""Prune a language model by importance: load, measure, choose, cut, judge, write."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from drama.console import console
from drama.errors import UserError
from drama.files import replacing_folder
from drama.hf import write_rope_keys
from drama.prune.calibration import Calibration, read_calibration
from drama.prune.importance import Importance, choose, score
from drama.prune.layers import drop_layers
from drama.prune.loss import lm_loss, pass_dtype
from drama.prune.search import (
    Budget,
    Candidate,
    Sizes,
    measure,
    parse_budget,
    propose,
    search_table,
)
from drama.prune.shape import Shape, parse_target, plan_table
from drama.prune.source import find_llm, load_model, load_tokenizer, quiet, read_config
from drama.prune.statistics import collect
from drama.prune.surgery import Plan, cut

ROW_LENGTH = 512
HELD_OUT_TOKENS = 4096
LAYER_SHARE = 16  # one scoring row in so many orders the layers, which takes many passes
REPORT_NAME = "pruning.json"


@dataclass(frozen=True)
class PruneReport:
    """What a pruning did; losses are nats per token on text that was not scored with.

    search: the shapes that were tried for a budget, best first; empty where the target was given.
    After a dry run `out`, `plan`, the losses, the rate and `seconds` are None, and with a budget
    `target` too.
    """

    source: Shape
    target: Shape | None
    out: Path | None = None
    plan: Plan | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    search: tuple[Candidate, ...] = ()


def prune(
    model_path: str | Path,
    target: str | None,
    calibration: str | Path,
    out: str | Path,
    *,
    budget: str | None = None,
    candidates: int = 8,
    calibration_tokens: int = 32768,
    seed: int = 0,
    dry_run: bool = False,
) -> PruneReport:
    """Prune the Llama at `model_path` and write it to `out` as a Hugging Face folder.

    The shape is `target`, or with a `budget` in its place (`search.parse_budget`) the one of up to
    `candidates` proposals whose held-out loss is lowest right after the cut.

    The folder holds float32 weights, the tokenizer, and pruning.json: shapes, kept indices, scores,
    the calibration text's sha256, and the held-out loss before and after. It appears whole or not
    at all; an older pruned model at `out` is replaced. The source is only read. Runs on the GPU
    where there is one. A dry run checks every input and prints the plan or the proposals, without
    the weights.

    Raises:
        UserError: both of target and budget, or neither; bad model, target, budget or calibration
            text (`drama.prune.source`, `parse_target`, `drama.prune.search`, `read_calibration`);
            `out` is the source or holds something else, or its disk is full.
    """
    start = time.perf_counter()
    if (target is None) == (budget is None):
        raise UserError(
            "give either a shape (--to, such as 0.1b) or a budget (--budget, such as 60M)"
        )
    where = find_llm(model_path)
    config = read_config(where)
    source = Shape.of(config)
    sizes = Sizes(config.vocab_size, config.tie_word_embeddings)
    limit = None if budget is None else parse_budget(budget)
    if limit is not None:
        tried = propose(limit, source, sizes, candidates)
    else:
        assert target is not None
        tried = [sizes.candidate(parse_target(target, source))]
    out = Path(out)
    _check_out(out, where.folder, 4 * max(candidate.parameters for candidate in tried))
    _show(tried, source, sizes, limit)
    tokenizer: Any = load_tokenizer(where, sizes.vocab_size)
    text = read_calibration(
        calibration,
        tokenizer,
        num_tokens=calibration_tokens,
        held_out_tokens=HELD_OUT_TOKENS,
        length=ROW_LENGTH,
        seed=seed,
    )
    if dry_run:
        if limit is not None:
            return PruneReport(source, None, search=tuple(tried))
        return PruneReport(source, tried[0].shape)

    model = load_model(where, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]
    dtype = pass_dtype(device)
    console.print(f"calibration passes: {dtype} on {device.type}".replace("torch.", ""))
    statistics = collect(model, text.scoring, dtype)
    layer_rows = text.scoring[: -(-len(text.scoring) // LAYER_SHARE)]
    fewest = min(candidate.shape.layers for candidate in tried)
    order = drop_layers(model, layer_rows, fewest, dtype)
    importance = score(statistics, source, order)
    if limit is not None:
        tried = measure(model, tried, importance, statistics.energy, text.held_out, dtype)
        _show(tried, source, sizes, limit)
    shape = tried[0].shape
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
        search=() if limit is None else tuple(tried),
    )
    facts = {
        "model": str(model_path),
        "calibration": _calibration_facts(calibration, text, seed),
        "scores": _score_facts(importance, plan),
        "layers": asdict(order),
        **{key: value for key, value in asdict(report).items() if key != "out"},
    }
    _write(small, tokenizer, facts, out)
    console.print(
        f"held-out loss {loss_before:.3f} before, {loss_after:.3f} after "
        f"(perplexity {math.exp(loss_before):,.1f} and {math.exp(loss_after):,.1f})"
    )
    return report


def _show(tried: list[Candidate], source: Shape, sizes: Sizes, budget: Budget | None) -> None:
    """Print the proposals of a budget, and the plan where the shape is settled."""
    if budget is not None:
        console.print(search_table(tried, budget))
    if budget is None or tried[0].loss is not None:
        shape = tried[0].shape
        console.print(plan_table(source, shape, vocab_size=sizes.vocab_size, tied=sizes.tied))


def _check_out(out: Path, source_folder: Path, num_bytes: int) -> None:
    """Refuse an output that would destroy something or cannot hold the model."""
    source, target = source_folder.resolve(), out.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise UserError(
            f"{out}: the output overlaps the source model {source_folder}; name another"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the pruned model")
    if out.is_dir() and any(out.iterdir()) and not (out / REPORT_NAME).is_file():
        raise UserError(
            f"{out}: holds files that are no pruned model (no {REPORT_NAME}), and would be "
            "replaced; name an empty or new folder"
        )
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"{out}: the pruned model takes {num_bytes / 1e6:,.0f} MB, the disk has "
            f"{free / 1e6:,.0f} MB free; free some or name another disk"
        )


def _write(small: LlamaForCausalLM, tokenizer: Any, facts: dict[str, Any], out: Path) -> None:
    with replacing_folder(out) as folder:
        with quiet():
            small.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        write_rope_keys(folder)
        text = json.dumps(facts, indent=1, allow_nan=False)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")


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
