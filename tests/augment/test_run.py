"""A whole augmentation against a real server: the mix, the price told before, kills, budgets."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from drama.augment.cache import Cache, Totals
from drama.augment.corpus import Corpus
from drama.augment.recipe import AugmentRecipe
from drama.augment.run import augment, show_plan
from drama.augment.testing import held_answers, served
from drama.cli import main
from drama.data.manifest import read_manifest
from drama.data.sources import read_source
from drama.errors import UserError

ROOT = Path(__file__).parents[2]
COUNTS = {"enweb": 20, "mwiki": 10, "mweb": 10}
CALLS = 2 * 40


@pytest.fixture(scope="module")
def texts(llm_world, tmp_path_factory):
    """Three corpora of 30, 15 and 15 documents."""
    folder = tmp_path_factory.mktemp("texts")
    lines = (llm_world / "c.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("enweb", lines[:30]), ("mwiki", lines[30:45]), ("mweb", lines[45:])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    return folder


def small(llm_world, texts, folder):
    """`recipe(url, "key=value", ...)`: a small recipe of the paper's mix, with its run in
    folder/RUN."""
    ranks = {"depth": 10, "positives": "1-3", "negatives": "6-10"}
    shares = {"enweb": 2, "mwiki": 1, "mweb": 1}
    tree = {
        "name": "small",
        "output": str(folder / "RUN"),
        "teacher": {"path": str(llm_world / "model")},
        "llm": {"model": "tiny", "concurrency": 4},
        "documents": 40,
        "corpora": {
            name: {"sources": [str(texts / f"{name}.jsonl")], "share": share}
            for name, share in shares.items()
        },
        "kinds": {
            "crops": ranks,
            "queries": ranks,
            "rerank": {"depth": 10, "negatives": "5-10", "window": 10, "step": 5},
        },
        "pairs": {"qa": {"source": str(llm_world / "pairs.jsonl")}},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(tree))  # which is YAML

    def load(url, *overrides):
        return AugmentRecipe.load(path, [f"llm.base_url={url}", *overrides])

    return load


@pytest.fixture
def recipe(llm_world, texts, tmp_path):
    return small(llm_world, texts, tmp_path)


@pytest.fixture(scope="module")
def whole(llm_world, texts, tmp_path_factory):
    """The files of a run that nothing stopped."""
    with served() as server:
        mix = small(llm_world, texts, tmp_path_factory.mktemp("whole"))(server.url)
        augment(mix)
    return files(mix.output)


def files(folder):
    """The bytes of all records and shards; the manifest has no time in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("records", "shards")
        for path in sorted((folder / part).glob("*"))
        if ".report." not in path.name
    }


def sent_tokens(calls):
    """Counted by hand: 4 bytes of the messages a token."""
    return sum(len(m["content"].encode()) for call in calls for m in call["messages"]) / 4


def is_rerank(call):
    return "in order by how well" in call["messages"][-1]["content"]


