"""What people see of a run: a line of metrics.jsonl a step, the progress bar, TensorBoard and the
other monitors that the DeepSpeed JSON names (W&B, Comet, CSV)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from drama.data.batches import RankBatch
from drama.data.manifest import DAMAGED
from drama.data.mixture import Mixture
from drama.data.reading import Order
from drama.distributed import Ranks
from drama.gradcache import StepOutput
from drama.metrics import StepLog, forward_flops, peak_memory_mib
from drama.recipe import Recipe

_CURVES = (
    "loss", "lr", "grad_norm", "temperature", "tokens_per_s", "pairs_per_s", "mfu", "peak_mem_mib",
)  # fmt: skip


class Telemetry(StepLog):
    """Writes on the main rank; counting is a collective that every rank takes part in.

    peak: FLOP/s of all ranks together.
    """

    def __init__(
        self, recipe: Recipe, engine: Any, ranks: Ranks, *, peak: float, order: Order
    ) -> None:
        self.recipe, self.engine, self.peak = recipe, engine, peak
        self.order = order
        self.config = engine.module.backbone.config
        self.widths = recipe.loss.matryoshka_dims or [engine.module.dim]
        super().__init__(recipe.output, ranks, "train")

    def record(
        self,
        step: int,
        batch: RankBatch,
        output: StepOutput,
        *,
        seconds: float,
        waited: float,
        lr: float,
        temperature: float,
        evaluation: dict[str, float] | None,
    ) -> None:
        """One step; counts are of the global batch, memory of the fullest rank. lr: the rate that
        the step was taken with; the engine's own is already the next one."""
        line = self._line(step, batch, output, seconds, waited)
        line["lr"], line["temperature"] = lr, temperature
        if evaluation is not None:
            line["evaluation"] = evaluation
        if self.file is None:
            return
        self._write(line)
        note = (
            f"loss {line['loss']:.3f}  {line['tokens_per_s']:,.0f} tokens/s  mfu {line['mfu']:.0%}"
        )
        if evaluation is not None:
            note += "  " + "  ".join(f"{name} {x:.3f}" for name, x in evaluation.items())
        self.bar.update(self.task, advance=1, note=note)
        events = {f"train/{name}": line[name] for name in _CURVES}
        by_group = {
            "loss": line["loss_by_prefix"] | output.terms,
            "seconds": line["seconds_by_phase"],
        }
        for group, values in by_group.items():
            events |= {f"{group}/{name}": x for name, x in values.items()}
        events |= {f"eval/{name}": x for name, x in (evaluation or {}).items()}
        samples = (step + 1) * self.recipe.train.batch_size
        self._publish(self.engine.monitor, [(name, x, samples) for name, x in events.items()])

    def _line(
        self, step: int, batch: RankBatch, output: StepOutput, seconds: float, waited: float
    ) -> dict[str, Any]:
        pooled = self.recipe.step.pooled_last_block and self.recipe.model.pooling == "last"
        lengths = batch.rows.lengths.tolist()
        flops = 3 * forward_flops(self.config, lengths, last_token_only=pooled)
        # a padded batch pads queries to the longest query and documents to the longest document
        split = batch.num_queries
        padded = sum(max(part) * len(part) for part in (lengths[:split], lengths[split:]))
        counts = torch.tensor(
            [batch.num_tokens, split, len(lengths), batch.num_cut, flops, padded, len(batch.bad)],
            dtype=torch.float64,
        )
        memory = torch.tensor(peak_memory_mib(self.ranks.device), dtype=torch.float64)
        if self.ranks.world_size > 1:
            counts, memory = counts.to(self.ranks.device), memory.to(self.ranks.device)
            dist.all_reduce(counts)
            dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        tokens, pairs, texts, cut, total_flops, slots, bad = counts.tolist()
        of_data: dict[str, Any] = {}
        if isinstance(self.order, Mixture):
            of_data["epochs"] = self.order.epochs(step + 1)
        if bad:
            of_data["bad"] = {DAMAGED: int(bad)}
        return {
            "step": step,
            "epoch": round((step + 1) / self.order.batches_per_epoch, 4),
            "loss": output.loss,
            "loss_by_prefix": {
                str(d): x for d, x in zip(self.widths, output.loss_by_prefix, strict=True)
            },
            "loss_terms": output.terms,
            "grad_norm": output.grad_norm,
            "tokens": int(tokens),
            "padding_avoided": 1 - tokens / slots,
            "pairs": int(pairs),
            "texts": int(texts),
            "texts_cut": int(cut),
            **of_data,
            "false_negatives_masked": output.num_masked,
            "chunks": output.num_chunks,
            "chunks_kept": output.num_kept,
            "tokens_per_s": tokens / seconds,
            "pairs_per_s": pairs / seconds,
            "mfu": total_flops / seconds / self.peak,
            "peak_mem_mib": memory.item(),
            "data_wait_s": waited,
            "seconds": seconds,
            "seconds_by_phase": {"data": waited, **output.watch.seconds},
        }
