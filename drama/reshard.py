"""DeepSpeed's shards of a run of so many ranks, read as if another number of ranks had saved them.

A rank asks DeepSpeed to load as always; what it is given as its own file is put together from the
files of all the ranks before, which are mapped, not read: beyond its own part a rank holds one
piece of one weight. DeepSpeed then restores weights, moments, every group's hyper-parameters,
counters and schedule by the same way as with the old number of ranks.

ZeRO 0 has no shards. ZeRO 1 and 2 cut each group's weights, one behind the other, into one part a
rank; ZeRO 3 cuts every weight into one part a rank, the last one filled up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drama.errors import UserError

Read = Callable[..., Any]  # (path, map_location) to what the file holds
FLAT_WEIGHTS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
FLAT_WEIGHTS[3] = "fp32_flat_groups"
OPTIMIZER = {1: "base_optimizer_state", 2: "base_optimizer_state", 3: "optimizer_state_dict"}


class Span(NamedTuple):
    """A run of a weight's numbers in a rank's flat group."""

    name: str
    start: int  # in the weight
    at: int  # in the flat group
    length: int


def spans_of_parts(
    sizes: Mapping[str, int], paddings: Sequence[int], part: int, rank: int
) -> list[Span]:
    """ZeRO 1 and 2: what a rank's part of a group holds.

    sizes: numbers of each weight, in the order of the group. paddings: unused numbers behind each.
    part: numbers of one rank.
    """
    spans, offset, first = [], 0, rank * part
    for (name, size), padding in zip(sizes.items(), paddings, strict=True):
        begin, end = max(offset, first), min(offset + size, first + part)
        if begin < end:
            spans.append(Span(name, begin - offset, begin - first, end - begin))
        offset += size + padding
    return spans


def spans_of_slices(sizes: Mapping[str, int], world_size: int, rank: int) -> list[Span]:
    """ZeRO 3: what a rank's slices of a group hold; the last rank's may be short of one."""
    spans, at = [], 0
    for name, size in sizes.items():
        part = math.ceil(size / world_size)
        begin, end = min(rank * part, size), min((rank + 1) * part, size)
        if begin < end:
            spans.append(Span(name, begin, at, end - begin))
        at += part
    return spans


class _Saved:
    """The shards of all ranks of a checkpoint, mapped."""

    def __init__(self, shards: list[Any], sizes: list[dict[str, int]], stage: int) -> None:
        self.shards = [shard["optimizer_state_dict"] for shard in shards]
        self.stage = stage
        self.places: dict[str, list[tuple[int, int, Span]]] = {}  # by weight: rank, group, span
        self.group_of = {name: g for g, group in enumerate(sizes) for name in group}
        for rank, shard in enumerate(self.shards):
            for g, group in enumerate(sizes):
                if stage == 3:
                    spans = spans_of_slices(group, len(shards), rank)
                else:
                    paddings = shard["param_alignment_paddings"][g]
                    part = shard[OPTIMIZER[stage]]["state"][g]["exp_avg"].numel()
                    spans = spans_of_parts(group, paddings, part, rank)
                for span in spans:
                    self.places.setdefault(span.name, []).append((rank, g, span))

    def flat(self, rank: int, group: int, key: str | None) -> Tensor:
        """A rank's numbers of a group: the weights', or those of a state of the optimizer."""
        shard = self.shards[rank]
        tensor = shard[FLAT_WEIGHTS[self.stage]][group]
        if key is not None:
            tensor = shard[OPTIMIZER[self.stage]]["state"][group][key]
        return tensor

    def gather(self, spans: Sequence[Span], size: int, key: str | None) -> Tensor:
        """Another rank's flat group: float32 [size], 0 where it is filled up."""
        found = torch.zeros(size)
        for wanted in spans:
            for rank, group, span in self.places[wanted.name]:
                begin = max(wanted.start, span.start)
                end = min(wanted.start + wanted.length, span.start + span.length)
                if begin < end:
                    source = self.flat(rank, group, key)
                    piece = source.narrow(0, span.at + begin - span.start, end - begin)
                    found.narrow(0, wanted.at + begin - wanted.start, end - begin).copy_(piece)
        return found

    def states(self, spans: Sequence[Span], size: int, like: str) -> dict[str, Any]:
        """The optimizer's states of another rank's group; those that are no vectors (the step) as
        they are for the weight `like`."""
        group = self.group_of[like]
        vector = self.flat(0, group, "exp_avg").shape
        before: dict[str, Any] = self.shards[0][OPTIMIZER[self.stage]]["state"][group]
        return {
            key: self.gather(spans, size, key) if getattr(value, "shape", None) == vector else value
            for key, value in before.items()
        }