def test_the_papers_mix_at_the_price_that_was_told(recipe, server, tmp_path):
    mix = recipe(server.url)
    plan = show_plan(mix)
    assert not mix.output.exists()  # nothing is written
    assert server.calls == []
    rows = {row.name: row for row in plan.rows}
    assert [row.documents for row in plan.rows] == [20] * 3 + [10] * 6
    shards = augment(mix)

    # shares: of the documents, and of training
    for name, count in COUNTS.items():
        assert len(Corpus(mix.output / "work" / name / "corpus")) == count
    found = read_manifest(shards)
    kinds = ("crops", "queries", "rerank")
    counted = {f"{n}-{k}": count for n, count in COUNTS.items() for k in kinds}
    assert found.counts("source") == {**counted, "qa": 30}
    shares = {name: sum(found.weights[f"{name}-{kind}"] for kind in kinds) for name in COUNTS}
    assert shares == pytest.approx({"enweb": 2, "mwiki": 1, "mweb": 1})
    assert found.weights["qa"] / sum(found.weights.values()) == pytest.approx(30 / 150)
    assert len({found.weights[f"mwiki-{kind}"] for kind in kinds}) == 1

    # rerank takes the queries that the model wrote
    for name in COUNTS:
        asked = [list(read_source(mix.output / "records" / f"{name}-{k}.jsonl.gz")) for k in kinds]
        assert [r.query for r in asked[1]] == [r.query for r in asked[2]]
        assert all(len(record.positives) == 1 for record in asked[2])
        assert {record.query_id.split(":")[0] for record in asked[0]} == {"crop"}

    page = (mix.output / "augment.html").read_text()
    assert all(f"{name}-rerank" in page for name in COUNTS)

    # the price
    assert sum(row.calls for row in plan.rows) == len(server.calls) == CALLS
    for kind, calls in (
        ("queries", [call for call in server.calls if not is_rerank(call)]),
        ("rerank", [call for call in server.calls if is_rerank(call)]),
    ):
        told = sum(rows[f"{name}-{kind}"].prompt_tokens for name in COUNTS)
        assert told == pytest.approx(sent_tokens(calls), rel=0.04)
    assert max(server.paid.values()) == 1

    # once it is paid, the server's own counts stand there
    after = show_plan(mix)
    assert [row.measured for row in after.rows] == [0, 20, 20] + [0, 10, 10] * 2
    assert sum(row.prompt_tokens for row in after.rows) == 7 * CALLS
    assert sum(row.completion_tokens for row in after.rows) == 3 * CALLS
    assert after.paid == Totals(CALLS, 7 * CALLS, 3 * CALLS)
    assert after.calls_left == 0


def test_a_finished_run_does_nothing_more(recipe, tmp_path):
    with served() as server:
        mix = recipe(server.url, "kinds.rerank=null")
        augment(mix)
    paths = [path for path in mix.output.rglob("*") if path.is_file() and path.name != ".lock"]
    drawn = ("answers.sqlite", "augment.html", "augment.json")  # the page is drawn every time
    paths = [path for path in paths if not path.name.startswith(drawn)]
    times = {path: path.stat().st_mtime_ns for path in paths}
    augment(mix)  # the server is gone
    assert {path: path.stat().st_mtime_ns for path in paths} == times
    # records that come anew are packed anew
    out = mix.output / "records" / "mwiki-crops.jsonl.gz"
    out.unlink()
    augment(recipe(server.url, "kinds.rerank=null"))
    assert out.exists()
    manifest = mix.output / "shards" / "manifest.json"
    assert manifest.stat().st_mtime_ns > times[manifest]


def test_killed_and_gone_on_to_the_same_bytes(recipe, whole, server, tmp_path):
    recipe(server.url)  # is written to its file
    command = [sys.executable, "-P", "-m", "drama.cli", "augment", "run", "--recipe",
               str(tmp_path / "recipe.yaml"), "--set", f"llm.base_url={server.url}"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(server.calls) < 30 and time.monotonic() < end:  # half of a rerank
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "RUN" / "shards").exists()
    held, sent = held_answers(tmp_path / "RUN" / "answers.sqlite"), len(server.calls)
    assert 20 < held < CALLS
    augment(recipe(server.url))
    assert len(server.calls) - sent == CALLS - held  # nothing that was kept is asked again
    assert files(tmp_path / "RUN") == whole


