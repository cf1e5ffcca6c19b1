"""The loss on real ranks against one process that holds the whole batch, in float64."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drama.gather import Columns
from drama.kernels.infonce_reference import infonce_reference
from drama.loss import ContrastiveLoss
from drama.testing import contrastive_batch, relative_error

WORKER = Path(__file__).parent / "workers" / "loss_ranks.py"
WIDTH, TEMPERATURE = 32, 0.1  # at 0.05 rows are solved, and float32 itself is off by 1e-5
# the same 16 queries and 40 documents, as they are dealt out: queries a rank, hard negatives a rank
SPLITS = {
    1: ((16,), (24,)),
    2: ((15, 1), (2, 22)),
    4: ((7, 3, 5, 1), (9, 0, 2, 13)),
}
PREFIXES = {"prefixes": (8, 16, 32), "prefix_weights": (0.5, 1.0, 2.0)}
SETTINGS: dict[str, dict[str, Any]] = {
    "one prefix": {},
    "three prefixes": PREFIXES,
    "margin": {**PREFIXES, "margin": -0.3},  # less than the positive by 0.3, so that it bites
    "narrow": {"prefixes": (8, 24)},  # the last dimensions have no gradient
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Share(NamedTuple):
    """A rank's rows of the whole batch, by number."""

    rows_B: Tensor
    columns_N: Tensor


def whole_batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = contrastive_batch(16, 40, WIDTH, dtype=dtype)
    return batch.q_BD, batch.k_ND, batch.positive_B, batch.ids_N


def shares(world: int) -> list[Share]:
    """Positives first, then what is nobody's positive; the columns' order is not the batch's."""
    _, _, positive_B, ids_N = whole_batch(torch.float64)
    num_queries, num_negatives = SPLITS[world]
    rows_B = torch.arange(16)
    others_N = torch.tensor(sorted(set(range(40)) - set(positive_B.tolist())))
    dealt = zip(rows_B.split(num_queries), others_N.split(num_negatives), strict=True)
    result = [Share(rows, torch.cat([positive_B[rows], others])) for rows, others in dealt]
    holders = defaultdict(set)
    for rank, share in enumerate(result):
        for number in ids_N[share.columns_N].tolist():
            holders[number].add(rank)
    crossing = sum(len(ranks) > 1 for ranks in holders.values())
    assert crossing >= 3 * (world > 1), "documents that two ranks hold"
    return result


def whole_loss(dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, Any]:
    """What one process gets that holds everything: float64, autograd."""
    q_BD, k_ND, positive_B, ids_N = whole_batch(dtype)
    q_BD, k_ND = (x.double().requires_grad_() for x in (q_BD, k_ND))
    output = infonce_reference(
        q_BD, k_ND, positive_B, temperature=TEMPERATURE, k_ids_N=ids_N, **settings
    )
    grad_q_BD, grad_k_ND = torch.autograd.grad(output.loss, (q_BD, k_ND))
    return {
        "loss": output.loss.detach(), "loss_P": output.loss_P, "grad_q_BD": grad_q_BD,
        "grad_k_ND": grad_k_ND, "num_masked": int(output.num_masked_B.sum()),
    }  # fmt: skip


def cases(world: int) -> dict[str, tuple[dict[str, Any], list[tuple[Tensor, ...]]]]:
    """Settings and every rank's arguments; "no duplicates" for the gradient's scale."""
    result = {}
    for dtype in TOLERANCE:
        q_BD, k_ND, _, ids_N = whole_batch(dtype)
        settings_ids = {name: (x, ids_N) for name, x in SETTINGS.items()}
        settings_ids["no duplicates"] = ({}, torch.arange(40))
        for name, (settings, ids) in settings_ids.items():
            result[f"{name} {dtype}"] = (
                {"temperature": TEMPERATURE, **settings},
                arguments(q_BD, k_ND, ids, world),
            )
    return result


