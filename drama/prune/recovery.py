"""Bring a pruned model back: continued pre-training on packed texts, after its parent if there is
one.

    RUN/recipe.yaml  metrics.jsonl  bad.jsonl  checkpoints/step-N/  model/  tensorboard/

A step takes the same texts whatever the ranks (`drama.prune.recovery_data`); how it is computed is
in `drama.prune.recovery_step`.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drama import checkpoint
from drama.console import console, progress
from drama.distributed import Ranks
from drama.errors import UserError
from drama.files import recovered
from drama.fusion import fuse
from drama.hf import build_lm
from drama.loading import BadRecords
from drama.metrics import peak_flops, with_precision
from drama.optimizer import settle_reduction, start_engine
from drama.prune.output import REPORT_NAME, check_out, write_model
from drama.prune.parent import Parent, align
from drama.prune.predictions import MaskedNextToken, NextToken, Objective, find_mask_id
from drama.prune.recovery_data import Texts
from drama.prune.recovery_recipe import RecoveryEvalRecipe, RecoveryRecipe, RecoveryStepRecipe
from drama.prune.recovery_step import RecoveryStep
from drama.prune.recovery_telemetry import RecoveryTelemetry, losses_by_source
from drama.prune.source import find_llm, load_model, load_tokenizer, read_config
from drama.prune.student import Student
from drama.resume import check_finite, choose_start, count_steps, prolongable
from drama.settings import KEEPING_KEYS, check_same_run
from drama.stability import BadSteps
from drama.stopping import StopSignals, leave
from drama.tokenizer import TextEncoder, appending_eos
from drama.watchdog import Watchdog

CHECKPOINT_BYTES = 20  # of a weight: the model's, itself, float32 master and two moments
# what may differ when a run goes on: none of it changes the mathematics
_FREE_KEYS = {
    "train": {*KEEPING_KEYS, "token_budget"},
    # what the shards hold is compared by hash; a mixture may go on with other sources and weights
    "data": {"workers", "on_bad", "cache", "cache_gb", "shards", "weights", "language_alpha"},
    "step": set(RecoveryStepRecipe.model_fields),
    "eval": set(RecoveryEvalRecipe.model_fields),
}


def free_keys(recipe: RecoveryRecipe) -> dict[str, set[str]]:
    """What of a recipe may differ when its run goes on, by section."""
    return _FREE_KEYS | {"train": _FREE_KEYS["train"] | prolongable(recipe.train)}


class Recoverer:
    """Builds everything from a recipe; `run` trains and returns the folder of the model.

    Raises:
        UserError: a recipe that does not fit its models, its shards, its ranks or its run folder.
    """

    def __init__(self, recipe: RecoveryRecipe, ranks: Ranks) -> None:
        self.ranks = ranks
        self.recipe, stored = with_precision(recipe, ranks)
        recipe = self.recipe
        if stored is not None:
            check_same_run(stored, recipe, free_keys(recipe))
            if recipe.step.grad_reduction == "auto":
                # what memory allowed at the start: another order of sums would be other bits
                chosen = stored.step.grad_reduction
                self.recipe = recipe = recipe.with_values(step__grad_reduction=chosen)
        dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        torch.manual_seed(recipe.seed)
        self.where = find_llm(recipe.model.path)
        self.config = read_config(self.where, causal=recipe.loss.objective == "lm")
        check_length(recipe, self.where.name, self.config.max_position_embeddings)
        self.tokenizer = load_tokenizer(self.where, self.config.vocab_size)
        reader = load_tokenizer(self.where, self.config.vocab_size)  # the model keeps its own
        reader = appending_eos(reader, self.where.name)
        self.objective = self._objective(reader)
        self.texts = Texts(recipe, TextEncoder(reader), ranks)
        self.bad = BadRecords(recipe.output)
        self.bad_steps = BadSteps(ranks, recipe.output, recipe.train.max_bad_steps)
        self.num_steps = count_steps(
            recipe.train.steps, recipe.train.epochs, self.texts.order.batches_per_epoch
        )
        self.start, self.pace = choose_start(recipe.output, recipe.train, self.num_steps, ranks)
        model = load_model(self.where, self.config)
        self.generation_config = model.generation_config
        self._check_out(sum(weight.numel() for weight in model.parameters()))
        self.parent: Parent | None = None
        imitates = recipe.loss.kl or recipe.loss.hidden
        # one that is only a reference is judged before the first step and then let go
        if recipe.model.parent and (imitates or self.start is None):
            rows = self.config.vocab_size
            self.parent = Parent(recipe.model.parent, reader, rows, ranks.device, dtype)
            check_length(recipe, str(recipe.model.parent), self.parent.max_tokens)
        self.student = self._student(model)
        self.engine = start_engine(
            self.student,
            recipe.train,
            recipe.deepspeed_config(world_size=ranks.world_size),
            self.pace,
            output=recipe.output,
            ranks=ranks,
        )
        self.reduction = settle_reduction(self.engine, recipe.step.grad_reduction)
        self.step_runner = RecoveryStep(
            self.engine,
            self.objective,
            recipe.train.token_budget,
            reduction=self.reduction,
            num_sources=len(self.texts.sources),
            parent=self.parent,
        )
        self.telemetry = RecoveryTelemetry(
            recipe,
            self.engine,
            ranks,
            peak=ranks.sum(peak_flops(ranks.device, dtype)),
            texts=self.texts,
            parent=self.parent,
        )
        self.before: dict[str, Any] = {}  # held-out losses of student and parent, and which texts

    # -- building -----------------------------------------------------------------------------

    def _check_out(self, num_weights: int) -> None:
        keep = self.recipe.train.keep_last
        size = num_weights * (4 + CHECKPOINT_BYTES * (keep + 1))
        for name in ("checkpoints", "model"):  # of a run that goes on
            files = (self.recipe.output / name).rglob("*")
            size -= sum(path.stat().st_size for path in files if path.is_file())
        what = f"the model with {keep} checkpoints and one being written"
        for path in filter(None, (self.where.path, self.recipe.model.parent)):
            check_out(self.recipe.output / "model", path, size, what)

    def _objective(self, tokenizer: Any) -> Objective:
        loss = self.recipe.loss
        if loss.objective == "lm":
            return NextToken()
        mask_id = find_mask_id(tokenizer, loss.mask_token, self.where.name)
        return MaskedNextToken(loss.mask_share, mask_id, len(tokenizer), self.recipe.seed)

    def _student(self, model: Any) -> Student:
        recipe, parent = self.recipe, self.parent
        alignment = None
        if parent is not None and recipe.loss.hidden:
            alignment = align(self.where.folder, self.config.num_hidden_layers, parent.shape)
        self.fused = fuse(model.model, recipe.step.liger, self.ranks.device)
        return Student(
            model,
            recipe.loss,
            causal=self.objective.causal,
            alignment=alignment,
            parent_width=parent.shape.hidden if parent else 0,
            recompute=recipe.step.recompute_blocks,
        ).train()

    def _inputs(self) -> dict[str, Any]:
        """Hashes of what the run reads: a path may come to hold something else."""
        found: dict[str, Any] = {
            "model": self.where.sha256,
            "way to mix sources": self.texts.is_mixed,
        }
        if self.parent is not None:
            found["parent"] = self.parent.sha256
        if not self.texts.is_mixed:
            found["shards"] = self.texts.shards.sha256
        return found

    # -- running ------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the last step from the newest whole checkpoint; return RUN/model."""
        self.recipe = recipe = self.recipe.with_values(step__grad_reduction=self.reduction)
        output, inputs = recipe.output, self._inputs()
        first = checkpoint.step_of(self.start) if self.start else 0
        if self.ranks.is_main:
            recovered(output / "model")
            recipe.save(output / "recipe.yaml")
            self.bad.forget(first)
        if self.start:
            self._resume(self.start, inputs)
        self._begin()
        console.print(self.telemetry.headline(first, self.num_steps), highlight=False)
        self.telemetry.show(self.reduction, self.fused)
        evaluation = None
        with (
            progress(disable=not self.ranks.is_main) as bar,
            StopSignals(self.ranks) as signals,
            Watchdog(self.ranks, recipe.train.stuck_after) as watchdog,
        ):
            self.telemetry.open(first, bar, self.num_steps)
            batches = self.texts.load(first, self.num_steps)
            for step in range(first, self.num_steps):
                began = time.perf_counter()
                watchdog.at(step, "data")
                batch = next(batches)
                waited = time.perf_counter() - began
                self.bad.report(step, batch.bad)
                rate = self.engine.get_lr()[0]
                watchdog.at(step, "first step" if step == first else "step")
                result = self.step_runner.step(batch)
                figures = {"loss": result.loss, "grad_norm": result.grad_norm}
                skipped = self.bad_steps.left_out(
                    step, partial(self.texts.batches.record_ids, step), **figures
                )
                done, seconds = step + 1, time.perf_counter() - began
                if not skipped:
                    self.texts.observe(result.sums_S, result.counts_S)
                watchdog.at(step, "evaluate")
                evaluation = self._evaluate(done)
                told: dict[str, Any] = {"lr": rate, "seconds": seconds, "evaluation": evaluation}
                if skipped:
                    self.telemetry.skip(step, self.bad_steps.total, **told)
                else:
                    self.telemetry.record(step, batch, result, waited=waited, **told)
                self.texts.update(done)
                stopping = signals.asked() and done < self.num_steps
                if stopping or done % recipe.train.save_every == 0 or done == self.num_steps:
                    watchdog.at(step, "save")
                    last = stopping or done == self.num_steps
                    self._save(done, inputs, evaluation, last=last)
                if stopping:
                    self.telemetry.close()
                    leave(done, output)
        self.telemetry.close()
        if evaluation is None:  # every step was done before
            evaluation = self._evaluate(self.num_steps)
        self._write_model(output / "model", self.num_steps, evaluation)
        self._conclude(evaluation)
        return output / "model"

    def _begin(self) -> None:
        """Judge the student before the first step, and its parent, whom the weights follow.

        A run that goes on has done it; not where it is judged by other texts now.
        """
        fresh = self.start is None
        if self.before.get("judge") != self.texts.judge:
            if self.before:
                console.print("eval: held-out texts are others than before; earlier losses go")
            self.before = {"judge": self.texts.judge}
            if self.texts.held_out is not None and fresh:
                self.before["student"] = self._losses()
            if self.texts.held_out is not None and self.parent is not None:
                self.before["parent"] = self._losses(parent=True)
        if fresh and self.recipe.data.update_every:
            self.texts.follow(self.before["parent"]["by_source"])
        if not self.step_runner.imitates:
            self.parent = self.step_runner.parent = self.telemetry.parent = None

    def _resume(self, folder: Path, inputs: dict[str, Any]) -> None:
        first, extra = checkpoint.load(
            self.engine, folder, recipe=self.recipe, free=free_keys(self.recipe), inputs=inputs
        )
        self.before = extra["before"]
        self.bad_steps.state = extra.get("bad_steps", [0, 0])
        for note in self.texts.resume(extra["texts"], first):
            console.print(f"data: {note}", markup=False)

    def _losses(self, *, parent: bool = False) -> dict[str, Any]:
        names = self.texts.held_out_sources
        assert self.texts.held_out is not None
        sums, counts = self.step_runner.evaluate(self.texts.held_out, len(names), parent=parent)
        if not sum(counts):
            raise UserError("eval.shards: no held-out text has two tokens; give longer ones")
        by_source = losses_by_source(names, sums, counts)
        return {"loss": sum(sums) / sum(counts), "by_source": by_source}

    def _evaluate(self, done: int) -> dict[str, Any] | None:
        due = done % self.recipe.eval.every == 0 or done == self.num_steps
        if not due or self.texts.held_out is None:
            return None
        found = self._losses()
        held_out = {"held-out loss": found["loss"]}
        check_finite(self.ranks, self.recipe.output, done - 1, **held_out)
        return found

    # -- writing ------------------------------------------------------------------------------

    def _save(
        self,
        done: int,
        inputs: dict[str, Any],
        evaluation: dict[str, Any] | None,
        *,
        last: bool,
    ) -> None:
        checkpoint.save(
            self.engine,
            self.recipe.output / "checkpoints",
            done,
            recipe=self.recipe,
            inputs=inputs,
            extra={
                "before": self.before,
                "texts": self.texts.state(done),
                "pace": self.pace,
                "bad_steps": self.bad_steps.state,
            },
            keep=checkpoint.Keep.of(self.recipe.train, self.pace.flat_until),
            write_model=lambda folder: self._write_model(folder, done, evaluation),
            go_on=self.recipe.train.on_full_disk == "go_on" and not last,
        )

    def _write_model(self, folder: Path, done: int, evaluation: dict[str, Any] | None) -> None:
        """An ordinary folder, with the facts of the cut that it goes back to; a collective."""
        weights = checkpoint.full_state_dict(self.engine, self.student.lm)
        if self.ranks.is_main:
            config = self.config
            if not self.objective.causal:  # readers of transformers, then of TEI
                config.is_causal, config.use_bidirectional_attention = False, True
            model = build_lm(config, weights)
            model.generation_config = self.generation_config
            write_model(model, self.tokenizer, self._facts(done, evaluation), folder)

    def _facts(self, done: int, evaluation: dict[str, Any] | None) -> dict[str, Any]:
        """Those of the cut, and one entry for each recovery since."""
        path = self.where.folder / REPORT_NAME
        facts: dict[str, Any] = {"model": str(self.where.path.resolve())}
        if path.is_file():
            facts = json.loads(path.read_text(encoding="utf-8"))
        parent = self.recipe.model.parent
        found = {
            "from": str(self.where.path.resolve()),
            "parent": str(parent.resolve()) if parent else None,
            "loss": self.recipe.loss.model_dump(),
            "steps": done,
            "losses_before": {k: x for k, x in self.before.items() if k != "judge"},
            "losses_after": evaluation,
        }
        return facts | {"recoveries": [*facts.get("recoveries", []), found]}

    def _conclude(self, evaluation: dict[str, Any] | None) -> None:
        if evaluation is None:
            return
        found = {"before": self.before.get("student"), "after": evaluation}
        found["of its parent"] = self.before.get("parent")
        rows = {"held-out loss": {when: x["loss"] for when, x in found.items() if x}}
        for name in evaluation["by_source"]:
            rows[f"  {name}"] = {when: x["by_source"][name] for when, x in found.items() if x}
        for what, losses in rows.items():
            shown = ", ".join(f"{loss:.3f} {when}" for when, loss in losses.items())
            console.print(f"{what}: {shown}", highlight=False, markup=False)


def check_length(recipe: RecoveryRecipe, name: str, limit: int) -> None:
    """Refuse texts that are longer than a model was made for.

    Raises:
        UserError: with both lengths.
    """
    length = recipe.data.length
    if length > limit:
        raise UserError(
            f"data.length {length} is beyond the {limit} tokens that {name} was made for; the "
            f"most is {limit}"
        )
