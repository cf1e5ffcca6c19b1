"""What a recipe will take: memory a rank by part, FLOPs a step, time at a stated MFU.

Nothing is guessed that can be counted. Weights are counted on the meta device; the bytes that a
graph keeps for each token are counted by running two and three blocks of the model's own shape on
the CPU; lengths come from a sample of the shards. The rest is arithmetic over what DeepSpeed and
the gradient cache hold at their three high points:

    loss     weights, optimizer, cached vectors, all ranks' documents and their gradient, loss work
    replay   weights, optimizer, cached vectors, local gradient, one chunk's graph
    step     weights, optimizer, gradients, what the update needs beside them
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModel

from drama.attention import ATTENTION_NAME
from drama.blocks import Execution
from drama.data.lines import is_url
from drama.data.manifest import MANIFEST
from drama.data.packing import pack
from drama.data.stream import open_pairs
from drama.encoder import Encoder
from drama.errors import UserError
from drama.folder import RetrieverSettings, read_config
from drama.kernels.infonce_torch import BLOCK_ELEMENTS, WORK_ELEMENTS
from drama.memory import GRADIENT_SHARE, GraphBytes
from drama.metrics import forward_flops
from drama.recipe import Recipe
from drama.tokenizer import TextEncoder, load_tokenizer

GIB = 2**30
ADAM = 8  # bytes a weight: two float32 moments
MASTER = 4
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters: gathered weights of ZeRO 3
REDUCE_BUCKET = 50_000_000  # elements, as ds_configs/ says; DeepSpeed's own is ten times that
TRITON_WORK = 3 * 2**28  # H and S of `infonce_triton`
SAMPLE = 512  # records that are tokenised to learn lengths
BUDGETS = (4096, 8192, 16384, 32768, 65536)
# what a GPU's memory loses to the context, the libraries and fragments
USABLE = 0.9


@dataclass(frozen=True)
class Model:
    """What is counted of a backbone. graph_bytes: of a token, all that its backward pass reads."""

    trained: int
    frozen: int
    width: int
    graph_bytes: float

    @property
    def weights(self) -> int:
        return self.trained + self.frozen


@dataclass(frozen=True)
class Work:
    """A step. texts and queries: of the global batch; tokens a text from `lengths`."""

    queries: int
    documents: int
    tokens: int
    flops: float  # of one forward pass
    sampled: bool


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part; `phases` are the three high points, `total` the highest."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    vectors: int
    keys: int
    loss: int
    update: int

    @property
    def phases(self) -> dict[str, int]:
        always = self.weights + self.optimizer
        return {
            "loss": always + self.vectors + self.keys + self.loss,
            "replay": always + self.vectors + self.gradients + self.activations,
            "step": always + self.gradients + self.update,
        }

    @property
    def total(self) -> int:
        return max(self.phases.values())


def count_model(recipe: Recipe, dtype: torch.dtype) -> Model:
    """Weights and graph of the recipe's backbone; its weights are not read.

    Raises:
        UserError: no model folder, or an architecture that is not supported.
    """
    config = read_config(recipe.model.path)
    with torch.device("meta"):
        whole = AutoModel.from_config(config)
    total = sum(p.numel() for p in whole.parameters())
    frozen = whole.embed_tokens.weight.numel() if recipe.model.freeze_embeddings else 0
    step = recipe.step
    per_token = graph_bytes(
        config,
        load_tokenizer(recipe.model.path),
        RetrieverSettings(recipe.model.pooling, recipe.model.attention),
        Execution(step.pooled_last_block, step.pooled_norm, step.recompute_blocks),
        dtype,
        max(16, min(512, recipe.data.max_document_tokens)),
    )
    return Model(total - frozen, frozen, config.hidden_size, per_token)


def graph_bytes(
    config: Any,
    tokenizer: Any,
    settings: RetrieverSettings,
    execution: Execution,
    dtype: torch.dtype,
    length: int,
) -> float:
    """Bytes a token that a chunk's graph keeps, by running two and three blocks of this shape on
    two texts of this length.

    An upper bound for a GPU in bf16: norms and SwiGLU keep more as transformers computes them, and
    attention keeps float32 copies on a CPU without bf16 instructions.
    """

    def run(layers: int, execution: Execution) -> float:
        small = copy.deepcopy(config)
        small.num_hidden_layers, small.vocab_size, small.pad_token_id = layers, 64, None
        if getattr(config, "layer_types", None):  # a Qwen lists them
            small.layer_types = ["full_attention"] * layers
        backbone = AutoModel.from_config(small, attn_implementation=ATTENTION_NAME)
        encoder = Encoder(backbone, tokenizer, settings).to(dtype).train()
        encoder.execution = execution
        counter = GraphBytes(encoder.parameters())
        with counter.watch():
            encoder(pack([[5] * length] * 2))
        # the blocks' inputs, which autograd does not list
        inputs = layers * 2 * length * encoder.dim * dtype.itemsize
        kept = counter.total + (inputs if execution.recompute_blocks else 0)
        return kept / (2 * length)

    two = run(2, execution)
    total = two + (config.num_hidden_layers - 2) * (run(3, execution) - two)
    if execution.recompute_blocks:  # one block at a time runs again
        plain = replace(execution, recompute_blocks=False)
        total += run(3, plain) - run(2, plain)
    return total


def count_work(recipe: Recipe) -> Work:
    """A step's texts, tokens and FLOPs from a sample of the shards, else from the longest texts."""
    config, data, train = read_config(recipe.model.path), recipe.data, recipe.train
    sampled = all(is_url(folder) or (Path(folder) / MANIFEST).is_file() for folder in data.shards)
    if sampled:
        records = open_pairs(data.shards)
        step = max(1, len(records) // SAMPLE)
        chosen = [records.read(i) for i in islice(range(0, len(records), step), SAMPLE)]
        negatives = [r.negatives[: data.hard_negatives] for r in chosen]
        encode = TextEncoder(
            load_tokenizer(recipe.model.path),
            recipe.model.query_prefix,
            recipe.model.document_prefix,
        )
        queries = encode.queries(chosen, data.max_query_tokens)[0]
        texts = [
            document.full_text
            for record, others in zip(chosen, negatives, strict=True)
            for document in (record.positives[0], *others)
        ]
        documents = encode(texts, "document", data.max_document_tokens)[0]
        lengths, count = [len(row) for row in (*queries, *documents)], len(chosen)
        num_documents = len(documents)
    else:
        count, num_documents = 1, 1 + data.hard_negatives
        lengths = [data.max_query_tokens, *[data.max_document_tokens] * num_documents]
    scale = train.batch_size / count
    pooled = recipe.step.pooled_last_block and recipe.model.pooling == "last"
    return Work(
        queries=train.batch_size,
        documents=round(num_documents * scale),
        tokens=round(sum(lengths) * scale),
        flops=forward_flops(config, lengths, last_token_only=pooled) * scale,
        sampled=sampled,
    )


def memory(
    model: Model,
    work: Work,
    *,
    stage: int,
    ranks: int,
    token_budget: int,
    dtype: torch.dtype,
    offload: bool = False,
    on_gpu: bool = True,
    reduce_by_step: bool = True,
) -> Memory:
    """Predict one rank's memory without kept graphs; `offload` keeps optimizer and weights on the
    host."""
    size, shard = dtype.itemsize, ranks if stage else 1
    weights = model.weights * size
    if stage == 3:  # its part, and what is gathered while it is used
        weights = weights // ranks + min(model.weights, LIVE_PARAMETERS) * size
    states = (ADAM + MASTER) * model.trained // shard if stage else ADAM * model.trained
    gradients = model.trained * size
    if stage == 3:  # a bucket that lives all the time
        gradients += REDUCE_BUCKET * size
    if not reduce_by_step and stage == 1:  # at most: the chunks' sum and a copy, as on a CPU
        gradients += 2 * model.trained * size
    if not reduce_by_step and stage >= 2:
        gradients -= model.trained * size * (shard - 1) // shard
    # the update reads float32 gradients of this rank's part; torch's AdamW writes two more
    update = MASTER * model.trained // shard if stage else 0
    if not on_gpu:
        update += 2 * MASTER * model.trained // shard
    if offload:
        states, update = 0, 0
    texts = (work.queries + work.documents) / ranks
    vectors = round(2 * texts * model.width * size)
    rows = work.queries / ranks + work.documents
    # columns, gathered and joined, their gradient in float32 and in the vectors' type; the loss on
    # a CPU works on scaled copies
    keys = work.documents * model.width * (3 * size + MASTER * (1 + (ranks > 1)))
    keys += 0 if on_gpu else round(MASTER * rows * model.width)
    logits = work.queries / ranks * work.documents
    loss = (
        TRITON_WORK if on_gpu else MASTER * round(min(WORK_ELEMENTS + BLOCK_ELEMENTS, 3 * logits))
    )
    return Memory(
        weights=weights,
        optimizer=states,
        gradients=gradients,
        activations=round(model.graph_bytes * token_budget),
        vectors=vectors,
        keys=round(keys),
        loss=loss,
        update=update,
    )


@dataclass(frozen=True)
class Plan:
    """All configurations, and the one to take. `stage`: a name of ds_configs/. `reductions`: the
    form in which a run on GPUs would reduce gradients under each."""

    recipe: Recipe
    model: Model
    work: Work
    ranks: int
    gpu_bytes: int
    by_stage: dict[str, Memory]
    reductions: dict[str, str]
    stage: str | None
    token_budget: int
    kept_chunks: int

    @property
    def num_chunks(self) -> int:
        """Chunks of a rank in a step."""
        return -(-self.work.tokens // self.ranks // self.token_budget)


STAGES = {"zero1": (1, False), "zero2": (2, False), "zero3": (3, False), "zero3_offload": (3, True)}


def make_plan(recipe: Recipe, *, gpus: int, gpu_gib: float) -> Plan:
    """Count, then `choose`.

    Raises:
        UserError: a backbone that cannot be read, or more GPUs than lanes.
    """
    if gpus > recipe.data.lanes:
        raise UserError(f"data.lanes {recipe.data.lanes} feeds at most as many ranks, not {gpus}")
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    counts = count_model(recipe, dtype), count_work(recipe)
    return choose(recipe, *counts, ranks=gpus, room=int(USABLE * gpu_gib * GIB), dtype=dtype)


def choose(
    recipe: Recipe, model: Model, work: Work, *, ranks: int, room: int, dtype: torch.dtype
) -> Plan:
    """The first stage whose peak fits into `room` bytes (they get slower in this order), then the
    largest chunk that fits, then as many kept graphs as the rest holds."""

    def predict(stage: str, budget: int, reduction: str) -> Memory:
        number, offload = STAGES[stage]
        return memory(
            *(model, work),
            stage=number,
            ranks=ranks,
            token_budget=budget,
            dtype=dtype,
            offload=offload,
            reduce_by_step=reduction == "step",
        )

    def reduction(stage: str) -> str:
        """As the gradient cache settles it, before the first step."""
        if recipe.step.grad_reduction != "auto":
            return recipe.step.grad_reduction
        held = predict(stage, recipe.train.token_budget, "step").optimizer
        held += model.weights * dtype.itemsize // (ranks if STAGES[stage][0] == 3 else 1)
        small = model.weights * dtype.itemsize < GRADIENT_SHARE * (room - held)
        return "step" if small == (STAGES[stage][0] > 1) else "chunk"

    reductions = {stage: reduction(stage) for stage in STAGES}
    least = max(recipe.data.max_query_tokens, recipe.data.max_document_tokens)
    budgets = [b for b in BUDGETS if b >= least] or [least]
    asked = {s: predict(s, recipe.train.token_budget, reductions[s]) for s in STAGES}
    fitting = [s for s in STAGES if predict(s, budgets[0], reductions[s]).total <= room]
    stage = fitting[0] if fitting else None
    budget, kept = recipe.train.token_budget, 0
    if stage:
        # a chunk beyond the step's own tokens would be no larger
        own = work.tokens // ranks
        useful = [b for b in budgets if b < 2 * own] or budgets[:1]
        how = reductions[stage]
        budget = max(b for b in useful if predict(stage, b, how).total <= room)
        at = predict(stage, budget, how)
        # kept graphs are gone before a chunk is encoded again
        spare = room - max(at.phases["replay"] - at.activations, at.phases["loss"])
        kept = max(0, min(-(-own // budget), int(spare // max(1, at.activations))))
        if how == "chunk" and STAGES[stage][0] == 3:  # that form keeps none
            kept = 0
    return Plan(recipe, model, work, ranks, room, asked, reductions, stage, budget, kept)


PARTS = (
    "weights", "optimizer", "gradients", "activations", "vectors", "keys", "loss", "update",
)  # fmt: skip


def tables(plan: Plan, *, mfu: float, peak_tflops: float) -> list[Table]:
    """Memory by part and stage; the step and the run."""
    table = Table(
        "GiB a rank",
        *plan.by_stage,
        title=f"{plan.model.weights / 1e6:,.0f}M weights, {plan.recipe.train.precision}, "
        f"{plan.ranks} GPUs, chunks of {plan.recipe.train.token_budget:,} tokens, no graph kept",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for part in PARTS:
        values = (getattr(found, part) / GIB for found in plan.by_stage.values())
        table.add_row(part, *(f"{value:,.2f}" for value in values))
    totals = [found.total for found in plan.by_stage.values()]
    table.add_section()
    table.add_row("peak", *(f"{total / GIB:,.2f}" for total in totals))
    table.add_row("fits", *("yes" if total <= plan.gpu_bytes else "no" for total in totals))
    table.add_row("grad_reduction", *plan.reductions.values())
    work, train = plan.work, plan.recipe.train
    flops = 3 * work.flops
    rate = mfu * peak_tflops * 1e12 * plan.ranks
    seconds = flops / rate
    facts = Table("step", "", title="a step of the global batch", show_header=False)
    facts.add_row("queries, documents", f"{work.queries:,}, {work.documents:,}")
    source = f"mean of {SAMPLE} records" if work.sampled else "all texts as long as allowed"
    facts.add_row("tokens", f"{work.tokens:,} ({source})")
    facts.add_row("FLOPs", f"{flops:.3g} (three forward passes)")
    facts.add_row(
        "at MFU", f"{mfu:.0%} of {peak_tflops:,.0f} TFLOP/s: {work.tokens / seconds:,.0f} tokens/s"
    )
    facts.add_row("seconds", f"{seconds:,.2f}")
    if train.steps:
        facts.add_row("run", f"{train.steps:,} steps, {train.steps * seconds / 3600:,.1f} hours")
    return [table, facts]
