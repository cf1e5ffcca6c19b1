"""The training loop: a recipe in, a run folder out.

RUN/recipe.yaml  metrics.jsonl  checkpoints/step-N/  model/  best/  best.json  tensorboard/
"""

from __future__ import annotations

import hashlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drama import checkpoint, choices
from drama.console import console, progress
from drama.data.batches import RankBatches
from drama.data.mixture import Mixture, training_order
from drama.data.remote import PieceCache
from drama.data.stream import open_pairs
from drama.distill import ScoreDistillation
from drama.distributed import Ranks
from drama.encoder import Encoder
from drama.errors import UserError
from drama.export import export
from drama.files import recovered, replacing
from drama.folder import RetrieverSettings
from drama.full_disk import FullDisk
from drama.gradcache import GradCache, StepOutput
from drama.hf import model_sha256
from drama.loading import BadRecords, check_lanes_feed, load_ahead
from drama.loss import ContrastiveLoss
from drama.metrics import peak_flops, with_precision
from drama.optimizer import start_engine
from drama.recipe import EvalRecipe, Recipe, StepRecipe
from drama.resume import alone_in, check_finite, choose_start, count_steps, named_start, prolongable
from drama.run_facts import run_facts
from drama.settings import KEEPING_KEYS, check_same_run
from drama.stability import BadSteps
from drama.stopping import StopSignals, leave
from drama.teacher import TeacherVectors
from drama.telemetry import Telemetry
from drama.temperature import LearnedTemperature
from drama.validation import Validator, better
from drama.watchdog import Watchdog

# what may differ when a run goes on: none of it changes the mathematics
_FREE_KEYS = {
    "train": {*KEEPING_KEYS, "token_budget"},
    # what the shards hold is compared by hash; a mixture may go on with other sources and weights
    "data": {"workers", "on_bad", "cache", "cache_gb", "shards", "weights", "language_alpha"},
    "step": set(StepRecipe.model_fields),
    "eval": set(EvalRecipe.model_fields),
}


def _free_keys(recipe: Recipe) -> dict[str, set[str]]:
    return _FREE_KEYS | {"train": _FREE_KEYS["train"] | prolongable(recipe.train)}


