"""Prune by learned masks: language-model training in which masks close until a shape is reached.

    RUN/recipe.yaml  metrics.jsonl  text/  checkpoints/step-N/  model/  tensorboard/

A step draws one set of masks, the same on every rank; the weights' gradients go through DeepSpeed's
engine on any ZeRO stage, those of the masks are a few ten thousand numbers that are added up over
the ranks and stepped beside it (`drama.prune.masks`).

R rows of a global batch, B rows of a pass, N tokens a row, K domains.
"""

from __future__ import annotations

import hashlib
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from drama import checkpoint
from drama.console import console, progress
from drama.distributed import Ranks
from drama.errors import UserError
from drama.hf import build_lm
from drama.metrics import Stopwatch, with_precision
from drama.optimizer import Pace, start_engine, step_engine
from drama.prune.alive import Alive, fold, install, make_maskable
from drama.prune.closing import Closing
from drama.prune.domains import DomainWeights
from drama.prune.lm import LanguageModel
from drama.prune.masks import Gates, Masks
from drama.prune.output import check_out, write_model
from drama.prune.recipe import PruneRecipe
from drama.prune.shape import Shape, count_parameters, parse_target, plan_table
from drama.prune.source import find_llm, load_model, load_tokenizer, read_config
from drama.prune.surgery import cut
from drama.prune.telemetry import PruneTelemetry, StepOutput, warn_of_masks
from drama.prune.text import TextStream, find_texts, open_domain, sha256_of, tokenise
from drama.resume import alone_in, sound_checkpoints
from drama.settings import KEEPING_KEYS, check_same_run
from drama.stability import BadSteps, sound_scale
from drama.stopping import StopSignals, leave
from drama.watchdog import Watchdog

MASK_FILE = "masks.safetensors"
CHECKPOINT_BYTES = 16  # of a weight: itself, its float32 master, two moments
# what may differ when a run goes on: none of it changes the mathematics
_FREE_KEYS = {
    "train": {*KEEPING_KEYS, "rows_per_pass", "recompute_blocks"},
    "eval": {"every"},
}


