"""A small world for the kinds that ask a language model."""

import json
from itertools import islice
from pathlib import Path

import pytest
from click.testing import CliRunner

from drama.augment.testing import served
from drama.cli import main
from drama.data.lines import read_objects
from drama.testing import tiny_llama

SCIFACT = Path(__file__).parents[2] / "data" / "demo" / "scifact"
DOCUMENTS = 60


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def drama():
    """Runs a command of ours in this process."""
    return run


@pytest.fixture(scope="session")
def said():
    """What a command that ends well writes for people, on one line."""

    def call(*arguments):
        result = run(*arguments)
        assert result.exit_code == 0, (result.stderr, result.exception)
        return " ".join(result.stderr.split())

    return call


@pytest.fixture(scope="session")
def refused():
    """The one line of an error, of a command that ends with exit code 2."""

    def call(*arguments):
        result = run(*arguments)
        assert result.exit_code == 2, (result.stderr, result.exception)
        assert "Traceback" not in result.stderr
        return result.stderr.splitlines()[-1]

    return call


@pytest.fixture
def server():
    """Answers as a model would, late and out of order."""
    with served(delay_s=lambda call: 0.002 * (len(call.prompt) % 5)) as running:
        yield running


@pytest.fixture(scope="session")
def llm_world(tmp_path_factory):
    """A folder with a tiny teacher, `c.jsonl` (a corpus), and `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("llm")
    tiny_llama(folder / "model", num_hidden_layers=1)
    corpus = read_objects(SCIFACT / "corpus.jsonl.gz")
    rows = [{**row, "text": row["text"][:300]} for _, row in islice(corpus, DOCUMENTS)]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {
            "query": f"what does thing {n} do?",
            "positives": [{"id": f"p{n}", "text": f"Thing {n} makes honey."}],
            "negatives": [
                {"id": f"n{n}-{k}", "text": f"Other {k} of {n}, {'in truth' if k == n % 7 else ''}"}
                for k in range(3 * (n % 10))
            ],
            "lang": "en",
        }
        for n in range(30)
    ]
    for pair in pairs:
        documents = (*pair["positives"], *pair["negatives"])
        pair["scores"] = {document["id"]: 0.5 for document in documents}
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture
def commands(commands_in, tmp_path):
    return commands_in(tmp_path)


@pytest.fixture
def cache(tmp_path):
    """Where a client keeps its answers."""
    return tmp_path / "answers.sqlite"


@pytest.fixture(scope="session")
def commands_in(llm_world):
    """The arguments of each kind but for the server, for a folder that shall have the outputs."""

    def arguments(folder):
        teacher = ("--teacher", llm_world / "model", "--work", folder / "work")
        ranks = ("--depth", 20, "--positives", "1-3", "--negatives", "10-20")
        corpus = llm_world / "c.jsonl"
        queries = folder / "queries.jsonl.gz"
        reranked = folder / "rerank.jsonl.zst"
        triplets = folder / "triplets.jsonl"
        relabelled = folder / "relabel.jsonl.xz"
        given = {
            "queries": (f"sci={corpus}", *teacher, *ranks, "--out", queries),
            "rerank": (queries, "--corpus", f"sci={corpus}", *teacher, "--out", reranked),
            "triplets": ("--number", 30, "--languages", "en", "--out", triplets),
            "relabel": (llm_world / "pairs.jsonl", "--out", relabelled, "--found", "drop"),
        }
        return {kind: ("augment", kind, *rest, "--model", "tiny") for kind, rest in given.items()}

    return arguments