class Trainer:
    """Builds everything from a recipe; `run` trains, saves, and returns the model folder.

    resume: see `drama.resume.named_start`.

    Raises:
        UserError: a recipe that does not fit its model, its shards, its ranks or its run folder.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, resume: str = "auto") -> None:
        self.ranks = ranks
        self.named = named_start(recipe.output, resume)
        self.recipe = recipe = self._settle(recipe)
        torch.manual_seed(recipe.seed)
        self.dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        self.encoder = self._load_encoder()
        self.config = self.encoder.backbone.config
        # the engine may round what is frozen to bf16; the exported model has it as it came
        self.frozen = {
            name: weight.detach().clone()
            for name, weight in self.encoder.backbone.named_parameters()
            if ranks.is_main and not weight.requires_grad
        }
        self.chosen = choices.prepare(self.encoder, recipe, ranks.device, ranks.world_size)
        self.batches = self._open_data()
        self.bad = BadRecords(recipe.output)
        self.bad_steps = BadSteps(ranks, recipe.output, recipe.train.max_bad_steps)
        self.num_steps = count_steps(
            recipe.train.steps, recipe.train.epochs, self.batches.order.batches_per_epoch
        )
        self.start, self.pace = choose_start(
            recipe.output, recipe.train, self.num_steps, ranks, named=self.named
        )
        self.engine = start_engine(
            self.encoder,
            recipe.train,
            recipe.deepspeed_config(world_size=ranks.world_size),
            self.pace,
            output=recipe.output,
            ranks=ranks,
        )
        self.temperature = LearnedTemperature(recipe.loss.temperature)
        self.best: dict[str, Any] | None = None
        self.step_runner = GradCache(
            self.engine,
            self._loss(),
            recipe.train.token_budget,
            keep_graphs=recipe.step.keep_graphs,
            reduction=recipe.step.grad_reduction,
            balance=recipe.step.balance_ranks,
        )
        wanted = recipe.eval.shards or recipe.eval.beir
        self.validator = Validator(recipe, self.batches, self.step_runner) if wanted else None
        self.telemetry = Telemetry(
            recipe,
            self.engine,
            ranks,
            peak=self.ranks.sum(peak_flops(ranks.device, self.dtype)),
            order=self.batches.order,
        )

    # -- building -----------------------------------------------------------------------------

    def _settle(self, recipe: Recipe) -> Recipe:
        """Fill in what depends on the machine, or take it from the run that goes on."""
        named = checkpoint.read_recipe(self.named, Recipe) if self.named else None
        settled, stored = with_precision(recipe, self.ranks, named)
        if stored is not None:
            check_same_run(stored, settled, _free_keys(settled), where=self.named)
            if settled.step.grad_reduction == "auto":
                # what memory allowed at the start: another order of sums would be other bits
                chosen = stored.step.grad_reduction
                settled = settled.with_values(step__grad_reduction=chosen)
        return settled

    def _load_encoder(self) -> Encoder:
        recipe = self.recipe
        settings = RetrieverSettings(
            pooling=recipe.model.pooling,
            attention=recipe.model.attention,
            query_prefix=recipe.model.query_prefix,
            document_prefix=recipe.model.document_prefix,
            matryoshka_dims=tuple(recipe.loss.matryoshka_dims),
            max_tokens=max(recipe.data.max_query_tokens, recipe.data.max_document_tokens),
        )
        rope = recipe.model.rope.model_dump(exclude_none=True)
        encoder = Encoder.from_pretrained(recipe.model.path, settings=settings, rope=rope)
        limit = encoder.longest
        if settings.max_tokens > limit:
            raise UserError(
                f"{recipe.model.path} was made for {limit} tokens, the recipe says "
                f"{settings.max_tokens}; lower data.max_document_tokens, or set model.rope "
                "(rope_theta, or rope_type and factor) for longer texts"
            )
        dims = recipe.loss.matryoshka_dims
        if dims and dims[-1] != encoder.dim:
            raise UserError(
                f"loss.matryoshka_dims ends in {dims[-1]}, but {recipe.model.path} has width "
                f"{encoder.dim}; end the list with {encoder.dim}"
            )
        encoder.backbone.embed_tokens.requires_grad_(not recipe.model.freeze_embeddings)
        return encoder.train()

    def _open_data(self) -> RankBatches:
        data, train = self.recipe.data, self.recipe.train
        check_lanes_feed(data.lanes, self.ranks.world_size)
        shards = open_pairs(data.shards, PieceCache(data.cache, int(data.cache_gb * 2**30)))
        order = training_order(
            shards,
            batch_size=train.batch_size,
            seed=self.recipe.seed,
            weights=data.weights,
            one_source=data.batches == "one_source",
            language_alpha=data.language_alpha,
            lanes=data.lanes,
            block=data.block,
            window=data.window,
        )
        return RankBatches(
            shards,
            order,
            self.encoder.text_encoder,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.recipe.seed,
            hard_negatives=data.hard_negatives,
            max_query_tokens=data.max_query_tokens,
            max_document_tokens=data.max_document_tokens,
            on_bad=data.on_bad,
        )

    def _loss(self) -> ContrastiveLoss:
        loss = self.recipe.loss
        scores = ScoreDistillation(loss.scores_weight, loss.scores_temperature)
        return ContrastiveLoss(
            self.temperature if loss.learn_temperature else loss.temperature,
            tuple(loss.matryoshka_dims),
            tuple(loss.matryoshka_weights),
            loss.margin,
            own_negatives=loss.own_negatives,
            symmetric=loss.symmetric,
            scores=scores if loss.scores_weight else None,
            spread_weight=loss.spread_weight,
            teacher=TeacherVectors(loss.teacher) if loss.teacher else None,
            teacher_weight=loss.teacher_weight,
        )

    # -- running ------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the last step from the newest whole checkpoint; return RUN/model."""
        reduction = self.step_runner.reduction
        self.recipe = recipe = self.recipe.with_values(step__grad_reduction=reduction)
        output = recipe.output
        if self.ranks.is_main:
            for name in ("best", "model"):
                recovered(output / name)
            recipe.save(output / "recipe.yaml")
            self.bad.forget(checkpoint.step_of(self.start) if self.start else 0)
        inputs = self._inputs()
        first = self._resume(self.start, inputs) if self.start else 0
        console.print(self._headline(first))
        choices.show(self.chosen, self.encoder, self.step_runner, self.dtype)
        with (
            progress(disable=not self.ranks.is_main) as bar,
            StopSignals(self.ranks) as signals,
            Watchdog(self.ranks, recipe.train.stuck_after) as watchdog,
        ):
            self.telemetry.open(first, bar, self.num_steps)
            steps = range(first, self.num_steps)
            loader = load_ahead(self.batches, steps, recipe.data.workers)
            for step in steps:
                began = time.perf_counter()
                watchdog.at(step, "data")
                batch = next(loader)
                waited = time.perf_counter() - began
                self.bad.report(step, batch.bad)
                rate = self.engine.get_lr()[0]
                watchdog.at(step, "first step" if step == first else "step")
                output_of_step = self.step_runner.step(batch)
                if step == first:
                    self._warn_of_no_scores(output_of_step)
                skipped = self.bad_steps.left_out(
                    step,
                    partial(self.batches.record_ids, step),
                    loss=output_of_step.loss,
                    grad_norm=output_of_step.grad_norm,
                    grad_temperature=output_of_step.grad_temperature,
                )
                if recipe.loss.learn_temperature and not skipped:
                    self.temperature.step(output_of_step.grad_temperature, rate)
                done, seconds = step + 1, time.perf_counter() - began
                watchdog.at(step, "evaluate")
                evaluation = self._evaluate(done)
                told: dict[str, Any] = {"lr": rate, "seconds": seconds, "evaluation": evaluation}
                if skipped:
                    self.telemetry.skip(step, self.bad_steps.total, **told)
                else:
                    warmth = self.temperature.value
                    self.telemetry.record(
                        step, batch, output_of_step, waited=waited, temperature=warmth, **told
                    )
                stopping = signals.asked() and done < self.num_steps
                if stopping or done % recipe.train.save_every == 0 or done == self.num_steps:
                    watchdog.at(step, "save")
                    checkpoint.save(
                        self.engine,
                        output / "checkpoints",
                        done,
                        recipe=recipe,
                        inputs=inputs,
                        extra=self._extra(done),
                        keep=checkpoint.Keep.of(recipe.train, self.pace.flat_until),
                        write_model=self._write_model,
                        go_on=self._may_go_on(done) and not stopping,
                    )
                if stopping:
                    self.telemetry.close()
                    leave(done, output)
        self.telemetry.close()
        self._write_where_it_fits(output / "model", go_on=False, with_facts=True)
        return output / "model"

    def _may_go_on(self, done: int) -> bool:
        return self.recipe.train.on_full_disk == "go_on" and done < self.num_steps

    def _resume(self, folder: Path, inputs: dict[str, Any]) -> int:
        recipe = self.recipe
        first, extra = checkpoint.load(
            self.engine, folder, recipe=recipe, free=_free_keys(recipe), inputs=inputs
        )
        self.best = None if folder == self.named else extra["best"]  # lies in the other run
        self.temperature.state = extra["temperature"]
        self.bad_steps.state = extra.get("bad_steps", [0, 0])
        if self.validator and self.best and self.best["judge"] != self.validator.judge:
            console.print(
                f"eval: what was best (step {self.best['step']}) was judged by other data and is "
                "forgotten"
            )
            self.best = None
        if isinstance(self.batches.order, Mixture):
            for note in self.batches.order.resume(extra["data"], first):
                console.print(f"data: {note}", markup=False)
        return first

    def _extra(self, done: int) -> dict[str, Any]:
        order = self.batches.order
        return {
            "best": self.best,
            "temperature": self.temperature.state,
            "pace": self.pace,
            "bad_steps": self.bad_steps.state,
            "data": order.state(done) if isinstance(order, Mixture) else None,
        }

    def _evaluate(self, done: int) -> dict[str, float] | None:
        """Judge the model where the recipe says so; the best so far is written to RUN/best."""
        due = done % self.recipe.eval.every == 0 or done == self.num_steps
        if self.validator is None or not due:
            return None
        figures = self.validator()
        check_finite(self.ranks, self.recipe.output, done - 1, **figures)
        folder = self.recipe.output / "best"
        go_on = self._may_go_on(done)
        if better(figures, self.best) and self._write_where_it_fits(folder, go_on=go_on):
            self.best = {"step": done, **figures, "judge": self.validator.judge}
            if self.ranks.is_main:
                with replacing(self.recipe.output / "best.json") as temporary:
                    temporary.write_text(json.dumps(self.best, indent=1), encoding="utf-8")
        return figures

    def _warn_of_no_scores(self, output: StepOutput) -> None:
        if output.terms.get("scores") == 0.0:
            console.print(
                "[yellow]warning:[/] loss.scores_weight is set, but no query of the first batch "
                "has two documents with scores: without them it does nothing"
            )

    def _inputs(self) -> dict[str, Any]:
        """Hashes of the backbone and the shards: a path may come to hold something else."""
        backbone = model_sha256(self.recipe.model.path)
        mixed = isinstance(self.batches.order, Mixture)
        found: dict[str, Any] = {"backbone": backbone, "way to mix sources": mixed}
        if not mixed:
            found["shards"] = self.batches.shards.sha256
        if teacher := self.recipe.loss.teacher:
            found["teacher"] = hashlib.sha256((teacher / "manifest.json").read_bytes()).hexdigest()
        return found

    def _write_model(self, folder: Path, *, with_facts: bool = False) -> None:
        """with_facts: the model card says what the run says of itself."""
        weights = checkpoint.full_state_dict(self.engine, self.encoder.backbone)
        if self.ranks.is_main:
            facts = run_facts(self.recipe.output) if with_facts else None
            export(self.encoder, folder, state_dict=weights | self.frozen, run=facts)

    def _write_where_it_fits(self, folder: Path, *, go_on: bool, with_facts: bool = False) -> bool:
        """Write the model, and say whether the disk had room; a collective.

        Raises:
            UserError: it had none, and the run does not go on; an earlier model stays.
        """
        full = FullDisk()
        with full.noted():
            self._write_model(folder, with_facts=with_facts)
        if not full.anywhere(self.engine):
            return True
        said = f"{folder}: the model cannot be written, the disk is full"
        if not go_on:
            raise UserError(f"{said}; checkpoints stay; make room and start again")
        console.print(
            f"warning: {said}; training goes on",
            style="yellow", markup=False, soft_wrap=True, highlight=False,
        )  # fmt: skip
        return False

    def _headline(self, first: int) -> str:
        recipe, why = self.recipe, self.batches.no_tokens
        shape = f"{self.config.num_hidden_layers} layers x {self.config.hidden_size}"
        resumed = f", resumed at step {first}" if first else ""
        ranks = f"{self.ranks.world_size} {self.ranks.device.type} ranks"
        return (
            f"{recipe.name}: {shape}, {recipe.model.attention}, {recipe.model.pooling} pooling, "
            f"{recipe.train.precision}, ZeRO {self.engine.zero_optimization_stage()} on {ranks}\n"
            f"{len(self.batches.shards):,} records, {self.num_steps:,} steps of "
            f"{recipe.train.batch_size:,} queries{resumed}; "
            + (f"tokenised while training, {why}" if why else "token ids of the shards")
        )


def train(recipe: Recipe, resume: str = "auto") -> Path:
    """Train as the recipe says, on every rank that the launcher started; return RUN/model.

    resume: see `drama.resume.named_start`.
    """
    with Ranks.start() as ranks, alone_in(recipe.output, ranks):
        return Trainer(recipe, ranks, resume).run()