class Pruner:
    """Builds everything from a recipe; `run` learns the masks and returns the small model's folder.

    Raises:
        UserError: a recipe that does not fit its model, its text, its ranks or its run folder.
    """

    def __init__(self, recipe: PruneRecipe, ranks: Ranks) -> None:
        self.ranks, self.device = ranks, ranks.device
        recipe.rows_of_rank(ranks.world_size)
        self.recipe, stored = with_precision(recipe, ranks)
        recipe = self.recipe
        if stored is not None:
            check_same_run(stored, recipe, _FREE_KEYS)
        self.where = find_llm(recipe.model.path)
        self.config = read_config(self.where)
        self.source = Shape.of(self.config)
        self.target = parse_target(recipe.model.to, self.source)
        if self.target == self.source:
            raise UserError(
                f"model.to '{recipe.model.to}' is the source's own shape; name a smaller one"
            )
        vocabulary = {"vocab_size": self.config.vocab_size}
        vocabulary["tied"] = self.config.tie_word_embeddings
        small, whole = (
            count_parameters(shape, **vocabulary).total for shape in (self.target, self.source)
        )
        size = 4 * small + CHECKPOINT_BYTES * whole * (recipe.train.keep_last + 1)
        what = f"the pruned model with {recipe.train.keep_last} checkpoints and one being written"
        check_out(recipe.output / "model", self.where.path, size, what)
        for name, paths in recipe.data.domains.items():
            find_texts(name, paths)
        console.print(plan_table(self.source, self.target, **vocabulary))
        self.tokenizer = load_tokenizer(self.where, self.config.vocab_size)
        torch.manual_seed(recipe.seed)
        self.inputs = {"model": self.where.sha256}
        self.text = self._open_text()
        self.inputs["text"] = self._text_sha256()
        self.masks = Masks(self.source, self.target, seed=recipe.seed, device=self.device)
        self.pace = Pace.of(recipe.train, recipe.train.steps)
        self.model = LanguageModel(load_model(self.where, self.config))
        make_maskable(self.model.lm)
        if recipe.train.recompute_blocks:
            self.model.lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.engine = start_engine(
            self.model,
            recipe.train,
            recipe.deepspeed_config(world_size=ranks.world_size),
            self.pace,
            output=recipe.output,
            ranks=ranks,
        )
        self.closing = Closing(self.masks, recipe.masks, recipe.train.steps)
        self.domains: DomainWeights
        self.bad_steps = BadSteps(ranks, recipe.output, recipe.train.max_bad_steps)
        # a GPU's tensor cores want widths of 64; on a CPU every channel left out is saved
        self.multiple = 64 if self.device.type == "cuda" else 1

    # -- building -----------------------------------------------------------------------------

    def _open_text(self) -> TextStream:
        data, train = self.recipe.data, self.recipe.train
        held_out = data.held_out_rows
        most = (train.steps * train.batch_rows + held_out) * data.length
        folder = self.recipe.output / "text"
        self.ranks.on_main(lambda: self._tokenise(folder, most))
        domains = [
            open_domain(
                name,
                folder / f"{name}.bin",
                length=data.length,
                held_out=held_out,
                seed=self.recipe.seed,
            )
            for name in data.domains
        ]
        return TextStream(domains, self.recipe.seed)

    def _tokenise(self, folder: Path, most: int) -> None:
        for name, paths in self.recipe.data.domains.items():
            identity = self.inputs["model"]
            tokenise(name, paths, self.tokenizer, folder, max_tokens=most, identity=identity)

    # -- one step -----------------------------------------------------------------------------

    def step(self, step: int) -> StepOutput:
        """Draw masks, run the global batch, step weights, masks and multipliers; a collective."""
        recipe, names = self.recipe, list(self.recipe.data.domains)
        watch = Stopwatch(self.device)
        ids_RN, domain_R = self.text.batch(step, self.domains.weights, recipe.train.batch_rows)
        rows = recipe.rows_of_rank(self.ranks.world_size)
        mine = slice(self.ranks.rank * rows, (self.ranks.rank + 1) * rows)
        alive = Alive(self.masks.sample(step), self.source, multiple=self.multiple)
        install(self.model.lm, alive)
        watch.lap("draw")
        losses = []
        passes = ids_RN[mine].split(recipe.train.rows_per_pass)
        for number, ids_BN in enumerate(passes, 1):
            losses_B = self.engine(ids_BN.to(self.device))
            watch.lap("forward")
            loss = losses_B.mean()
            self.engine.backward(loss * sound_scale(loss))
            watch.lap("backward")
            if number < len(passes):
                self.engine.step()  # counts the pass; the weights move at the last one
            losses.append(losses_B.detach())
        loss_R = torch.cat(losses).double()
        sums_K = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        sums_K.index_add_(0, domain_R[mine].to(self.device), loss_R)
        gradients = alive.gradients()
        if self.ranks.world_size > 1:
            dist.all_reduce(sums_K)
            dist.all_reduce(gradients)
            gradients /= self.ranks.world_size
        watch.lap("masks")
        # weights and masks step both, or neither
        sound = bool(gradients.isfinite().all()) and bool(sums_K.isfinite().all())
        grad_norm = step_engine(self.engine, sound=sound)
        watch.lap("step")
        sound = math.isfinite(grad_norm)
        penalty = self.closing.step(step, alive, gradients) if sound else 0.0
        watch.lap("masks")
        counts = torch.bincount(domain_R, minlength=len(names)).tolist()
        losses_of = dict(zip(names, sums_K.tolist(), strict=True))
        for name, count in zip(names, counts, strict=True) if sound else ():
            self.domains.observe(name, losses_of[name], count)
        return StepOutput(
            loss=sums_K.sum().item() / recipe.train.batch_rows,
            penalty=penalty,
            grad_norm=grad_norm,
            alive=alive.share(),
            losses={n: losses_of[n] / c for n, c in zip(names, counts, strict=True) if c},
            rows=dict(zip(names, counts, strict=True)),
            seconds=watch.seconds,
        )

    @torch.no_grad()
    def evaluate(self, gates: Gates) -> dict[str, float]:
        """Held-out loss of every domain under these masks, nats a token; a collective."""
        install(self.model.lm, Alive(gates, self.source, multiple=self.multiple))
        self.engine.eval()
        rank, world = self.ranks.rank, self.ranks.world_size
        found = {}
        for domain in self.text.domains:
            rows_RN = domain.held_out_rows
            total = 0.0
            for first in range(0, len(rows_RN), world):  # every rank runs every pass
                row = rows_RN[min(first + rank, len(rows_RN) - 1)]
                loss = self.engine(row[None].to(self.device)).item()
                total += loss if first + rank < len(rows_RN) else 0.0
            found[domain.name] = self.ranks.sum(total) / len(rows_RN)
        self.engine.train()
        return found

    # -- running ------------------------------------------------------------------------------

    def run(self) -> Path:
        """Learn to the last step from the newest whole checkpoint; return RUN/model."""
        recipe, output = self.recipe, self.recipe.output
        if self.ranks.is_main:
            recipe.save(output / "recipe.yaml")
        first = self.begin()
        telemetry = PruneTelemetry(recipe, self.engine, self.masks, self.ranks)
        console.print(telemetry.headline(first, self.text), highlight=False)
        with (
            progress(disable=not self.ranks.is_main) as bar,
            StopSignals(self.ranks) as signals,
            Watchdog(self.ranks, recipe.train.stuck_after) as watchdog,
        ):
            telemetry.open(first, bar, recipe.train.steps)
            for step in range(first, recipe.train.steps):
                began, rate = time.perf_counter(), self.engine.get_lr()[0]
                watchdog.at(step, "first step" if step == first else "step")
                found = self.step(step)
                figures = {"loss": found.loss, "grad_norm": found.grad_norm}
                skipped = self.bad_steps.left_out(
                    step, partial(self._rows, found), "masks.lr", **figures
                )
                done = step + 1
                if recipe.data.update_every and done % recipe.data.update_every == 0:
                    self.domains.update()
                seconds = time.perf_counter() - began
                due = done % recipe.eval.every == 0 or done == recipe.train.steps
                watchdog.at(step, "evaluate")
                evaluation = self.evaluate(self.masks.final()) if due else None
                told: dict[str, Any] = {"lr": rate, "seconds": seconds, "evaluation": evaluation}
                if skipped:
                    telemetry.skip(step, self.bad_steps.total, **told)
                else:
                    ramp = self.closing.ramp(step)
                    telemetry.record(step, found, self.domains, ramp=ramp, **told)
                stopping = signals.asked() and done < recipe.train.steps
                if stopping or done % recipe.train.save_every == 0 or done == recipe.train.steps:
                    watchdog.at(step, "save")
                    self._save(done, last=stopping or done == recipe.train.steps)
                if stopping:
                    telemetry.close()
                    leave(done, output)
        telemetry.close()
        return self._export()

    def begin(self) -> int:
        """Load the newest whole checkpoint; without any, measure the source's loss by domain.

        Returns the steps that are done; a collective, before the first step.
        """
        data, names = self.recipe.data, list(self.recipe.data.domains)
        options: dict[str, Any] = {"clip": data.clip_gaps, "floor": data.floor}
        start = next(sound_checkpoints(self.recipe.output / "checkpoints", self.ranks), None)
        if start is None:
            reference = self.evaluate(Gates({}, {}))
            self.domains = DomainWeights(names, reference, weights=data.weights, **options)
            return 0
        step, extra = checkpoint.load(
            self.engine, start, recipe=self.recipe, free=_FREE_KEYS, inputs=self.inputs
        )
        self.domains = DomainWeights(names, extra["domains"]["reference"], **options)
        self.domains.load(extra["domains"])
        self.text.drawn = extra["drawn"]
        self.bad_steps.state = extra.get("bad_steps", [0, 0])
        self.closing.load(load_file(start / "model" / MASK_FILE))
        return step

    def _text_sha256(self) -> str:
        facts = sorted((self.recipe.output / "text").glob("*.json"))
        return hashlib.sha256("".join(sha256_of(path) for path in facts).encode()).hexdigest()

    def _rows(self, found: StepOutput) -> list[dict[str, Any]]:
        """Rows of each domain in a global batch: the last ones that were drawn of it."""
        return [
            {"source": name, "rows": [self.text.drawn[name] - count, self.text.drawn[name]]}
            for name, count in found.rows.items()
        ]

    def _save(self, done: int, *, last: bool) -> None:
        checkpoint.save(
            self.engine,
            self.recipe.output / "checkpoints",
            done,
            recipe=self.recipe,
            inputs=self.inputs,
            extra={
                "domains": self.domains.state(),
                "drawn": self.text.drawn,
                "bad_steps": self.bad_steps.state,
            },
            keep=checkpoint.Keep.of(self.recipe.train),
            write_model=self._write_masks,
            go_on=self.recipe.train.on_full_disk == "go_on" and not last,
        )

    def _write_masks(self, folder: Path) -> None:
        if self.ranks.is_main:
            folder.mkdir(parents=True)
            save_file(self.closing.state(), folder / MASK_FILE)

    def _export(self) -> Path:
        """Fold the masks of the target shape into the weights, cut, and write RUN/model."""
        out = self.recipe.output / "model"
        gates = self.masks.final()
        after = self.evaluate(gates)
        weights = checkpoint.full_state_dict(self.engine, self.model.lm)
        if self.ranks.is_main:
            alive = Alive(gates.to(torch.device("cpu")), self.source)
            whole = build_lm(self.config, weights)
            whole.generation_config = self.model.lm.generation_config
            fold(whole, alive)
            plan = alive.plan()
            sparsity = {k: x.mean().item() for k, x in self.masks.sparsity().items()}
            dead = {k: int((gates.z[k][kept] == 0).sum()) for k, kept in gates.kept.items()}
            warn_of_masks(self.masks, sparsity, dead)
            facts = {
                "model": str(self.recipe.model.path.resolve()),
                "method": "learned masks",
                "expected_sparsity": sparsity,
                "kept_at_zero": dead,
                "source": vars(self.source),
                "target": vars(self.target),
                "plan": vars(plan),
                "steps": self.recipe.train.steps,
                "loss_before": self.domains.reference,
                "loss_after": after,
                "domain_weights": self.domains.weights,
            }
            write_model(cut(whole, plan), self.tokenizer, facts, out)
            for name, loss in after.items():
                console.print(
                    f"held-out loss of {name}: {self.domains.reference[name]:.3f} before, "
                    f"{loss:.3f} after",
                    highlight=False,
                )
        if self.ranks.world_size > 1:
            dist.barrier()
        return out


def learn(recipe: PruneRecipe) -> Path:
    """Prune as the recipe says, on every rank that the launcher started; return RUN/model."""
    with Ranks.start() as ranks, alone_in(recipe.output, ranks):
        return Pruner(recipe, ranks).run()
