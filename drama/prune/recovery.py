"""Bring a pruned model back: continued pre-training on packed texts, after its parent if there is
one.

    RUN/recipe.yaml  metrics.jsonl  bad.jsonl  checkpoints/step-N/  model/  tensorboard/

A step takes the same texts whatever the ranks (`drama.prune.recovery_data`); how it is computed is
in `drama.prune.recovery_step`.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from drama import checkpoint
from drama.console import console, progress
from drama.distributed import Ranks
from drama.errors import UserError
from drama.fusion import choose_liger, use_liger
from drama.hf import build_lm
from drama.loading import BadRecords
from drama.metrics import peak_flops, with_precision
from drama.optimizer import Pace, settle_reduction, start_engine
from drama.prune.output import REPORT_NAME, check_out, write_model
from drama.prune.parent import Parent, align
from drama.prune.predictions import MaskedNextToken, NextToken, Objective, find_mask_id
from drama.prune.recovery_data import Texts
from drama.prune.recovery_recipe import RecoveryEvalRecipe, RecoveryRecipe, RecoveryStepRecipe
from drama.prune.recovery_step import RecoveryStep, StepOutput
from drama.prune.recovery_telemetry import RecoveryTelemetry, losses_by_source
from drama.prune.source import find_llm, load_model, load_tokenizer, read_config
from drama.prune.student import Student
from drama.settings import check_same_run
from drama.tokenizer import TextEncoder, appending_eos

CHECKPOINT_BYTES = 20  # of a weight: the model's, itself, float32 master and two moments
# what may differ when a run goes on: none of it changes the mathematics
_FREE_KEYS = {
    "train": {"save_every", "keep_last", "token_budget"},
    # what the shards hold is compared by hash; a mixture may go on with other sources and weights
    "data": {"workers", "on_bad", "cache", "cache_gb", "shards", "weights", "language_alpha"},
    "step": set(RecoveryStepRecipe.model_fields),
    "eval": set(RecoveryEvalRecipe.model_fields),
}


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
            check_same_run(stored, recipe, _FREE_KEYS)
        dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        torch.manual_seed(recipe.seed)
        self.where = find_llm(recipe.model.path)
        self.config = read_config(self.where)
        self._check_length()
        self.tokenizer = load_tokenizer(self.where, self.config.vocab_size)
        reader = load_tokenizer(self.where, self.config.vocab_size)  # the model keeps its own
        reader = appending_eos(reader, self.where.name)
        self.objective = self._objective(reader)
        self.texts = Texts(recipe, TextEncoder(reader), ranks)
        self.bad = BadRecords(recipe.output)
        self.num_steps = self._count_steps()
        model = load_model(self.where, self.config)
        self.generation_config = model.generation_config
        self._check_out(sum(weight.numel() for weight in model.parameters()))
        self.parent: Parent | None = None
        if path := recipe.model.parent:
            rows = self.config.vocab_size
            self.parent = Parent(path, reader, rows, ranks.device, dtype)
        self.student = self._student(model)
        self.pace = Pace.of(recipe.train, self.num_steps)
        self.engine = start_engine(
            self.student,
            recipe.train,
            recipe.deepspeed_config(world_size=ranks.world_size),
            self.pace,
            output=recipe.output,
            ranks=ranks,
        )
        self.step_runner = RecoveryStep(
            self.engine,
            self.objective,
            recipe.train.token_budget,
            reduction=settle_reduction(self.engine, recipe.step.grad_reduction),
            num_sources=len(self.texts.sources),
            parent=self.parent,
            alignment=self.student.alignment,
        )
        self.telemetry = RecoveryTelemetry(
            recipe,
            self.engine,
            ranks,
            peak=ranks.sum(peak_flops(ranks.device, dtype)),
            texts=self.texts,
            parent=self.parent,
        )
        self.before: dict[str, dict[str, Any]] = {}  # held-out losses of student and parent

    # -- building -----------------------------------------------------------------------------

    def _check_length(self) -> None:
        length, limit = self.recipe.data.length, self.config.max_position_embeddings
        if length > limit:
            raise UserError(
                f"data.length {length} is beyond the {limit} tokens that {self.where.name} was "
                f"made for; the most is {limit}"
            )

    def _check_out(self, num_weights: int) -> None:
        keep = self.recipe.train.keep_last
        size = num_weights * (4 + CHECKPOINT_BYTES * (keep + 1))
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
        if choose_liger(recipe.step.liger, self.ranks.device)[0]:
            use_liger(model.model, self.ranks.device.type)
        return Student(
            model,
            recipe.loss,
            causal=self.objective.causal,
            alignment=alignment,
            parent_width=parent.shape.hidden if parent else 0,
            recompute=recipe.step.recompute_blocks,
        ).train()

    def _count_steps(self) -> int:
        train = self.recipe.train
        if train.steps is not None:
            return train.steps
        assert train.epochs is not None
        return max(1, math.ceil(train.epochs * self.texts.order.batches_per_epoch))

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
        recipe, output = self.recipe, self.recipe.output
        inputs = self._inputs()
        found = checkpoint.whole_checkpoints(output / "checkpoints")
        first = self._resume(found[-1], inputs) if found else self._begin()
        if self.ranks.is_main:
            recipe.save(output / "recipe.yaml")
            self.bad.forget(first)
        console.print(self.telemetry.headline(first, self.num_steps), highlight=False)
        evaluation = None
        with progress(disable=not self.ranks.is_main) as bar:
            self.telemetry.open(first, bar, self.num_steps)
            batches = self.texts.load(first, self.num_steps)
            for step in range(first, self.num_steps):
                began = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - began
                self.bad.report(step, batch.bad)
                rate = self.engine.get_lr()[0]
                result = self.step_runner.step(batch)
                self._check_finite(step, result)
                done, seconds = step + 1, time.perf_counter() - began
                self.texts.observe(result.sums_S, result.counts_S)
                evaluation = self._evaluate(done)
                self.telemetry.record(
                    step,
                    batch,
                    result,
                    lr=rate,
                    seconds=seconds,
                    waited=waited,
                    evaluation=evaluation,
                )
                self.texts.update(done)
                if done % recipe.train.save_every == 0 or done == self.num_steps:
                    self._save(done, inputs, evaluation)
        self.telemetry.close()
        if evaluation is None:  # every step was done before
            evaluation = self._evaluate(self.num_steps)
        self._write_model(output / "model", self.num_steps, evaluation)
        self._conclude(evaluation)
        return output / "model"

    def _begin(self) -> int:
        """Losses before the first step; a parent's are what the sources' weights are set by."""
        if self.texts.held_out is not None:
            self.before["student"] = self._losses()
            if self.parent is not None:
                self.before["parent"] = self._losses(parent=True)
        if self.recipe.data.update_every:
            self.texts.follow(self.before["parent"]["by_source"])
        return 0

    def _resume(self, folder: Path, inputs: dict[str, Any]) -> int:
        first, extra = checkpoint.load(self.engine, folder, inputs)
        self.before = extra["before"]
        for note in self.texts.resume(extra["texts"], first):
            console.print(f"data: {note}", markup=False)
        return first

    def _losses(self, *, parent: bool = False) -> dict[str, Any]:
        names = self.texts.held_out_sources
        assert self.texts.held_out is not None
        sums, counts = self.step_runner.evaluate(self.texts.held_out, len(names), parent=parent)
        by_source = losses_by_source(names, sums, counts)
        return {"loss": sum(sums) / max(1, sum(counts)), "by_source": by_source}

    def _evaluate(self, done: int) -> dict[str, Any] | None:
        due = done % self.recipe.eval.every == 0 or done == self.num_steps
        return self._losses() if due and self.texts.held_out is not None else None

    def _check_finite(self, step: int, result: StepOutput) -> None:
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            return
        saved = checkpoint.whole_checkpoints(self.recipe.output / "checkpoints")
        raise UserError(
            f"step {step} diverged (loss {result.loss}, grad_norm {result.grad_norm}) and nothing "
            f"of it is saved; the last good checkpoint: {saved[-1] if saved else 'none yet'}; "
            "lower train.lr or lengthen the warm-up, in another output"
        )

    # -- writing ------------------------------------------------------------------------------

    def _save(self, done: int, inputs: dict[str, Any], evaluation: dict[str, Any] | None) -> None:
        checkpoint.save(
            self.engine,
            self.recipe.output / "checkpoints",
            done,
            inputs=inputs,
            extra={"before": self.before, "texts": self.texts.state(done)},
            keep_last=self.recipe.train.keep_last,
            flat_until=0,
            write_model=lambda folder: self._write_model(folder, done, evaluation),
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
        if self.ranks.world_size > 1:
            dist.barrier()

    def _facts(self, done: int, evaluation: dict[str, Any] | None) -> dict[str, Any]:
        path = self.where.folder / REPORT_NAME
        facts: dict[str, Any] = {"model": str(self.where.path)}
        if path.is_file():
            facts = json.loads(path.read_text(encoding="utf-8"))
        facts["recovery"] = {
            "from": str(self.where.path),
            "parent": str(self.recipe.model.parent) if self.parent else None,
            "objective": self.recipe.loss.objective,
            "steps": done,
            "losses_before": self.before,
            "losses_after": evaluation,
        }
        return facts

    def _conclude(self, evaluation: dict[str, Any] | None) -> None:
        if evaluation is None:
            return
        before, parent = self.before["student"], self.before.get("parent")
        lines = {"held-out loss": [x and x["loss"] for x in (before, evaluation, parent)]}
        for name, loss in evaluation["by_source"].items():
            others = [x and x["by_source"][name] for x in (before, parent)]
            lines[f"  {name}"] = [others[0], loss, others[1]]
        for what, (first, last, goal) in lines.items():
            of_parent = "" if goal is None else f", its parent {goal:.3f}"
            console.print(f"{what}: {first:.3f} before, {last:.3f} after{of_parent}",
                          highlight=False, markup=False)  # fmt: skip
