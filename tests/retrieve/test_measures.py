from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import pytrec_eval

from drama.errors import UserError
from drama.retrieve.measures import METRICS, check_metrics, cutoff, score

TREC_NAMES = {
    "nDCG@10": "ndcg_cut_10",
    "nDCG@100": "ndcg_cut_100",
    "Recall@10": "recall_10",
    "Recall@100": "recall_100",
    "MAP@100": "map_cut_100",
}


def random_case(seed: int) -> tuple[dict, dict]:
    """Graded judgements, ties, documents that nobody judged, and queries that the run lacks."""
    chance = random.Random(seed)
    documents = [f"d{i}" for i in range(300)]
    queries = [f"q{i}" for i in range(40)]
    qrels = {q: {d: chance.randint(0, 3) for d in chance.sample(documents, 12)} for q in queries}
    qrels["q7"] = dict.fromkeys(qrels["q7"], 0)  # nothing relevant
    # scores of one digit: many ties; sixteenths are exact in single precision, as trec_eval's are
    run = {
        q: {d: chance.randint(0, 15) / 16 for d in chance.sample(documents, 150)}
        for q in queries
        if q not in ("q3", "q11")
    }
    run["q5"] = {"d1": 0.5}
    return qrels, run


def ranked(run: dict[str, float]) -> list[str]:
    return sorted(run, key=lambda document: (run[document], document), reverse=True)


def ndcg_by_hand(grades: dict[str, int], run: dict[str, float], k: int) -> float:
    gains = np.array([max(0, grades.get(d, 0)) for d in ranked(run)[:k]], float)
    ideal = np.sort([max(0, g) for g in grades.values()])[::-1][:k]
    discounts = np.log2(np.arange(2, k + 2))
    best = (ideal / discounts[: len(ideal)]).sum()
    return float((gains / discounts[: len(gains)]).sum() / best) if best else 0.0


def map_by_hand(grades: dict[str, int], run: dict[str, float], k: int) -> float:
    relevant = sum(grade > 0 for grade in grades.values())
    hits = np.array([grades.get(d, 0) > 0 for d in ranked(run)[:k]], float)
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / relevant) if relevant else 0.0


def recall_by_hand(grades: dict[str, int], run: dict[str, float], k: int) -> float:
    relevant = {d for d, grade in grades.items() if grade > 0}
    return len(relevant & set(ranked(run)[:k])) / len(relevant) if relevant else 0.0


def mrr_by_hand(grades: dict[str, int], run: dict[str, float], k: int) -> float:
    ranks = [r for r, d in enumerate(ranked(run)[:k], 1) if grades.get(d, 0) > 0]
    return 1 / ranks[0] if ranks else 0.0


BY_HAND: dict[str, Callable] = {
    "nDCG": ndcg_by_hand, "MAP": map_by_hand, "Recall": recall_by_hand, "MRR": mrr_by_hand,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_every_metric_equals_pytrec_eval(seed: int):
    qrels, run = random_case(seed)
    reference = pytrec_eval.RelevanceEvaluator(qrels, set(TREC_NAMES.values())).evaluate(run)
    found = score(qrels, run, list(TREC_NAMES))
    for metric, name in TREC_NAMES.items():
        assert list(found[metric]) == list(qrels)
        for query in qrels:
            expected = reference[query][name] if query in reference else 0.0
            assert found[metric][query] == expected, (metric, query)


@pytest.mark.parametrize("metric", [*METRICS, "nDCG@3", "MRR@1", "MRR@3", "MAP@5", "Recall@1"])
def test_every_metric_equals_its_definition(metric: str):
    qrels, run = random_case(5)
    found = score(qrels, run, [metric])[metric]
    by_hand = BY_HAND[metric.partition("@")[0]]
    expected = {q: by_hand(qrels[q], run.get(q, {}), cutoff(metric)) for q in qrels}
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(set(expected.values())) > 1


def test_a_case_done_by_hand():
    qrels = {"a": {"x": 2, "y": 1, "z": 0}, "b": {"w": 1}, "c": {"v": 1}}
    ranking = {f"n{i}": 1.0 - i / 100 for i in range(20)}
    run = {"a": {"z": 3.0, "y": 2.0, "x": 1.0}, "b": ranking | {"w": 0.895}}
    found = score(qrels, run)
    log = math.log2
    ideal = 2 / log(2) + 1 / log(3)
    assert found["nDCG@10"] == pytest.approx(
        {"a": (1 / log(3) + 2 / log(4)) / ideal, "b": 0.0, "c": 0.0}
    )
    assert found["Recall@100"] == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert found["Recall@10"] == {"a": 1.0, "b": 0.0, "c": 0.0}
    assert found["MRR@10"] == {"a": 0.5, "b": 0.0, "c": 0.0}  # w stands at rank 12
    assert found["MAP@100"] == pytest.approx({"a": (1 / 2 + 2 / 3) / 2, "b": 1 / 12, "c": 0.0})


def test_an_empty_run_scores_nothing():
    assert score({"a": {"x": 1}}, {})["nDCG@10"] == {"a": 0.0}
    assert score({"a": {"x": 1}}, {"a": {}, "other": {"x": 1.0}})["MRR@10"] == {"a": 0.0}


def test_names_are_read_in_any_case_and_once():
    assert check_metrics(["ndcg@10", "RECALL@5", "nDCG@10"]) == ("nDCG@10", "Recall@5")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ndgc@10"], r"unknown metric 'ndgc@10' \(did you mean 'nDCG@10'\?\); there are nDCG@K"),
        (["nDCG"], "unknown metric 'nDCG'"),
        (["MAP@0"], "unknown metric 'MAP@0'"),
        (["Recall@1001"], "metric 'Recall@1001': the deepest rank is 1,000"),
        ([], "no metric; give one such as nDCG@10"),
    ],
)
def test_bad_metrics(names, message):
    with pytest.raises(UserError, match=message):
        check_metrics(names)
