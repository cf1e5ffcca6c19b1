"""Runs: what a system returned for each query, in memory and as TREC run files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from drama.data.lines import read_lines
from drama.errors import UserError
from drama.files import replacing

Run = dict[str, dict[str, float]]  # query id -> document id -> score


def without_queries(run: Run, depth: int) -> Run:
    """The first `depth` documents of each query but the one with the query's own id.

    In some data sets (ArguAna, Quora) queries are documents too, and each would find itself first;
    BEIR leaves them out as well.
    """
    return {
        query_id: dict(
            sorted(
                ((id_, score) for id_, score in scores.items() if id_ != query_id),
                key=lambda item: (item[1], item[0]),
                reverse=True,
            )[:depth]
        )
        for query_id, scores in run.items()
    }


def check_ids(ids: Iterable[str], where: str | Path) -> None:
    """Refuse ids that a TREC run file cannot hold.

    Raises:
        UserError: an id that is empty or holds white space.
    """
    for id_ in ids:
        if len(id_.split()) != 1:
            raise UserError(
                f"{where}: the id {id_!r} cannot stand in a TREC run: it is empty or holds white "
                "space; rename it"
            )


def write_run(run: Run, path: Path, tag: str) -> None:
    """Write a TREC run file: `query Q0 document rank score tag`, best first.

    Equal scores are ranked by document id, descending, as trec_eval ranks them.

    Raises:
        UserError: an id with white space, which the format cannot hold.
    """
    lines = []
    for query_id, scores in run.items():
        check_ids((query_id, *scores), path)
        ranked = sorted(scores.items(), key=lambda item: (item[1], item[0]), reverse=True)
        lines += [
            f"{query_id} Q0 {document_id} {rank} {score!r} {tag}\n"
            for rank, (document_id, score) in enumerate(ranked, 1)
        ]
    with replacing(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def read_run(path: str | Path) -> Run:
    """Read a TREC run file, plain or packed: `query Q0 document rank score tag`.

    The ranking is by score, as trec_eval takes it; ranks are not looked at.

    Raises:
        UserError: a line of another form, a score that is no number, or a document that a query
            has twice.
    """
    run: Run = {}
    for number, line in read_lines(path):
        columns = line.split()
        if len(columns) != 6:
            raise UserError(
                f"{path}:{number}: {len(columns)} columns, expected query, Q0, document, rank, "
                "score, tag"
            )
        query_id, _, document_id, _, score, _ = columns
        found = run.setdefault(query_id, {})
        if document_id in found:
            raise UserError(
                f"{path}:{number}: query '{query_id}' has document '{document_id}' twice"
            )
        try:
            found[document_id] = float(score)
        except ValueError:
            raise UserError(f"{path}:{number}: score '{score}' is not a number") from None
        if math.isnan(found[document_id]):
            raise UserError(f"{path}:{number}: the score is NaN")
    if not run:
        raise UserError(f"{path} holds no rankings")
    return run