def resharding(engine: Any, folder: Path, num_ranks: int, read: Read) -> Read:
    """A reader for `engine.load_checkpoint` of what `num_ranks` ranks have saved in `folder`.

    Raises:
        UserError: another ZeRO stage saved it, or an optimizer of another kind.
    """
    engine._get_all_ckpt_names = lambda *_: [str(_model_file(folder))]
    if not engine.zero_optimization_stage():
        return read

    def reader(path: str, map_location: Any = None) -> Any:
        if path.endswith("_optim_states.pt"):
            return _optimizer_file(engine, folder, num_ranks, read)
        state = read(path, map_location=map_location)
        state["dp_world_size"] = engine.world_size
        # what is frozen is the backbone's, which the engine has: no need to cut it anew
        state["frozen_param_fragments"] = None
        return state

    return reader


def _model_file(folder: Path) -> Path:
    """What the first rank saved; the others have the same, but what is frozen."""
    return sorted(folder.glob("*mp_rank_00_model_states.pt"))[0]


def _optimizer_file(engine: Any, folder: Path, num_ranks: int, read: Read) -> dict[str, Any]:
    """What this rank would have saved."""
    bf16, stage = engine.bfloat16_enabled(), int(engine.zero_optimization_stage())
    names = [
        engine._get_rank_zero_ckpt_name(str(folder.parent), folder.name, 0, rank, bf16)
        for rank in range(num_ranks)
    ]
    shards = [read(name, map_location="cpu", mmap=True) for name in names]
    model = read(str(_model_file(folder)), map_location="cpu", mmap=True)
    before = shards[0]["optimizer_state_dict"]
    if before.get("zero_stage") != stage or FLAT_WEIGHTS[stage] not in before:
        raise UserError(
            f"{folder} was saved by another ZeRO stage or optimizer than the run's (stage {stage});"
            f" start with --num_gpus {num_ranks} and the DeepSpeed JSON of that time"
        )
    sizes = [{n: shape.numel() for n, shape in group.items()} for group in model["param_shapes"]]
    saved = _Saved(shards, sizes, stage)
    optimizer, rank = engine.optimizer, engine.global_rank
    weights, states = [], {}
    groups = optimizer.fp16_groups if stage == 3 else optimizer.round_robin_bit16_groups
    flats = (
        optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else optimizer.single_partition_of_fp32_groups
    )
    for g, (group, flat) in enumerate(zip(groups, flats, strict=True)):
        now = {engine.param_names[p]: getattr(p, "ds_numel", p.numel()) for p in group}
        if stage == 3:
            spans = spans_of_slices(now, engine.world_size, rank)
        else:
            paddings = optimizer.round_robin_bit16_padding[g]
            spans = spans_of_parts(now, paddings, flat.numel(), rank)
        weights.append(saved.gather(spans, flat.numel(), None))
        states[g] = saved.states(spans, flat.numel(), next(iter(now)))
    hyper = [dict(group) for group in before[OPTIMIZER[stage]]["param_groups"]]
    owner = optimizer.sub_group_to_group_id if stage == 3 else {g: g for g in range(len(flats))}
    for number, group in enumerate(hyper):
        group["params"] = [g for g in states if owner[g] == number]
    after = before | {
        FLAT_WEIGHTS[stage]: weights,
        OPTIMIZER[stage]: before[OPTIMIZER[stage]] | {"state": states, "param_groups": hyper},
    }
    if stage < 3:
        after["param_alignment_paddings"] = optimizer.round_robin_bit16_padding
    return shards[0] | {"optimizer_state_dict": after}
