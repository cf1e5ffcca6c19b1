"""The training step against sentence-transformers' cached loss: same weights, same tokens, bf16.

Both get the same folder, the same tokenised real pairs and AdamW, and do everything of a step:
encode, loss, gradients, update. Tokens are real ones, padding does not count. Ours runs through a
DeepSpeed engine (ZeRO 1: float32 master weights), theirs on bf16 weights without masters, which is
less work for it. Losses must agree, else no
time is written.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drama import fusion
from drama.bench.rows import Rows
from drama.blocks import Execution
from drama.data.batches import RankBatch
from drama.data.packing import PackedBatch
from drama.data.records import document_hash64
from drama.data.sources import read_source
from drama.encoder import Encoder
from drama.errors import UserError
from drama.gradcache import GradCache
from drama.loss import ContrastiveLoss
from drama.memory import PeakMemory
from drama.metrics import forward_flops, peak_flops
from drama.optimizer import WAITLESS, look_once

TEMPERATURE = 0.05
LEARNING_RATE = 0.0  # AdamW does all its work, and every step sees the same weights
LOSS_GATE = 0.02  # relative; bf16 states, another order of the same sums


@dataclass(frozen=True)
class Ours:
    """One way to run our step. packed: off, texts are padded to the longest of their chunk."""

    token_budget: int = 8192
    pooled_last_block: bool = True
    pooled_norm: bool = True
    keep_graphs: Any = "auto"
    reduction: Any = "auto"
    packed: bool = True
    fused: str = "auto"  # norm and SwiGLU; or compile, off

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in asdict(self).items() if v != getattr(Ours, k)]
        return " ".join(["ours", *changed])


@dataclass(frozen=True)
class Theirs:
    """sentence-transformers with so many texts, or real tokens, a mini-batch."""

    mini_batch: int = 32
    num_tokens: int | None = None

    def __str__(self) -> str:
        size = f"{self.num_tokens} tokens" if self.num_tokens else f"{self.mini_batch} texts"
        return f"sentence-transformers, {size}"


Way = Ours | Theirs
W = TypeVar("W", Ours, Theirs)


class PaddedEncoder(Encoder):
    """The same vectors by Hugging Face's own forward over a padded batch: neither packed, nor the
    last block and the norm where they are read."""

    def forward(self, batch: PackedBatch) -> Tensor:
        lengths_B = batch.cu_seqlens.diff()
        inside_BL = torch.arange(max(batch.lengths), device=lengths_B.device) < lengths_B[:, None]
        ids_BL = torch.zeros_like(inside_BL, dtype=torch.int64)
        ids_BL[inside_BL] = batch.input_ids_T
        states_BLD = self.backbone(input_ids=ids_BL, attention_mask=inside_BL).last_hidden_state
        last_BD: Tensor = states_BLD[torch.arange(len(lengths_B)), lengths_B.long() - 1]
        return last_BD


def read_pairs(
    encoder: Encoder, source: Path, count: int, max_query: int, max_document: int
) -> RankBatch:
    """The first `count` records with a document of their own, tokenised.

    Raises:
        UserError: the source holds fewer.
    """
    queries: dict[str, str] = {}
    documents: list[str] = []
    seen: set[str] = set()
    for record in read_source(source):
        text = record.positives[0].full_text
        if record.query not in queries and text not in seen:
            queries[record.query] = text
            seen.add(text)
            documents.append(text)
        if len(documents) == count:
            break
    else:
        raise UserError(f"{source}: {len(documents)} different pairs, {count} are asked for")
    rows = [
        *encoder.tokenize(list(queries), "query", max_query),
        *encoder.tokenize(documents, "document", max_document),
    ]
    ids = torch.tensor([document_hash64(text) for text in documents])
    return RankBatch.of_pairs(rows, ids)


def first_pairs(batch: RankBatch, count: int) -> RankBatch:
    """The first pairs of a batch."""
    split = batch.num_queries
    rows = [*batch.rows[:count], *batch.rows[split : split + count]]
    return RankBatch.of_pairs(rows, batch.document_ids[:count])


@contextmanager
def ours(way: Ours, folder: Path, device: torch.device) -> Iterator[Callable[[RankBatch], float]]:
    """A step of ours; returns the loss before the update."""
    kind = Encoder if way.packed else PaddedEncoder
    encoder = kind.from_pretrained(folder).train()
    encoder.execution = Execution(
        way.pooled_last_block, way.pooled_norm, compiled=way.fused == "compile"
    )
    if way.fused == "auto":
        fusion.fuse(encoder.backbone, "auto", device)
    engine, *_ = deepspeed.initialize(
        model=encoder,
        optimizer=_adamw(encoder),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000},
            "steps_per_print": 2**31,
            "timers": WAITLESS,
        },
    )
    look_once(engine)
    step = GradCache(
        engine,
        ContrastiveLoss(TEMPERATURE),
        way.token_budget,
        keep_graphs=way.keep_graphs,
        reduction=way.reduction,
    )
    yield lambda batch: step.step(batch).loss
    engine.destroy()


def _adamw(module: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, fused=True)


@contextmanager
def theirs(
    way: Theirs, folder: Path, device: torch.device
) -> Iterator[Callable[[RankBatch], float]]:
    """A step of `CachedMultipleNegativesRankingLoss`; padding as its collator does it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    kwargs = {"dtype": torch.bfloat16}
    model = SentenceTransformer(str(folder), device=device.type, model_kwargs=kwargs).train()
    loss = CachedMultipleNegativesRankingLoss(
        model,
        scale=1 / TEMPERATURE,
        mini_batch_size=way.mini_batch,
        mini_batch_num_tokens=way.num_tokens,
    )
    optimizer = _adamw(model)

    def step(batch: RankBatch) -> float:
        split = batch.num_queries
        features = [_padded(rows, device) for rows in (batch.rows[:split], batch.rows[split:])]
        optimizer.zero_grad()
        value = loss(features, torch.zeros(split, dtype=torch.int64, device=device))
        value.backward()
        optimizer.step()
        return float(value.detach())

    yield step