def arguments(q_BD: Tensor, k_ND: Tensor, ids_N: Tensor, world: int) -> list[tuple[Any, ...]]:
    """For every rank: queries, documents in two parts, the parts' sizes on all ranks, positives as
    columns, the columns' ids."""
    dealt = shares(world)
    sizes = [len(share.columns_N) for share in dealt]
    part_sizes = [[n - n // 3 for n in sizes], [n // 3 for n in sizes]]
    order_M = torch.cat(
        [share.columns_N[: n - n // 3] for share, n in zip(dealt, sizes, strict=True)]
        + [share.columns_N[n - n // 3 :] for share, n in zip(dealt, sizes, strict=True)]
    )
    column_of_M = order_M.argsort()  # by number of the document
    _, _, positive_B, _ = whole_batch(torch.float64)
    return [
        (
            *(q_BD[rows], k_ND[columns].split([first[rank], second[rank]]), part_sizes),
            *(column_of_M[positive_B[rows]], ids_N[order_M]),
        )
        for rank, (rows, columns) in enumerate(dealt)
        for first, second in [part_sizes]
    ]


def loss_of(settings: dict[str, Any], share: tuple[Any, ...]) -> dict[str, Any]:
    q_BD, documents, part_sizes, positive_B, ids_M = share
    columns = Columns(part_sizes)
    for part in documents:
        columns.send(part)
    return vars(ContrastiveLoss(**settings)(q_BD, columns, positive_B, ids_M))


@pytest.fixture(scope="module", params=SPLITS, ids=lambda world: f"{world}-ranks")
def outputs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Any]]]:
    """Every rank's output of every case; one rank is this process, without a process group."""
    world = request.param
    if world == 1:
        return [{name: loss_of(s, x[0]) for name, (s, x) in cases(1).items()}]
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(cases(world), folder / "cases.pt")
    command = [sys.executable, str(WORKER), str(folder), str(world)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_equal_one_process_with_the_whole_batch(
    outputs: list[dict[str, dict[str, Any]]], name: str, dtype: torch.dtype
) -> None:
    want, tolerance = whole_loss(dtype, SETTINGS[name]), TOLERANCE[dtype]
    by_id = whole_loss(dtype, PREFIXES)["num_masked"]
    assert want["num_masked"] > (by_id if "margin" in SETTINGS[name] else 0)
    for rank, (rows_B, columns_N) in enumerate(shares(len(outputs))):
        got = outputs[rank][f"{name} {dtype}"]
        assert got["num_masked"] == want["num_masked"]
        assert got["grad_q_BD"].dtype == got["grad_k_ND"].dtype == dtype
        assert relative_error(got["loss"], want["loss"]) <= tolerance, rank
        assert got["loss_P"].shape == want["loss_P"].shape
        assert relative_error(got["loss_P"], want["loss_P"]) <= tolerance, rank
        for key, numbers in (("grad_q_BD", rows_B), ("grad_k_ND", columns_N)):
            assert got[key].shape == (len(numbers), WIDTH)
            assert relative_error(got[key], want[key][numbers]) <= tolerance, (rank, key)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_rank_has_the_same_loss(outputs: list[dict[str, dict[str, Any]]], name: str) -> None:
    for dtype in TOLERANCE:
        first, *rest = (output[f"{name} {dtype}"] for output in outputs)
        for other in rest:
            assert torch.equal(other["loss"], first["loss"])
            assert torch.equal(other["loss_P"], first["loss_P"])


def test_the_gradient_is_that_of_the_mean_over_the_global_batch(
    outputs: list[dict[str, dict[str, Any]]],
) -> None:
    """By hand: the sum of 16 cross-entropies over 16, whatever the split; by its rank's number of
    queries, or by the world, it would be another."""
    q_BD, k_ND, positive_B, _ = whole_batch(torch.float64)
    q_BD, k_ND = q_BD.requires_grad_(), k_ND.requires_grad_()
    logits_BN = F.normalize(q_BD) @ F.normalize(k_ND).T / TEMPERATURE
    total = F.cross_entropy(logits_BN, positive_B, reduction="sum")
    grads = torch.autograd.grad(total, (q_BD, k_ND))
    for output, share in zip(outputs, shares(len(outputs)), strict=True):
        got = output[f"no duplicates {torch.float64}"]
        assert got["num_masked"] == 0
        assert relative_error(got["loss"], total.detach() / 16) <= 1e-10
        for key, grad, numbers in zip(("grad_q_BD", "grad_k_ND"), grads, share, strict=True):
            assert relative_error(got[key], grad[numbers] / 16) <= 1e-10
