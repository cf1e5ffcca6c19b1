"""The loss on real ranks against one process that holds the whole batch, in float64."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drama.kernels.infonce_reference import infonce_reference
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
    "own negatives": {"own_negatives": True},
    "symmetric": {**PREFIXES, "symmetric": True},
    "symmetric, own negatives": {"symmetric": True, "own_negatives": True},
    "learned temperature": {**PREFIXES, "learned": True},
    "scores": {"scores": (0.7, 0.5), "learned": True},
    "spread": {**PREFIXES, "spread_weight": 3.0},
    "teacher": {"teacher": "teacher", "teacher_weight": 5.0},
    "everything": {
        **PREFIXES, "symmetric": True, "own_negatives": True, "learned": True, "scores": (0.7, 0.5),
        "spread_weight": 3.0, "teacher": "teacher",
    },
}  # fmt: skip
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Share(NamedTuple):
    """A rank's rows of the whole batch, by number."""

    rows_B: Tensor
    columns_N: Tensor


class Whole(NamedTuple):
    """The global batch. query_N: the query that a document was read with."""

    q_BD: Tensor
    k_ND: Tensor
    positive_B: Tensor
    ids_N: Tensor
    query_N: Tensor
    score_N: Tensor
    query_ids_B: Tensor


def whole_batch(dtype: torch.dtype) -> Whole:
    batch = contrastive_batch(16, 40, WIDTH, dtype=dtype)
    query_N = torch.arange(40) * 7 % 16
    query_N[batch.positive_B] = torch.arange(16)
    score_N = torch.rand(40, generator=torch.Generator().manual_seed(5))
    score_N[::6] = torch.nan  # some documents have no score, some queries fewer than two
    return Whole(*batch, query_N, score_N, torch.arange(100, 116))


def is_positive(whole: Whole) -> Tensor:
    return torch.zeros(40, dtype=torch.bool).index_fill(0, whole.positive_B, True)


def shares(world: int) -> list[Share]:
    """Positives first, then what is nobody's positive; the columns' order is not the batch's."""
    whole = whole_batch(torch.float64)
    num_queries, num_negatives = SPLITS[world]
    rows_B = torch.arange(16)
    others_N = (~is_positive(whole)).nonzero()[:, 0]
    dealt = zip(rows_B.split(num_queries), others_N.split(num_negatives), strict=True)
    result = [Share(rows, torch.cat([whole.positive_B[rows], others])) for rows, others in dealt]
    holders = defaultdict(set)
    for rank, share in enumerate(result):
        for number in whole.ids_N[share.columns_N].tolist():
            holders[number].add(rank)
    crossing = sum(len(ranks) > 1 for ranks in holders.values())
    assert crossing >= 3 * (world > 1), "documents that two ranks hold"
    return result


def teacher_vectors() -> tuple[Tensor, Tensor]:
    """Ids of all queries and documents, and vectors of another width, as they are stored."""
    whole = whole_batch(torch.float64)
    ids = torch.cat((whole.query_ids_B, whole.ids_N.unique()))
    vectors = torch.randn(len(ids), 12, generator=torch.Generator().manual_seed(3))
    return ids, F.normalize(vectors, dim=1).half()


def whole_loss(dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, Any]:
    """What one process gets that holds everything: float64, autograd, all pairs written out."""
    whole, settings = whole_batch(dtype), dict(settings)
    q_BD, k_ND = (x.double().requires_grad_() for x in (whole.q_BD, whole.k_ND))
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
    owner_N = torch.where(is_positive(whole), -1, whole.query_N)
    contrastive = {k: settings[k] for k in ("prefixes", "prefix_weights", "margin", "symmetric")
                   if k in settings}  # fmt: skip
    output = infonce_reference(
        q_BD, k_ND, whole.positive_B, temperature=temperature, k_ids_N=whole.ids_N,
        own_negatives=owner_N if settings.get("own_negatives") else False, **contrastive,
    )  # fmt: skip
    loss, terms = output.loss, {}
    unit_q, unit_k = F.normalize(q_BD, dim=1), F.normalize(k_ND, dim=1)
    positives = unit_k[whole.positive_B]
    if "scores" in settings:
        terms["scores"] = kl_of_scores(whole, unit_q @ unit_k.T / temperature, *settings["scores"])
    if "spread_weight" in settings:
        for name, x in (("queries", unit_q), ("documents", positives)):
            others = (x @ x.T)[~torch.eye(16, dtype=torch.bool)]
            terms[f"spread_{name}"] = settings["spread_weight"] * others.square().mean()
    if "teacher" in settings:
        ids, vectors = teacher_vectors()
        order = [*whole.query_ids_B.tolist(), *whole.ids_N[whole.positive_B].tolist()]
        t = F.normalize(vectors[[ids.tolist().index(i) for i in order]].double(), dim=1)
        x = torch.cat((unit_q, positives))
        error = (x @ x.T - t @ t.T).square().mean()
        terms["teacher"] = settings.get("teacher_weight", 1.0) * error
    loss = loss + sum(terms.values())
    grads = torch.autograd.grad(loss, (q_BD, k_ND, temperature))
    return {
        "loss": loss.detach(), "loss_P": output.loss_P, "grad_q_BD": grads[0],
        "grad_k_ND": grads[1], "grad_temperature": grads[2],
        "num_masked": int(output.num_masked_B.sum()),
        "terms": {name: term.item() for name, term in terms.items()},
    }  # fmt: skip


def kl_of_scores(whole: Whole, logits_BN: Tensor, weight: float, temperature: float) -> Tensor:
    """Query by query."""
    parts = []
    for query in range(16):
        own = (whole.query_N == query) & whole.score_N.isfinite()
        if own.sum() < 2:
            continue
        teacher = (whole.score_N[own].double() / temperature).softmax(0)
        student = logits_BN[query, own].log_softmax(0)
        parts.append((teacher * (teacher.log() - student)).sum())
    assert 4 < len(parts) < 16
    return weight * torch.stack(parts).mean()


