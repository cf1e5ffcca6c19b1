"""Prune a language model by importance: load, measure, choose, cut, judge, write."""

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
from drama.prune.controls import Choice, control, drawn_anew
from drama.prune.importance import Importance, choose, score
from drama.prune.layers import LayerOrder, drop_layers
from drama.prune.loss import lm_loss, pass_dtype
from drama.prune.output import check_out, write_model
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
LAYER_SHARE = 16  # one scoring row in so many orders the layers, which takes many passes


@dataclass(frozen=True)
class PruneReport:
    """What a pruning did; losses are nats per token on text that was not scored with, of the
    source and of the model cut in shape, both with the source's tokens.

    search: the shapes that were tried for a budget, best first; empty where the target was given.
    After a dry run `out`, `plan`, the losses, the rate and `seconds` are None, and with a budget
    `target` too; the same but `out` and `seconds` without a cut in shape. `vocabulary` is None
    without a vocabulary cut.
    """

    source: Shape
    target: Shape | None
    out: Path | None = None
    plan: Plan | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    vocabulary: VocabularyReport | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    search: tuple[Candidate, ...] = ()


def prune(
    model_path: str | Path,
    target: str | None,
    calibration: str | Path | None,
    out: str | Path,
    *,
    budget: str | None = None,
    candidates: int = 8,
    vocab_from: Sequence[str | Path] = (),
    keep: str | None = None,
    calibration_tokens: int = 32768,
    seed: int = 0,
    dry_run: bool = False,
    choice: Choice = "importance",
) -> PruneReport:
    """Prune the model at `model_path` and write it to `out` as a Hugging Face folder.

    The shape is `target`, or with a `budget` in its place (`search.parse_budget`) the one of up to
    `candidates` proposals whose held-out loss is lowest right after the cut. With `vocab_from` and
    `keep` the vocabulary is then cut to the `keep` tokens ("32k") that these corpora need most;
    without a target, a budget and `calibration` that is all, and the shape stays. `choice` is for
    experiments: another one than "importance" makes a control (`drama.prune.controls`).

    The folder holds float32 weights, the tokenizer, and pruning.json: shapes, kept indices, scores,
    the texts' sha256, the held-out loss before and after, and bits per byte where the vocabulary
    was cut. It appears whole or not at all; an older pruned model at `out` is replaced. The source
    is only read. Runs on the GPU where there is one. A dry run checks every input and prints the
    plan or the proposals, without the weights.

    Raises:
        UserError: nothing to do, or half of a pair of arguments; bad model, target, budget,
            calibration text or corpus (`drama.prune.source`, `parse_target`,
            `drama.prune.search`, `read_calibration`, `plan_vocabulary`); `out` is the source or
            holds something else, or its disk is full.
    """
    start = time.perf_counter()
    _check_task(target, budget, calibration, vocab_from, keep)
    if choice != "importance" and target is None:
        raise UserError(f"--choose {choice} without --to: a control is of a shape; give one")
    where = find_llm(model_path)
    config = read_config(where)
    source = Shape.of(config)
    rows, tied = config.vocab_size, config.tie_word_embeddings
    sizes = Sizes(rows if keep is None else whole_tiles(parse_size(keep)), tied)
    limit = None if budget is None else parse_budget(budget)
    if limit is not None:
        tried = propose(limit, source, sizes, candidates)
    else:
        tried = [sizes.candidate(source if target is None else parse_target(target, source))]
    out = Path(out)
    check_out(out, where.path, 4 * max(candidate.parameters for candidate in tried))
    _show(tried, source, rows, sizes, limit)
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
        if limit is None or dry_run:
            _show_vocabulary(vocabulary.report, tried[0], tied)
    report = PruneReport(
        source,
        tried[0].shape if limit is None else None,
        search=() if limit is None else tuple(tried),
        vocabulary=vocabulary.report if vocabulary else None,
    )
    if dry_run:
        return report

    model = load_model(where, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    dtype = pass_dtype(device)
    console.print(f"forward passes: {dtype} on {device.type}".replace("torch.", ""))
    small = model
    facts: dict[str, Any] = {"model": str(Path(model_path).resolve())}
    if text is not None and calibration is not None:
        statistics = collect(model, text.scoring, dtype)
        layer_rows = text.scoring[: -(-len(text.scoring) // LAYER_SHARE)]
        fewest = min(candidate.shape.layers for candidate in tried)
        order = LayerOrder((), (), source.layers)
        if choice == "importance":  # which alone asks what a layer is worth
            order = drop_layers(model, layer_rows, fewest, dtype)
        importance = control(score(statistics, source, order), choice, seed)
        if limit is not None:
            tried = measure(model, tried, importance, statistics.energy, text.held_out, dtype)
            _show(tried, source, rows, sizes, limit)
            if vocabulary is not None:
                _show_vocabulary(vocabulary.report, tried[0], tied)
            report = replace(report, target=tried[0].shape, search=tuple(tried))
        plan = choose(importance, statistics.energy, tried[0].shape)
        small = cut(model, plan)
        if choice == "scratch":
            small = drawn_anew(small, seed)
        loss_before, loss_after = (lm_loss(x, text.held_out, dtype) for x in (model, small))
        rate = statistics.num_tokens / statistics.seconds
        report = replace(
            report, plan=plan, loss_before=loss_before, loss_after=loss_after, tokens_per_s=rate
        )
        facts["calibration"] = _calibration_facts(calibration, text, seed)
        facts["scores"] = _score_facts(importance, plan)
        facts["layers"] = asdict(order)
        facts["choice"] = choice
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
    # no place, no clock: checkpoints and vectors hold the folder's hash, and it is of the cut alone
    left_out = {"out", "seconds", "tokens_per_s"}
    facts |= {key: value for key, value in asdict(report).items() if key not in left_out}
    write_model(small, tokenizer, facts, out)
    return report


def _show_vocabulary(report: VocabularyReport, chosen: Candidate, tied: bool) -> None:
    console.print(vocabulary_table(report, hidden=chosen.shape.hidden, tied=tied))


def _show(
    tried: list[Candidate], source: Shape, rows: int, sizes: Sizes, budget: Budget | None
) -> None:
    """Print the proposals of a budget, and the plan where the shape is settled."""
    if budget is not None:
        console.print(search_table(tried, budget))
    if budget is None or tried[0].loss is not None:
        shape, kept = tried[0].shape, sizes.vocab_size
        console.print(plan_table(source, shape, vocab_size=rows, kept_tokens=kept, tied=sizes.tied))


def _check_task(
    target: str | None,
    budget: str | None,
    calibration: str | Path | None,
    vocab_from: Sequence[str | Path],
    keep: str | None,
) -> None:
    """Refuse arguments that exclude each other, or of which one needs another."""
    if target is not None and budget is not None:
        raise UserError("--to and --budget: give a shape or a budget to find one for, not both")
    shaped = target is not None or budget is not None
    if not shaped and not vocab_from and keep is None and calibration is None:
        raise UserError(
            "nothing to cut: give a shape (--to, such as 0.1b) or a budget (--budget, such as "
            "60M), or --vocab-from and --keep"
        )
    if shaped and calibration is None:
        name = "--to" if budget is None else "--budget"
        raise UserError(f"{name} without --calibration: a shape is cut by a text; give one")
    if calibration is not None and not shaped:
        raise UserError(
            "--calibration without --to or --budget: give a shape or a budget for the text to cut"
        )
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