def test_a_budget_ends_the_run_and_the_same_command_goes_on(recipe, whole, server, tmp_path):
    first = recipe(server.url, "llm.max_tokens_total=0")
    with pytest.raises(UserError, match="enweb-queries not complete; the same command goes on"):
        augment(first)
    assert server.calls == []
    records = tmp_path / "RUN" / "records"
    assert {path.name for path in records.glob("*.gz")} == {f"{n}-crops.jsonl.gz" for n in COUNTS}
    limited = recipe(server.url, "llm.max_tokens_total=450")
    starts = 0
    while True:
        starts += 1
        before = len(server.calls)
        try:
            augment(limited)
            break
        except UserError as error:
            spent = 10 * (len(server.calls) - before)
            text = str(error)
            assert text.startswith(
                f"llm.max_tokens_total 450 is spent ({spent} tokens were paid) and "
            )
            assert 450 <= spent < 450 + 4 * 10  # and what was in flight
    assert starts == 2
    assert len(server.calls) == CALLS
    assert max(server.paid.values()) == 1
    assert files(tmp_path / "RUN") == whole


def test_pairs_with_mined_negatives_triplets_and_shares(recipe, server, llm_world):
    source = llm_world / "pairs.jsonl"
    mix = recipe(
        server.url,
        "kinds={queries: null, rerank: null, triplets: {number: 25}, crops: {depth: 9, "
        "positives: 1-2, negatives: 5-9}}",
        f"pairs={{qa: {{source: {source}, share: 8}}, hard: {{source: {source}, mine: "
        "{depth: 12, negatives: 1-6, positive_aware: null}}}",
        "llm.prices={prompt_per_million: 1000000, completion_per_million: 2000000}",
    )  # fmt: skip
    plan = show_plan(mix)
    triplets = plan.rows[-1]
    assert (triplets.name, triplets.documents, triplets.calls) == ("triplets", 25, 27)
    told = [part for part in plan.parts() if isinstance(part, str)]
    cost = triplets.prompt_tokens + 2 * triplets.completion_tokens
    assert any(f"together {cost:,.2f}" in line for line in told)
    found = read_manifest(augment(mix))
    assert len(server.calls) == 27
    assert triplets.prompt_tokens == pytest.approx(sent_tokens(server.calls), rel=0.1)
    counts = found.counts("source")
    assert counts["triplets"] == 25
    assert counts["hard"] == counts["qa"] == 30
    assert found.weights["qa"] == 8
    assert found.weights["enweb-crops"] == 2
    assert found.weights["hard"] / found.weights["enweb-crops"] == pytest.approx(30 / 20)
    mined = list(read_source(mix.output / "records" / "hard.jsonl.gz"))
    assert all(record.negatives for record in mined)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("corpora.mweb.sources=gone.jsonl", "corpora.mweb: gone.jsonl does not exist"),
        ("corpora.mweb.sources=[{pairs}, {bad}]", "bad.jsonl:2: "),
        ("documents=100", "enweb.jsonl: 50 documents are to be drawn, but there are 30; draw"),
        ("teacher.path={texts}", "teacher.path {texts} is no model folder"),
        ("corpora.mweb.teacher=gone", "corpora.mweb.teacher gone is no model folder"),
        ("pairs.qa.source={texts}/mweb.jsonl", "pairs.qa: {texts}/mweb.jsonl:1: a text without"),
        ("pairs.qa.source={bad}", "pairs.qa: {bad}:1: a text without a query"),
        ("pairs.qa.mine={corpus: gone}", "pairs.qa.mine.corpus: "),
        ("pairs.qa.mine={corpus: [gone]}", "pairs.qa.mine: gone does not exist"),
        ("kinds.queries.prompt=gone.yaml", "prompt gone.yaml does not exist"),
        ("kinds.triplets={number: 1, tasks_prompt: gone.yaml}", "prompt gone.yaml does not"),
        ("llm.extra={model: x}", "LLM: model cannot be set as an extra field"),
        ("llm.base_url=http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1 cannot be reached"),
        ("llm.tokenizer=gone", "gone: no tokenizer (tokenizer.json is missing)"),
        ("shards.decontaminate=[{texts}]", "shards.decontaminate: {texts} is no BEIR folder"),
        ("shards.tokenizer=gone", "gone: no tokenizer"),
    ],
)
def test_a_part_that_cannot_be_is_refused_before_anything_is_paid(
    recipe, server, llm_world, texts, tmp_path, override, message
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "sound"}\n{"text": 3}\n')
    names = {"{texts}": texts, "{bad}": bad, "{pairs}": llm_world / "pairs.jsonl"}
    for name, path in names.items():
        override, message = override.replace(name, str(path)), message.replace(name, str(path))
    with pytest.raises(UserError) as caught:
        augment(recipe(server.url, override))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.calls == []
    assert not (tmp_path / "RUN" / "records").exists()
    assert not (tmp_path / "RUN" / "recipe.yaml").exists()  # so that the recipe can be mended


