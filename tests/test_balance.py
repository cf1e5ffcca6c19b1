"""Texts dealt out over the ranks: nothing lost, every positive found, the same load everywhere."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from drama.balance import Share, _same_documents, share_out
from drama.data.batches import RankBatch
from drama.data.packing import TokenRows, count_chunks
from drama.gather import Columns
from drama.kernels.infonce_reference import infonce_reference
from drama.loss import ContrastiveLoss

WORKER = Path(__file__).parent / "workers" / "share_ranks.py"


def read_by(rank: int) -> RankBatch:
    """What a rank reads: every query's first token names its positive's, ids too; the ranks'
    shares are uneven, and some texts are far longer."""
    generator = random.Random(rank)
    num_queries, num_documents = 9 + 4 * rank, 20 + 3 * rank

    def row(name: int) -> list[int]:
        return [name] + [7] * min(40, int(generator.paretovariate(1.1) * 3))

    names = [1000 * (rank + 1) + i for i in range(num_documents)]
    rows = [row(name) for name in names[:num_queries]] + [row(name) for name in names]
    owners = [generator.randrange(num_queries) for _ in range(num_documents - num_queries)]
    return RankBatch(
        TokenRows.of(rows),
        num_queries,
        torch.tensor(names),
        num_cut=0,
        query_ids=-torch.tensor(names[:num_queries]),
        negatives_of=torch.tensor(owners),
        scores=torch.tensor(names, dtype=torch.float64) / 7,
    )


def all_rows(batches: list[RankBatch]) -> list[list[int]]:
    return sorted(list(map(int, row)) for batch in batches for row in batch.rows)


@pytest.fixture(scope="module", params=[1, 3])
def world(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["dealt", "as read"])
def shares(
    request: pytest.FixtureRequest, world: int, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, list[Share]]:
    """Every rank's share, from real gloo ranks."""
    balance = bool(request.param)
    batches = [read_by(rank) for rank in range(world)]
    if world == 1:
        return balance, [share_out(batches[0], balance=balance, group=None)]
    folder = tmp_path_factory.mktemp("ranks")
    stored = [vars(batch) | {"rows": batch.rows.tolist()} for batch in batches]
    torch.save(stored, folder / "batches.pt")
    command = [sys.executable, str(WORKER), str(folder), str(world), str(int(balance))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return balance, [
        Share(**torch.load(folder / f"rank{rank}.pt", weights_only=False)) for rank in range(world)
    ]


def test_nothing_is_lost_or_doubled(world: int, shares: tuple[bool, list[Share]]) -> None:
    held = sorted(list(map(int, row)) for share in shares[1] for row in share.rows)
    assert held == all_rows([read_by(rank) for rank in range(world)])


def test_every_query_finds_its_positive(world: int, shares: tuple[bool, list[Share]]) -> None:
    """By way of the columns, as the loss does: documents of all ranks, sent in two parts."""
    everybody = shares[1]
    documents = [share.rows[share.num_queries :] for share in everybody]
    first = [len(rows) // 2 for rows in documents]
    parts = [first, [len(rows) - n for rows, n in zip(documents, first, strict=True)]]
    columns = [row for rows, n in zip(documents, first, strict=True) for row in rows[:n]]
    columns += [row for rows, n in zip(documents, first, strict=True) for row in rows[n:]]
    names = [row[0] for row in columns]
    # who read a document, and with which query, as it was made
    query_of = {
        name: int(batch.document_ids[owner])
        for batch in map(read_by, range(world))
        for name, owner in zip(
            batch.document_ids.tolist(),
            [*range(batch.num_queries), *batch.negatives_of.tolist()],
            strict=True,
        )
    }
    for share in everybody:
        targets = share.targets(parts)
        assert targets.ids_M.tolist() == names
        for query, column in zip(share.rows, targets.positive_B.tolist(), strict=False):
            assert columns[column][0] == query[0]
        own = [int(row[0]) for row in share.rows[: share.num_queries]]
        assert targets.query_ids_B.tolist() == [-name for name in own]
        assert targets.queries_of_ranks == tuple(s.num_queries for s in everybody)
        for name, row in zip(names, targets.query_M.tolist(), strict=True):
            assert row == (own.index(query_of[name]) if query_of[name] in own else -1)
        torch.testing.assert_close(targets.score_M, torch.tensor(names) / 7)
        positives = {name for name, query in query_of.items() if name == query}
        assert targets.is_positive_M.tolist() == [name in positives for name in names]


@pytest.mark.parametrize("symmetric", [False, True])
def test_positives_of_one_question_are_no_negatives_of_one_another(symmetric: bool) -> None:
    """Queries 0, 2 and 4 have one text, 3 shares a document with 4; document 5 is a hard negative
    of 1 and the positive of 0. Nothing but query 1 and its positive is anybody's negative."""
    documents = torch.tensor([50, 51, 52, 53, 53, 50])
    batch = RankBatch(
        TokenRows.of([[i + 1] for i in range(11)]), 5, documents, 0,
        query_ids=torch.tensor([7, 8, 7, 9, 7]),
        negatives_of=torch.tensor([1]),
        scores=torch.full((6,), torch.nan),
    )  # fmt: skip
    share = share_out(batch, balance=True, group=None)
    targets = share.targets([[6]])
    assert targets.ids_M.tolist() == documents.tolist()
    assert targets.same_M.tolist() == [50, 51, 50, 50, 50, 50]
    q_BD, k_MD = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    columns = Columns([[6]])
    columns.send(k_MD)
    output = ContrastiveLoss(0.1, symmetric=symmetric)(q_BD[:5], columns, targets)
    assert output.num_masked == 4 * 4  # of 5 others, all but the positive of query 1
    want = infonce_reference(
        q_BD[:5], k_MD, torch.arange(5), temperature=0.1, symmetric=symmetric,
        k_ids_N=torch.tensor([0, 1, 0, 0, 0, 0]),
    )  # fmt: skip
    assert output.loss == pytest.approx(want.loss.item(), rel=1e-5)


def test_chains_of_questions_and_documents_are_followed() -> None:
    ids = np.array([9, 8, 7, 6, 5, 4])
    queries = np.array([1, 1, 2, 2, 3, 3])  # 9-8, 8-7, 7-6
    same = _same_documents(ids, np.array([9, 8, 8, 7, 7, 6]), queries)
    assert same.tolist() == [6, 6, 6, 6, 5, 4]


def test_the_load_is_even(world: int, shares: tuple[bool, list[Share]]) -> None:
    balance, everybody = shares
    loads = [sum(map(len, share.rows)) for share in everybody]
    counts = [share.num_queries for share in everybody]
    longest = max(len(row) for share in everybody for row in share.rows)
    if world == 1:
        return
    if balance:
        assert max(counts) - min(counts) <= 1
        assert max(loads) - min(loads) <= 2 * longest  # one text of each kind
    else:
        assert counts == [read_by(rank).num_queries for rank in range(world)]
        assert max(loads) - min(loads) > 2 * longest, "else dealing would prove nothing"


def test_chunks_mix_queries_and_documents_by_length() -> None:
    rows = TokenRows.of([[1] * n for n in (9, 2, 5, 1, 7, 3)])
    batch = RankBatch(
        *(rows, 2, torch.arange(4), 0, torch.arange(2), torch.tensor([0, 1]), torch.zeros(4)),
    )
    share = share_out(batch, balance=True, group=None)
    assert [len(row) for row in share.rows] == [2, 9, 1, 3, 5, 7]
    num_chunks = count_chunks(share.lengths, token_budget=11)
    assert num_chunks == 3  # 1 2 3 5 | 7 | 9
    assert share.chunks(num_chunks) == [[2, 0, 3, 4], [5], [1]]
