"""A small world for the kinds that ask a language model."""

import json
from itertools import islice
from pathlib import Path

import pytest

from drama.augment.testing import served
from drama.data.lines import read_objects
from drama.testing import tiny_llama

SCIFACT = Path(__file__).parents[2] / "data" / "demo" / "scifact"
DOCUMENTS = 60


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
