"""Groups of weights, and the learning rate at every step."""

import numpy as np
import pytest
import torch

from drama.optimizer import adamw, learning_rate_factor, parameter_groups
from drama.recipe import TrainRecipe


def train_recipe(**changes) -> TrainRecipe:
    return TrainRecipe(steps=100, warmup_ratio=0.1, min_lr_ratio=0.2, **changes)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_learning_rate(schedule):
    train = train_recipe(schedule=schedule, decay_ratio=0.3)
    factors = [learning_rate_factor(step, train=train, num_steps=100) for step in range(101)]
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
    factors = [learning_rate_factor(step, train=train, num_steps=100) for step in range(101)]
    assert max(factors) == 1.0
    assert factors[-1] == pytest.approx(0.2)


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
