"""Prune a language model by activation importance: load, measure, choose, cut, judge, write."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from drama.console import console
from drama.errors import UserError
from drama.prune.calibration import Calibration, read_calibration
from drama.prune.importance import Importance, choose, score
from drama.prune.loss import lm_loss, pass_dtype
from drama.prune.output import check_out, write_model
from drama.prune.shape import Shape, count_parameters, parse_target, plan_table
from drama.prune.source import Source, find_llm, load_model, load_tokenizer, read_config
from drama.prune.statistics import collect
from drama.prune.surgery import Plan, cut
from drama.prune.vocabulary import configured_ids, cut_vocabulary, parse_size, whole_tiles
from drama.prune.vocabulary_report import (
    VocabularyReport,
    bits_line,
    bits_per_byte,
    plan_vocabulary,
    vocabulary_table,
)

ROW_LENGTH = 512
HELD_OUT_TOKENS = 4096


@dataclass(frozen=True)
class PruneReport:
    """What a pruning did; losses are nats per token on text that was not scored with, of the
    source and of the model cut in shape, both with the source's tokens.

    After a dry run `out`, `plan`, the losses, the rate and `seconds` are None; the same but `out`
    and `seconds` without a cut in shape. `vocabulary` is None without a vocabulary cut.
    """

    source: Shape
    target: Shape
    out: Path | None = None
    plan: Plan | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    vocabulary: VocabularyReport | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None


def prune(
    model_path: str | Path,
    target: str | None,
    calibration: str | Path | None,
    out: str | Path,
    *,
    vocab_from: Sequence[str | Path] = (),
    keep: str | None = None,
    calibration_tokens: int = 32768,
    seed: int = 0,
    dry_run: bool = False,
) -> PruneReport:
    """Prune the model at `model_path` to `target` and write it to `out` as a Hugging Face folder.

    With `vocab_from` and `keep` the vocabulary is then cut to the `keep` tokens ("32k") that these
    corpora need most; without `target` and `calibration` that is all, and the shape stays.

    The folder holds float32 weights, the tokenizer, and pruning.json: shapes, kept indices, scores,
    the texts' sha256, the held-out loss before and after, and bits per byte where the vocabulary
    was cut. It appears whole or not at all; an older pruned model at `out` is replaced. The source
    is only read. Runs on the GPU where there is one. A dry run checks every input and prints the
    plan, without the weights.

    Raises:
        UserError: nothing to do, or half of a pair of arguments; bad model, target, calibration
            text or corpus (`drama.prune.source`, `parse_target`, `read_calibration`,
            `plan_vocabulary`); `out` is the source or holds something else, or its disk is full.
    """
    start = time.perf_counter()
    _check_task(target, calibration, vocab_from, keep)
    where = find_llm(model_path)
    config = read_config(where)
    source = Shape.of(config)
    shape = source if target is None else parse_target(target, source)
    rows, tied = config.vocab_size, config.tie_word_embeddings
    kept_rows = rows if keep is None else whole_tiles(parse_size(keep))
    out = Path(out)
    check_out(out, where.folder, 4 * count_parameters(shape, kept_rows, tied).total)
    console.print(plan_table(source, shape, vocab_size=rows, kept_tokens=kept_rows, tied=tied))
    tokenizer: Any = load_tokenizer(where, rows)
    text = vocabulary = None
    if calibration is not None:
        text = read_calibration(
            calibration,
            tokenizer,
            num_tokens=calibration_tokens,
            held_out_tokens=HELD_OUT_TOKENS,
            length=ROW_LENGTH,
            seed=seed,
        )
    if keep is not None:
        required = configured_ids(_configs(where, config), rows)
        vocabulary = plan_vocabulary(
            tokenizer, vocab_from, keep, rows=rows, required=required, seed=seed
        )
        console.print(vocabulary_table(vocabulary.report, hidden=shape.hidden, tied=tied))
    report = PruneReport(source, shape, vocabulary=vocabulary.report if vocabulary else None)
    if dry_run:
        return report

    model = load_model(where, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    dtype = pass_dtype(device)
    console.print(f"forward passes: {dtype} on {device.type}".replace("torch.", ""))
    small = model
    facts: dict[str, Any] = {"model": str(model_path)}
    if text is not None and calibration is not None:
        statistics = collect(model, text.scoring, dtype)
        importance = score(statistics, source)
        plan = choose(importance, statistics.energy, shape)
        small = cut(model, plan)
        loss_before, loss_after = (lm_loss(x, text.held_out, dtype) for x in (model, small))
        rate = statistics.num_tokens / statistics.seconds
        report = replace(
            report, plan=plan, loss_before=loss_before, loss_after=loss_after, tokens_per_s=rate
        )
        facts["calibration"] = _calibration_facts(calibration, text, seed)
        facts["scores"] = _score_facts(importance, plan)
        console.print(
            f"held-out loss {loss_before:.3f} before, {loss_after:.3f} after "
            f"(perplexity {math.exp(loss_before):,.1f} and {math.exp(loss_after):,.1f})"
        )
    if vocabulary is not None:
        judged = (model,) if small is model else (model, small)
        bits = [bits_per_byte(x, tokenizer, vocabulary.texts, dtype) for x in judged]
        small, tokenizer = cut_vocabulary(small, vocabulary.kept), vocabulary.tokenizer
        bits.append(bits_per_byte(small, tokenizer, vocabulary.texts, dtype))
        report = replace(report, vocabulary=replace(vocabulary.report, bits_per_byte=tuple(bits)))
        console.print(f"bits per byte {bits_line(bits)}")
    report = replace(report, out=out, seconds=time.perf_counter() - start)
    facts |= {key: value for key, value in asdict(report).items() if key != "out"}
    write_model(small, tokenizer, facts, out)
    return report


def _check_task(
    target: str | None,
    calibration: str | Path | None,
    vocab_from: Sequence[str | Path],
    keep: str | None,
) -> None:
    """Refuse arguments of which one needs another."""
    if target is None and not vocab_from and keep is None:
        raise UserError("nothing to cut: give a target shape (--to), or --vocab-from and --keep")
    if (target is None) != (calibration is None):
        have, lack = ("--calibration", "--to") if target is None else ("--to", "--calibration")
        raise UserError(f"{have} without {lack}: a shape is cut by a text; give both or neither")
    if bool(vocab_from) != (keep is not None):
        have, lack = ("--vocab-from", "--keep") if vocab_from else ("--keep", "--vocab-from")
        raise UserError(
            f"{have} without {lack}: a vocabulary is cut to a number of tokens by a corpus; "
            "give both or neither"
        )


def _configs(where: Source, config: Any) -> list[Any]:
    """Whatever names token ids, read without the weights."""
    if (where.folder / "generation_config.json").is_file() and not where.gguf:
        return [config, GenerationConfig.from_pretrained(where.folder)]
    return [config]


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