def _padded(rows: Sequence[np.ndarray], device: torch.device) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids_BL = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    lengths_B1 = torch.tensor([len(row) for row in rows], device=device)[:, None]
    mask_BL = (torch.arange(longest, device=device) < lengths_B1).long()
    return {"input_ids": ids_BL.to(device), "attention_mask": mask_BL}


def measure(
    ways: Sequence[Way],
    batch: RankBatch,
    folder: Path,
    device: torch.device,
    rows: Rows,
    *,
    shape: str,
    rounds: int,
    max_tokens: int,
    part: str,
    note: Callable[[str], None],
) -> dict[str, float]:
    """Time every way in `rounds` turns, each after a warm-up; return median tokens/s by way.

    The ways live one after the other in each round, so that none takes the other's memory. One that
    runs out of memory gets a row that says so. part: of the benchmark, for the rows.
    """
    encoder = Encoder.from_pretrained(folder)
    config, lengths = encoder.backbone.config, [len(row) for row in batch.rows]
    peak = peak_flops(device, torch.bfloat16)
    flops = 3 * forward_flops(config, lengths, last_token_only=True)
    del encoder
    seconds: dict[str, list[float]] = {str(way): [] for way in ways}
    losses: dict[str, float] = {}
    memory: dict[str, int] = {}
    failed: set[str] = set()
    for _ in range(rounds):
        for way in [way for way in ways if str(way) not in failed]:
            name = str(way)
            try:
                seconds[name] += _timed(way, batch, folder, device, losses, memory)
            except torch.OutOfMemoryError:
                failed.add(name)
                note(f"{name}: out of memory")
                continue
            finally:
                gc.collect()
            median = sum(lengths) / statistics.median(seconds[name])
            note(f"{name}: {median:,.0f} tokens/s, loss {losses[name]:.4f}")
    _check_losses(losses)
    speeds = {}
    x, mode = f"B={batch.num_queries}, {sum(lengths)} tokens", f"step, {part}"
    for way in ways:
        name = str(way)
        setting = {"shape": shape, "longest": max_tokens, **asdict(way)}
        if name in failed:
            speeds[name] = 0.0
            rows.add(name, mode, "out of memory", x, [1.0], setting)
            continue
        speed = [sum(lengths) / s for s in seconds[name]]
        speeds[name] = statistics.median(speed)
        rows.add(name, mode, "tokens/s", x, speed, setting)
        rows.add(name, mode, "seconds", x, seconds[name], setting)
        rows.add(name, mode, "MFU", x, [flops / s / peak for s in seconds[name]], setting)
        rows.add(name, mode, "peak MiB", x, [memory[name] / 2**20], setting)
        rows.add(name, mode, "loss", x, [losses[name]], setting)
    return speeds


def _timed(
    way: Way,
    batch: RankBatch,
    folder: Path,
    device: torch.device,
    losses: dict[str, float],
    memory: dict[str, int],
) -> list[float]:
    """Seconds of a step after its warm-up, on a GPU of three; notes loss and peak memory.

    The peak is that of the last step before, since on a CPU its count begins with giving back what
    malloc holds, which the step then has to fault in again.
    """
    opened = ours(way, folder, device) if isinstance(way, Ours) else theirs(way, folder, device)
    on_gpu = device.type == "cuda"
    with opened as step:
        if isinstance(way, Ours):
            step(batch)  # finds out how many graphs fit
            step(batch)  # keeps half of them
        high = PeakMemory(device)
        step(batch)  # ours keeps all that fit; takes its memory for the first time
        memory[str(way)] = high.taken()
        seconds = []
        for _ in range(3 if on_gpu else 1):
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            losses[str(way)] = step(batch)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return seconds


def _check_losses(losses: dict[str, float]) -> None:
    reference = next(iter(losses.values()))
    for name, loss in losses.items():
        if abs(loss - reference) > LOSS_GATE * abs(reference):
            raise UserError(f"{name}: loss {loss:.4f} is not {reference:.4f}; nothing is measured")


def fastest(speeds: dict[str, float], ways: Sequence[W]) -> W:
    """The best of `ways` that were measured."""
    return max(ways, key=lambda way: speeds[str(way)])


def ablation(whole: Ours) -> list[Ours]:
    """`whole` without each of its features in turn."""
    return [
        replace(whole, packed=False),
        replace(whole, pooled_last_block=False),
        replace(whole, pooled_norm=False),
        replace(whole, keep_graphs=0),
        # what "auto" does not take under ZeRO 1
        replace(whole, reduction="step" if torch.cuda.is_available() else "chunk"),
        replace(whole, fused="off"),
    ]
