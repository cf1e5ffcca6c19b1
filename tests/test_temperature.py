"""The learned temperature against torch's Adam."""

import math

import pytest
import torch

from drama.temperature import HIGHEST, LOWEST, LearnedTemperature


def test_a_step_is_adams_on_the_logarithm():
    ours, log = LearnedTemperature(0.05), torch.tensor(math.log(0.05), dtype=torch.float64)
    log.requires_grad_()
    adam = torch.optim.Adam([log], lr=0.01, betas=(0.9, 0.98), eps=1e-8)
    for target in (0.02, 0.03, 0.5, 0.01, 0.02):
        leaf = ours.leaf(torch.device("cpu"))
        (gradient,) = torch.autograd.grad((leaf - target) ** 2, leaf)
        ours.step(gradient.item(), lr=0.01)
        adam.zero_grad()
        ((log.exp() - target) ** 2).backward()
        adam.step()
        assert ours.value == pytest.approx(log.exp().item(), rel=1e-9)


def test_it_stays_within_its_bounds_and_goes_on_from_its_state():
    ours = LearnedTemperature(0.05)
    for _ in range(50):
        ours.step(1.0, lr=0.5)
    assert ours.value == pytest.approx(LOWEST)
    other = LearnedTemperature(0.3)
    other.state = dict(ours.state)
    for one in (ours, other):
        for _ in range(100):
            one.step(-1.0, lr=0.5)
    assert ours.value == other.value == pytest.approx(HIGHEST)