def cases(world: int, folder: Path) -> dict[str, tuple[dict[str, Any], list[tuple[Any, ...]]]]:
    """Settings and every rank's arguments; "no duplicates" for the gradient's scale."""
    result = {}
    for dtype in TOLERANCE:
        whole = whole_batch(dtype)
        settings_ids = {name: (x, whole.ids_N) for name, x in SETTINGS.items()}
        settings_ids["no duplicates"] = ({}, torch.arange(40))
        for name, (settings, ids_N) in settings_ids.items():
            there = {"teacher": str(folder / "teacher")} if "teacher" in settings else {}
            result[f"{name} {dtype}"] = (
                {"temperature": TEMPERATURE, **settings, **there},
                arguments(whole._replace(ids_N=ids_N), world),
            )
    return result


def arguments(whole: Whole, world: int) -> list[tuple[Any, ...]]:
    """For every rank: queries, documents in two parts, the parts' sizes on all ranks, targets."""
    dealt = shares(world)
    sizes = [len(share.columns_N) for share in dealt]
    part_sizes = [[n - n // 3 for n in sizes], [n // 3 for n in sizes]]
    order_M = torch.cat(
        [share.columns_N[: n - n // 3] for share, n in zip(dealt, sizes, strict=True)]
        + [share.columns_N[n - n // 3 :] for share, n in zip(dealt, sizes, strict=True)]
    )
    column_of_M = order_M.argsort()  # by number of the document
    result = []
    for rank, (rows, columns) in enumerate(dealt):
        row_of_query = torch.full((16,), -1)
        row_of_query[rows] = torch.arange(len(rows))
        targets = (
            column_of_M[whole.positive_B[rows]],
            whole.ids_N[order_M],
            whole.ids_N[order_M],
            row_of_query[whole.query_N[order_M]],
            is_positive(whole)[order_M],
            whole.score_N[order_M],
            whole.query_ids_B[rows],
            tuple(len(share.rows_B) for share in dealt),
        )
        first, second = part_sizes
        parts = whole.k_ND[columns].split([first[rank], second[rank]])
        result.append((whole.q_BD[rows], parts, part_sizes, targets))
    return result


@pytest.fixture(scope="module", params=SPLITS, ids=lambda world: f"{world}-ranks")
def outputs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Any]]]:
    """Every rank's output of every case."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    (folder / "teacher").mkdir()
    ids, vectors = teacher_vectors()
    order = ids.argsort()
    np.save(folder / "teacher" / "ids.npy", ids[order].numpy())
    np.save(folder / "teacher" / "vectors.npy", vectors[order].numpy())
    (folder / "teacher" / "manifest.json").write_text("{}")
    torch.save(cases(world, folder), folder / "cases.pt")
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
    more = "margin" in SETTINGS[name] or "own_negatives" in SETTINGS[name]
    assert want["num_masked"] > (by_id if more else 0)
    for rank, (rows_B, columns_N) in enumerate(shares(len(outputs))):
        got = outputs[rank][f"{name} {dtype}"]
        assert got["num_masked"] == want["num_masked"]
        assert got["grad_q_BD"].dtype == got["grad_k_ND"].dtype == dtype
        assert got["loss"] == pytest.approx(want["loss"].item(), rel=tolerance)
        assert got["loss_P"].shape == want["loss_P"].shape
        assert relative_error(got["loss_P"], want["loss_P"]) <= tolerance, rank
        assert got["terms"] == pytest.approx(want["terms"], rel=10 * tolerance)
        if SETTINGS[name].get("learned"):
            exact = want["grad_temperature"].item()
            assert got["grad_temperature"] == pytest.approx(exact, rel=10 * tolerance)
        else:
            assert got["grad_temperature"] == 0
        for key, numbers in (("grad_q_BD", rows_B), ("grad_k_ND", columns_N)):
            assert got[key].shape == (len(numbers), WIDTH)
            assert relative_error(got[key], want[key][numbers]) <= tolerance, (rank, key)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_rank_has_the_same_loss(outputs: list[dict[str, dict[str, Any]]], name: str) -> None:
    for dtype in TOLERANCE:
        first, *rest = (output[f"{name} {dtype}"] for output in outputs)
        for other in rest:
            assert other["loss"] == first["loss"]
            assert torch.equal(other["loss_P"], first["loss_P"])
            assert other["terms"] == first["terms"]
            assert other["grad_temperature"] == first["grad_temperature"]


def test_the_gradient_is_that_of_the_mean_over_the_global_batch(
    outputs: list[dict[str, dict[str, Any]]],
) -> None:
    """By hand: the sum of 16 cross-entropies over 16, whatever the split; by its rank's number of
    queries, or by the world, it would be another."""
    whole = whole_batch(torch.float64)
    q_BD, k_ND = whole.q_BD.requires_grad_(), whole.k_ND.requires_grad_()
    logits_BN = F.normalize(q_BD) @ F.normalize(k_ND).T / TEMPERATURE
    total = F.cross_entropy(logits_BN, whole.positive_B, reduction="sum")
    grads = torch.autograd.grad(total, (q_BD, k_ND))
    for output, share in zip(outputs, shares(len(outputs)), strict=True):
        got = output[f"no duplicates {torch.float64}"]
        assert got["num_masked"] == 0
        assert got["loss"] == pytest.approx(total.item() / 16, rel=1e-10)
        for key, grad, numbers in zip(("grad_q_BD", "grad_k_ND"), grads, share, strict=True):
            assert relative_error(got[key], grad[numbers] / 16) <= 1e-10
