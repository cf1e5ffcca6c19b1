"""What people see of a pruning by learned masks: metrics.jsonl, the progress bar, TensorBoard."""

from __future__ import annotations

from typing import Any, NamedTuple

from drama.console import console
from drama.distributed import Ranks
from drama.metrics import StepLog, peak_memory_mib
from drama.prune.domains import DomainWeights
from drama.prune.masks import Masks
from drama.prune.recipe import PruneRecipe
from drama.prune.text import TextStream

PLAIN_NAMES = {
    "layer": "layers", "hidden": "hidden channels", "kv_group": "KV groups",
    "query_head": "query heads", "ffn": "FFN channels",
}  # fmt: skip


class StepOutput(NamedTuple):
    """What a step found; losses are nats a token over the global batch.

    alive: share of the blocks' weights that was computed with. losses, rows: by domain. seconds: by
    phase.
    """

    loss: float
    penalty: float
    grad_norm: float
    alive: float
    losses: dict[str, float]
    rows: dict[str, int]
    seconds: dict[str, float]


class PruneTelemetry(StepLog):
    """Writes on the main rank."""

    def __init__(self, recipe: PruneRecipe, engine: Any, masks: Masks, ranks: Ranks) -> None:
        self.recipe, self.engine, self.masks = recipe, engine, masks
        super().__init__(recipe.output, ranks, "prune")

    def headline(self, first_step: int, text: TextStream) -> str:
        """What the run is, in three lines."""
        recipe = self.recipe
        resumed = f", resumed at step {first_step}" if first_step else ""
        kinds = ", ".join(PLAIN_NAMES[kind] for kind in self.masks.counts)
        tokens = {domain.name: domain.length * len(domain) for domain in text.domains}
        shown = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        return (
            f"{recipe.name}: masks over {kinds}; {recipe.train.precision}, ZeRO "
            f"{self.engine.zero_optimization_stage()} on {self.ranks.world_size} "
            f"{self.ranks.device.type} ranks\n{recipe.train.steps:,} steps of "
            f"{recipe.train.batch_rows:,} rows of {recipe.data.length:,} tokens{resumed}; "
            f"tokens of text: {shown}"
        )

    def record(
        self,
        step: int,
        found: StepOutput,
        domains: DomainWeights,
        *,
        ramp: float,
        lr: float,
        seconds: float,
        evaluation: dict[str, float] | None,
    ) -> None:
        """One step; lr: the rate that it was taken with. evaluation: by domain."""
        if self.file is None:
            return
        tokens = self.recipe.train.batch_rows * self.recipe.data.length
        line: dict[str, Any] = {
            "step": step,
            "loss": found.loss,
            "loss_by_domain": found.losses,
            "domain_weights": dict(domains.weights),
            "rows_by_domain": found.rows,
            "penalty": found.penalty,
            "sparsity": {k: s.mean().item() for k, s in self.masks.sparsity().items()},
            "target_sparsity": self.masks.targets(ramp),
            "alive": found.alive,
            "grad_norm": found.grad_norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "seconds": seconds,
            "seconds_by_phase": found.seconds,
            "peak_mem_mib": peak_memory_mib(self.ranks.device),
        }
        if evaluation is not None:
            line["evaluation"] = evaluation
        self._write(line)
        self._monitor(line)
        self.bar.update(self.task, advance=1, note=_note(line))

    def _monitor(self, line: dict[str, Any]) -> None:
        names = ("loss", "penalty", "alive", "grad_norm", "lr", "tokens_per_s", "peak_mem_mib")
        events = {f"prune/{name}": line[name] for name in names}
        for group in ("loss_by_domain", "domain_weights", "sparsity", "target_sparsity"):
            events |= {f"{group}/{name}": x for name, x in line[group].items()}
        events |= {f"eval/{name}": x for name, x in line.get("evaluation", {}).items()}
        samples = (line["step"] + 1) * self.recipe.train.batch_rows
        self._publish(self.engine.monitor, [(name, x, samples) for name, x in events.items()])


def warn_of_masks(masks: Masks, sparsity: dict[str, float], dead: dict[str, int]) -> None:
    """Say where the masks had not settled on the target when the steps were over.

    sparsity: expected, by kind. dead: kept units whose mask is 0.
    """
    goals = masks.targets(1.0)
    for kind, reached in sparsity.items():
        if abs(reached - goals[kind]) > 0.05 or dead[kind]:
            console.print(
                f"[yellow]warning:[/] {PLAIN_NAMES[kind]}: expected sparsity {reached:.2f}, the "
                f"target's is {goals[kind]:.2f}; {dead[kind]:,} of the kept units were closed. The "
                "shape is right, the choice had not settled: more steps, or a lower masks.lr, in "
                "another output"
            )


def _note(line: dict[str, Any]) -> str:
    goals = line["target_sparsity"]
    gaps = "  ".join(f"{k} {s:.2f}/{goals[k]:.2f}" for k, s in line["sparsity"].items())
    return f"loss {line['loss']:.3f}  {gaps}  {line['tokens_per_s']:,.0f} tokens/s"
