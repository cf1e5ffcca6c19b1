"""Runs: what a system returned for each query, in memory and as TREC run files."""

from __future__ import annotations

from pathlib import Path

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


def write_run(run: Run, path: Path, tag: str) -> None:
    """Write a TREC run file: `query Q0 document rank score tag`, best first.

    Equal scores are ranked by document id, descending, as trec_eval ranks them.

    Raises:
        UserError: an id with white space, which the format cannot hold.
    """
    lines = []
    for query_id, scores in run.items():
        for id_ in (query_id, *scores):
            if len(id_.split()) != 1:
                raise UserError(f"the id {id_!r} cannot stand in a TREC run: it holds white space")
        ranked = sorted(scores.items(), key=lambda item: (item[1], item[0]), reverse=True)
        lines += [
            f"{query_id} Q0 {document_id} {rank} {score!r} {tag}\n"
            for rank, (document_id, score) in enumerate(ranked, 1)
        ]
    with replacing(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
