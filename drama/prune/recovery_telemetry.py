"""What people see of a recovery: metrics.jsonl, the progress bar, TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from drama import attention
from drama.choices import Choice, optimizer_choice, reduction_choice, show_choices
from drama.data.texts import TextBatch
from drama.distributed import Ranks
from drama.kernels import linear_loss
from drama.metrics import StepLog, forward_flops, peak_memory_mib
from drama.prune.parent import Parent
from drama.prune.recovery_data import Texts
from drama.prune.recovery_recipe import RecoveryRecipe
from drama.prune.recovery_step import StepOutput


def losses_by_source(
    names: Sequence[str], sums_S: Sequence[float], counts_S: Sequence[int]
) -> dict[str, float]:
    """Nats a token of every source that was seen."""
    return {n: s / c for n, s, c in zip(names, sums_S, counts_S, strict=True) if c}


class RecoveryTelemetry(StepLog):
    """Writes on the main rank; counting is a collective. peak: FLOP/s of all ranks together."""

    def __init__(
        self,
        recipe: RecoveryRecipe,
        engine: Any,
        ranks: Ranks,
        *,
        peak: float,
        texts: Texts,
        parent: Parent | None,
    ) -> None:
        self.recipe, self.engine, self.peak = recipe, engine, peak
        self.texts, self.parent = texts, parent
        super().__init__(recipe.output, ranks, "recover")

    def headline(self, first_step: int, num_steps: int) -> str:
        """What the run is, in a few lines."""
        recipe, config = self.recipe, self.engine.module.lm.config
        shape = f"{config.num_hidden_layers} layers x {config.hidden_size}"
        loss = recipe.loss
        weights = {"cross-entropy": loss.lm, "KL": loss.kl, "states": loss.hidden}
        parts = " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight)
        resumed = f", resumed at step {first_step}" if first_step else ""
        why = self.texts.batches.no_tokens
        tokens = f"tokenised while training, {why}" if why else "token ids of the shards"
        return (
            f"{recipe.name}: {shape}, {loss.objective}, {parts}; {recipe.train.precision}, ZeRO "
            f"{self.engine.zero_optimization_stage()} on {self.ranks.world_size} "
            f"{self.ranks.device.type} ranks\n{len(self.texts.shards):,} texts, {num_steps:,} "
            f"steps of {recipe.train.batch_texts:,}{resumed}; {tokens}"
        )

    def show(self, reduction: str, fused: tuple[str, str]) -> None:
        """Print what the run computes with, and why."""
        device = self.ranks.device
        dtype = torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32
        engine, recompute = self.engine, self.recipe.step.recompute_blocks
        width = engine.module.lm.config.hidden_size
        loss = linear_loss.choose_backend("auto", torch.empty(1, width, dtype=dtype, device=device))
        show_choices(
            [
                Choice("attention", *attention.choose_backend(device.type, dtype)),
                Choice("loss", loss, f"{device.type}; no logits are whole"),
                Choice("norm, SwiGLU, RoPE", *fused),
                Choice(
                    "activations",
                    "block inputs only" if recompute else "all kept",
                    f"step.recompute_blocks: {str(recompute).lower()}",
                ),
                reduction_choice(engine.zero_optimization_stage(), reduction),
                optimizer_choice(engine),
            ]
        )

    def record(
        self,
        step: int,
        batch: TextBatch,
        output: StepOutput,
        *,
        lr: float,
        seconds: float,
        waited: float,
        evaluation: Mapping[str, Any] | None,
    ) -> None:
        """One step; lr: the rate that it was taken with. evaluation: held-out `loss`, and
        `by_source`."""
        line = self._line(step, batch, output, seconds, waited)
        line["lr"] = lr
        if evaluation is not None:
            line["evaluation"] = {
                "loss": evaluation["loss"],
                "perplexity": math.exp(evaluation["loss"]),
                **{f"loss {name}": x for name, x in evaluation["by_source"].items()},
            }
        if self.file is None:
            return
        self._write(line)
        note = (
            f"loss {line['loss']:.3f}  {line['tokens_per_s']:,.0f} tokens/s  mfu {line['mfu']:.0%}"
        )
        if evaluation is not None:
            note += f"  held-out {evaluation['loss']:.3f}"
        self.bar.update(self.task, advance=1, note=note)
        names = ("loss", "lm", "kl", "hidden", "grad_norm", "lr", "tokens_per_s", "mfu")
        events = {f"recover/{name}": line[name] for name in names}
        events |= {f"loss/{name}": x for name, x in line["lm_by_source"].items()}
        events |= {f"weights/{name}": x for name, x in line.get("source_weights", {}).items()}
        events |= {f"eval/{name}": x for name, x in line.get("evaluation", {}).items()}
        samples = (step + 1) * self.recipe.train.batch_texts
        self._publish(self.engine.monitor, [(name, x, samples) for name, x in events.items()])

    def _line(
        self, step: int, batch: TextBatch, output: StepOutput, seconds: float, waited: float
    ) -> dict[str, Any]:
        lengths = batch.rows.lengths.tolist()
        sums = {
            "tokens": float(sum(lengths)),
            "flops": self._flops(lengths),
            # a padded batch pads every text to the longest
            "slots": float(max(lengths, default=0) * len(lengths)),
            "texts": float(len(lengths)),
            "bad": float(len(batch.bad)),
        }
        sums = {name: self.ranks.sum(x) for name, x in sums.items()}
        domains = self.texts.domains
        names = self.texts.sources
        return {
            "step": step,
            "epoch": round((step + 1) / self.texts.order.batches_per_epoch, 4),
            "loss": output.loss,
            "lm": output.lm,
            "kl": output.kl,
            "hidden": output.hidden,
            "lm_by_source": losses_by_source(names, output.sums_S, output.counts_S),
            "tokens_by_source": dict(zip(names, output.counts_S, strict=True)),
            **({"source_weights": dict(domains.weights)} if domains else {}),
            "grad_norm": output.grad_norm,
            "tokens": int(sums["tokens"]),
            "texts": int(sums["texts"]),
            **({"bad": int(sums["bad"])} if sums["bad"] else {}),
            "padding_avoided": 1 - sums["tokens"] / max(1.0, sums["slots"]),
            "chunks": output.num_chunks,
            "tokens_per_s": sums["tokens"] / seconds,
            "mfu": sums["flops"] / seconds / self.peak,
            "peak_mem_mib": peak_memory_mib(self.ranks.device),
            "data_wait_s": waited,
            "seconds": seconds,
            "seconds_by_phase": {"data": waited, **output.seconds},
        }

    def _flops(self, lengths: list[int]) -> float:
        """Of this rank's texts: three forwards of the student and one of its parent, with heads."""
        loss, tokens = self.recipe.loss, sum(lengths)
        predictions = tokens * (loss.mask_share if loss.objective == "mntp" else 1.0)
        config = self.engine.module.lm.config
        head = 2 * config.vocab_size * predictions
        flops = 3 * (forward_flops(config, lengths) + head * config.hidden_size)
        if self.parent is not None and (loss.kl or loss.hidden):
            flops += forward_flops(self.parent.model.config, lengths)
            flops += head * self.parent.model.config.hidden_size if loss.kl else 0.0
        return flops
