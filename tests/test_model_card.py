"""The card is what Hugging Face reads as one, and says what the run and the evaluation say."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from drama.encoder import Encoder
from drama.errors import UserError
from drama.export import export
from drama.export_source import export_source
from drama.folder import RetrieverSettings
from drama.model_card import Evaluation
from drama.retrieve.evaluate import evaluate
from drama.run_facts import run_facts
from drama.testing import tiny_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("card") / "source")


@pytest.fixture(scope="module")
def encoder(source):
    settings = RetrieverSettings(matryoshka_dims=(16, 64), query_prefix='Say "why": | ')
    return Encoder.from_pretrained(source, settings=settings)


@pytest.fixture
def run(tmp_path, encoder):
    """A run folder as training leaves it, by hand: figures that can be added up."""
    folder = tmp_path / "run"
    export(encoder, folder / "model")
    (tmp_path / "backbone").mkdir()
    facts = {
        "model": "/somewhere/SmolLM2-135M",
        "source": {"layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "ffn": 1536},
        "target": {"layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96},
    }
    (tmp_path / "backbone" / "pruning.json").write_text(json.dumps(facts))
    recipe = {
        "name": "by-hand",
        "output": str(folder),
        "model": {"path": str(tmp_path / "backbone")},
        "data": {"shards": ["s3://bucket/shards", str(tmp_path / "gone")], "lanes": 8},
        "train": {"batch_size": 32, "steps": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = [
        {"step": step, "tokens": 1000, "pairs": 32, "seconds": 900.0, "loss": 4.0 - step}
        for step in range(4)
    ]
    lines[3]["evaluation"] = {"loss": 1.25, "ndcg@10 scifact": 0.5, "ndcg@10": 0.5}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 4, "tok')  # a kill cut the last one
    return folder


def results(card):
    return [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results or []]


def test_without_a_run(encoder, tmp_path):
    card = ModelCard.load(export(encoder, tmp_path / "out") / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "sentence-similarity"
    assert results(card) == []
    assert "## Training" not in card.text
    assert "| dimensions | 64; trained to be cut to 16, 64 |" in card.text
    assert '| query prompt | `Say "why": \\| ` |' in card.text


def test_the_code_of_the_card_gives_our_embeddings(source, tmp_path):
    """All three ways, as they are written, for both poolings and a cut."""
    for pooling, dim in (("last", None), ("mean", 16)):
        settings = RetrieverSettings(pooling=pooling, matryoshka_dims=(16, 64), query_prefix="Q: ")
        one = Encoder.from_pretrained(source, settings=settings)
        folder = export(one, tmp_path / pooling, dim=dim)
        text = (folder / "README.md").read_text().replace("path/to/this/folder", str(folder))
        blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
        assert len(blocks) == 3
        want_BD = one.encode(["how do vaccines work"], "query", dim=dim)
        for block in blocks:
            scope = {}
            exec(block, scope)
            got_BD = scope.get("vectors", scope.get("queries"))
            assert got_BD.shape == want_BD.shape
            np.testing.assert_allclose(np.asarray(got_BD), want_BD, atol=1e-5)


def test_of_a_run(run, tmp_path):
    folder = export_source(run, tmp_path / "out")
    card = ModelCard.load(folder / "README.md")
    assert results(card) == [("scifact", "ndcg_at_10", 0.5)]
    for row in (
        "| steps | 4 |", "| tokens | 4,000 |", "| queries | 128 |", "| loss at the end | 1.0000 |",
        "| hours of steps | 1.00 |", "| cut from | SmolLM2-135M |", "| ndcg@10 scifact | 0.5000 |",
        "| parent's shape | layers 30, hidden 576, heads 9, kv_heads 3, ffn 1536 |",
    ):  # fmt: skip
        assert row in card.text, row
    assert "Shards: shards, gone." in card.text
    recipe = card.text.split("````yaml\n")[1].split("````")[0]
    assert yaml.safe_load(recipe)["name"] == "by-hand"


def test_up_to_a_step(run):
    facts = run_facts(run, 2)
    assert (facts.steps, facts.tokens, facts.evaluation) == (2, 2000, {})


def test_figures_of_an_evaluation(run, tmp_path, encoder):
    """A real one, with a baseline: only this model's figures are in the index."""
    data = tmp_path / "tiny-set"
    (data / "qrels").mkdir(parents=True)
    words = ("bees make honey", "iron rusts in rain", "cats sleep all day")
    (data / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{n}", "text": w}) + "\n" for n, w in enumerate(words))
    )
    (data / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "honey"}) + "\n")
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td0\t1\n")
    systems = {"ours": str(run / "model"), "bm25": "bm25"}
    evaluate(data, systems, out=tmp_path / "evaluation")
    folder = export_source(run, tmp_path / "out", evaluation=tmp_path / "evaluation")
    card = ModelCard.load(folder / "README.md")
    judged = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    want = judged["datasets"]["tiny-set"]["systems"]["ours"]["metrics"]["nDCG@10"]
    assert ("tiny-set", "ndcg_at_10", round(want, 5)) in results(card)
    assert "**ours** (this model)" in card.text
    assert "| bm25 | 1.0000 |" in card.text


def test_an_evaluation_that_is_none(tmp_path):
    for name, content in (("no.json", "{"), ("list.json", "[]"), ("other.json", '{"systems": 3}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name}: no evaluation.json of `drama evaluate`"):
            Evaluation.read(tmp_path / name)


def test_facts_are_plain(run):
    json.dumps(asdict(run_facts(run)))