def test_a_begun_run_keeps_its_recipe(recipe, server, tmp_path):
    sets = ("kinds={queries: null, rerank: null, crops: {depth: 6, positives: 1-2, "
            "negatives: 5-6}}",)  # fmt: skip
    augment(recipe(server.url, *sets))
    with pytest.raises(UserError, match=r"RUN holds a run with kinds.crops.depth = 6, the recipe"):
        show_plan(recipe(server.url, *sets, "kinds.crops.depth=7"))
    with pytest.raises(UserError, match=r"holds a run with corpora\.new\.sources = None"):
        augment(recipe(server.url, *sets, "corpora.new={sources: [x]}"))
    with pytest.raises(UserError, match="documents = 40, the recipe says 20"):
        augment(recipe(server.url, *sets, "documents=20"))
    augment(recipe("http://elsewhere/v1", *sets, "llm.concurrency=1", "llm.max_tokens_total=5"))


def test_the_tokenizer_counts(recipe, server, llm_world):
    from transformers import AutoTokenizer

    mix = recipe(server.url, f"llm.tokenizer={llm_world / 'model'}", "kinds.rerank=null")
    plan = show_plan(mix)
    augment(mix)
    tokenizer = AutoTokenizer.from_pretrained(llm_world / "model")
    sent = [
        tokenizer.encode("\n".join(m["content"] for m in call["messages"]),
                         add_special_tokens=False)
        for call in server.calls
    ]  # fmt: skip
    told = sum(row.prompt_tokens for row in plan.rows)
    assert told == pytest.approx(sum(map(len, sent)), rel=0.02)


def test_the_command_line(recipe, server, tmp_path):
    recipe(server.url)
    arguments = ["augment", "run", "--recipe", str(tmp_path / "recipe.yaml")]
    arguments += ["--set", f"llm.base_url={server.url}"]
    shown = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert shown.exit_code == 0, (shown.stderr, shown.exception)
    told = " ".join(shown.stderr.split())
    assert "enweb-rerank" in told
    assert "counted at 4 bytes each" in told
    assert not (tmp_path / "RUN").exists()
    dead = [*arguments[:-1], "llm.base_url=http://127.0.0.1:9/v1"]
    shown = CliRunner().invoke(main, [*dead, "--dry-run"])
    assert shown.exit_code == 0
    assert "the run will: http://127.0.0.1:9/v1 cannot be reached" in " ".join(shown.stderr.split())
    refused = CliRunner().invoke(main, dead)
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1].startswith("drama: error: http://127.0.0.1:9/v1 cannot")
    spent = CliRunner().invoke(main, [*arguments, "--set", "llm.max_tokens_total=50"])
    assert spent.exit_code == 2
    assert "llm.max_tokens_total 50 is spent" in spent.stderr.splitlines()[-1]
    again = CliRunner().invoke(main, [*arguments, "--dry-run"])
    cache = Cache(tmp_path / "RUN" / "answers.sqlite")
    held = len(cache)
    cache.close()
    assert f"paid already: {held} answers" in " ".join(again.stderr.split())
    assert f"left: {CALLS - held} calls" in " ".join(again.stderr.split())
    help_text = CliRunner().invoke(main, ["augment", "run", "--help"]).stdout
    assert "recipes/augment-drama.yaml --dry-run" in help_text
