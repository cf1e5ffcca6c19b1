from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from drama.prune.masks import BETA, GAMMA, ZETA, Masks, draw, expected_value, keep_probability
from drama.prune.shape import Shape

SOURCE = Shape(layers=6, hidden=40, heads=8, kv_heads=4, ffn=30, head_dim=4)
TARGET = replace(SOURCE, layers=4, hidden=24, heads=3, kv_heads=3, ffn=12)
CPU = torch.device("cpu")


def density(z: Tensor, log_alpha: float) -> Tensor:
    """Of the stretched binary concrete distribution (Maddison et al. 2017, appendix B) inside."""
    s = (z - GAMMA) / (ZETA - GAMMA)
    x = torch.logit(s) * BETA - log_alpha
    logistic = torch.exp(-x) / (1 + torch.exp(-x)) ** 2
    return logistic * BETA / (s * (1 - s)) / (ZETA - GAMMA)


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 2.0, 5.0])
def test_drawn_masks_follow_the_hard_concrete_distribution(log_alpha: float) -> None:
    """Zeros, ones and what lies between, against the density integrated; the mean too."""
    count = 400_000
    # evenly spread numbers instead of random ones: the error is that of a sum, not of chance
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    z = draw(torch.full((count,), log_alpha, dtype=torch.float64), uniform)
    closed, opened = (z == 0).double().mean().item(), (z == 1).double().mean().item()
    at = density(uniform, log_alpha)  # the same numbers serve as a grid to integrate on
    inside, mean = at.mean().item(), (uniform * at).mean().item()
    assert closed + opened + inside == pytest.approx(1, abs=1e-4)
    assert keep_probability(torch.tensor(log_alpha)).item() == pytest.approx(1 - closed, abs=1e-5)
    assert z.mean().item() == pytest.approx(mean + opened, abs=1e-4)


def test_the_gradient_of_a_drawn_mask_is_the_finite_difference() -> None:
    log_alpha = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    uniform = torch.linspace(0.2, 0.8, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: draw(a, uniform), [log_alpha])
    z = draw(log_alpha, uniform)
    (grad,) = torch.autograd.grad(z.sum(), log_alpha)
    outside = (z == 0) | (z == 1)
    assert outside.any()
    assert not outside.all()
    assert torch.equal(grad == 0, outside)


def small_masks(seed: int = 0) -> Masks:
    masks = Masks(SOURCE, TARGET, seed=seed, device=CPU)
    generator = torch.Generator().manual_seed(1)
    for tensors in (masks.log_alpha, masks.linear, masks.quadratic):
        for kind, x in tensors.items():
            tensors[kind] = torch.randn(
                x.shape, generator=generator, dtype=torch.float64
            ).requires_grad_()
    return masks


@pytest.mark.parametrize("ramp", [0.0, 0.3, 1.0])
def test_the_lagrangian_is_the_sum_over_all_constraints(ramp: float) -> None:
    """Written out one by one; every layer is a constraint of its own but for layers and hidden."""
    masks = small_masks()
    sizes = {
        "layer": (6, 4), "hidden": (40, 24), "kv_group": (4, 3), "query_head": (2, 1),
        "ffn": (30, 12),
    }  # fmt: skip
    assert masks.log_alpha.keys() == sizes.keys()
    threshold = BETA * math.log(-GAMMA / ZETA)
    total = 0.0
    for kind, (before, after) in sizes.items():
        goal = ramp * (1 - after / before)
        rows = masks.log_alpha[kind].reshape(-1, before)
        assert len(rows) == (1 if kind in ("layer", "hidden") else 6)
        for row, linear, quadratic in zip(
            rows, masks.linear[kind], masks.quadratic[kind], strict=True
        ):
            dropped = sum(1 - 1 / (1 + math.exp(threshold - a)) for a in row.tolist()) / before
            gap = dropped - goal
            total += linear.item() * gap + quadratic.item() * gap * gap
    assert masks.penalty(ramp).item() == pytest.approx(total, rel=1e-12)


def test_the_gradients_of_the_lagrangian_are_finite_differences() -> None:
    masks = small_masks()
    tensors = [*masks.log_alpha.values(), *masks.multipliers]
    grads = torch.autograd.grad(masks.penalty(0.7), tensors)
    step = 1e-6
    for x, grad in zip(tensors, grads, strict=True):
        for place in range(0, x.numel(), max(1, x.numel() // 7)):
            with torch.no_grad():
                x.view(-1)[place] += step
                above = masks.penalty(0.7).item()
                x.view(-1)[place] -= 2 * step
                below = masks.penalty(0.7).item()
                x.view(-1)[place] += step
            difference = (above - below) / (2 * step)
            assert grad.view(-1)[place].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_the_lagrangian_alone_brings_masks_to_the_target() -> None:
    """Descending masks and ascending multipliers meet the expected sparsity, layer by layer."""
    masks = Masks(SOURCE, TARGET, seed=0, device=CPU)
    down = torch.optim.AdamW(list(masks.log_alpha.values()), lr=0.1, weight_decay=0)
    up = torch.optim.AdamW(masks.multipliers, lr=0.1, weight_decay=0, maximize=True)
    for step in range(1500):
        for optimizer in (down, up):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 1500)
            optimizer.zero_grad()
        masks.penalty(min(1.0, step / 300)).backward()
        down.step()
        up.step()
        masks.clamp()
    for kind, sparsity in masks.sparsity().items():
        goal = masks.targets(1.0)[kind]
        assert sparsity.tolist() == pytest.approx([goal] * len(sparsity), abs=0.02), kind


def test_only_what_the_target_cuts_has_masks() -> None:
    masks = Masks(SOURCE, replace(SOURCE, ffn=12), seed=0, device=CPU)
    assert masks.log_alpha.keys() == {"ffn"}
    assert (masks.sparsity()["ffn"] < 0.01).all()  # nearly everything is there at first


def test_the_masks_of_a_step_depend_on_seed_and_step_alone() -> None:
    def of(seed: int, step: int) -> Tensor:
        return small_masks(seed).sample(step).z["ffn"]

    assert torch.equal(of(0, 3), of(0, 3))
    assert not torch.equal(of(0, 3), of(0, 4))
    assert not torch.equal(of(0, 3), of(1, 3))


def test_the_final_masks_keep_exactly_the_target() -> None:
    masks = small_masks()
    gates = masks.final()
    counts = {"layer": 4, "hidden": 24, "kv_group": 3, "query_head": 1, "ffn": 12}
    for kind, count in counts.items():
        kept = gates.kept[kind]
        assert (kept.sum(-1) == count).all()
        alpha = masks.log_alpha[kind]
        lowest_kept = torch.where(kept, alpha, torch.inf).amin(-1)
        highest_dropped = torch.where(kept, -torch.inf, alpha).amax(-1)
        assert (lowest_kept >= highest_dropped).all()
        assert torch.equal(gates.z[kind], torch.where(kept, expected_value(alpha), 0.0))
    assert expected_value(torch.tensor(9.0)).item() == 1


def test_state_and_load() -> None:
    masks, other = small_masks(), Masks(SOURCE, TARGET, seed=5, device=CPU)
    other.load(masks.state())
    for name, x in other.state().items():
        torch.testing.assert_close(x.double(), masks.state()[name], rtol=1e-6, atol=1e-6)
