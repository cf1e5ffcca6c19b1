"""Groups of weights, and the learning rate at every step."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from drama.optimizer import Pace, adamw, learning_rate_factor, parameter_groups, step_engine
from drama.recipe import TrainRecipe


def train_recipe(**changes) -> TrainRecipe:
    return TrainRecipe(steps=100, warmup_ratio=0.1, min_lr_ratio=0.2, **changes)


def factors_of(train: TrainRecipe, pace: Pace) -> list[float]:
    """Of every step, and the one that would follow the last."""
    return [
        learning_rate_factor(step, train=train, pace=pace) for step in range(pace.num_steps + 1)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_learning_rate(schedule):
    train = train_recipe(schedule=schedule, decay_ratio=0.3)
    factors = factors_of(train, Pace.of(train, 100))
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    if schedule == "constant":
        assert set(factors[10:]) == {1.0}
        return
    if schedule == "wsd":
        assert set(factors[10:71]) == {1.0}
        left = 1 - np.sqrt(np.arange(31) / 30)
        np.testing.assert_allclose(factors[70:], 0.2 + 0.8 * left)
        return
    done = np.arange(91) / 90
    left = (1 + np.cos(np.pi * done)) / 2 if schedule == "cosine" else 1 - done
    np.testing.assert_allclose(factors[10:], 0.2 + 0.8 * left)


def test_wsd_without_room_to_decay_ends_at_the_least():
    train = train_recipe(schedule="wsd", decay_ratio=1.0)
    factors = factors_of(train, Pace.of(train, 100))
    assert max(factors) == 1.0
    assert factors[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["wsd", "constant"])
def test_a_prolonged_run_is_not_back_in_the_warm_up(schedule):
    train = train_recipe(schedule=schedule, decay_ratio=0.3)
    short = Pace.of(train, 100)
    long = Pace.of(train, 5000, short.warmup)
    last = 70 if schedule == "wsd" else 100
    assert factors_of(train, long)[: last + 1] == factors_of(train, short)[: last + 1]
    assert long.follows(short, last)
    assert short.follows(long, last)
    assert not long.follows(short, last + 1)
    assert short.follows(short, 100)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_that_looks_at_the_end_has_no_part_to_prolong(schedule):
    train = train_recipe(schedule=schedule)
    short, long = Pace.of(train, 100), Pace.of(train, 200)
    assert not long.follows(short, 1)
    assert short.follows(short, 90)


def test_only_matrices_decay_and_what_is_frozen_is_in_no_group():
    module = torch.nn.ModuleDict(
        {
            "embed_tokens": torch.nn.Embedding(5, 4),
            "norm": torch.nn.LayerNorm(4),
            "proj": torch.nn.Linear(4, 3),
        }
    )
    decayed, others = parameter_groups(module, 0.5)
    assert [p.shape for p in decayed["params"]] == [(3, 4)]
    assert decayed["weight_decay"] == 0.5
    assert sorted(tuple(p.shape) for p in others["params"]) == [(3,), (4,), (4,), (5, 4)]
    assert others["weight_decay"] == 0.0
    module["embed_tokens"].requires_grad_(False)
    assert len(parameter_groups(module, 0.5)[1]["params"]) == 3
    optimizer = adamw(module, train_recipe(), torch.device("cpu"), offloaded=False)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]


@pytest.mark.parametrize(("skips", "stage"), [(True, 1), (True, 3), (False, 2)])
def test_a_step_that_deepspeed_skips_has_no_norm_and_the_schedule_moves_on(
    skips: bool, stage: int
) -> None:
    """DeepSpeed's mark for it is a norm of -1, and it holds the schedule back."""
    moved = []
    engine = SimpleNamespace(
        skipped_steps=4,
        zero_optimization_stage=lambda: stage,
        get_global_grad_norm=lambda: -1.0 if skips else 2.5,
        lr_scheduler=SimpleNamespace(step=lambda: moved.append(True)),
    )
    engine.step = lambda: setattr(engine, "skipped_steps", 4 + skips)
    norm = step_engine(engine)
    assert math.isnan(norm) if skips else norm == 2.5
    assert moved == [True] * skips
