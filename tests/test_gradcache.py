"""The proof of the core: the cached, chunked, sharded gradient is the whole batch's gradient."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from drama import gradcache
from drama.gradcache import _GraphRoom
from drama.kernels.infonce_reference import infonce_reference
from drama.testing import run_deepspeed, tiny_llama

WORKER = Path(__file__).parent / "workers" / "zero_gradients.py"
PREFIXES, WEIGHTS, TEMPERATURE = [16, 32, 64], [0.5, 1.0, 2.0], 0.05


def random_ranks(num_queries: list[int], negatives: list[int]) -> list[dict]:
    """Ragged token rows for every rank; some documents appear twice, as false negatives do."""
    generator = random.Random(0)

    def row(shortest: int, longest: int) -> list[int]:
        return [
            generator.randrange(3, 259) for _ in range(generator.randint(shortest, longest))
        ] + [2]

    shared = [row(5, 60) for _ in range(3)]
    ranks = []
    for count, extra in zip(num_queries, negatives, strict=True):
        queries = [row(2, 12) for _ in range(count)]
        documents, ids = [], []
        for number in range(count + extra):
            if number % 4 == 1:  # a document that other ranks also hold
                which = generator.randrange(len(shared))
                documents.append(shared[which])
                ids.append(which)
            else:
                documents.append(row(5, 60))
                ids.append(generator.getrandbits(62) + 10)
        ranks.append({"rows": queries + documents, "num_queries": count, "document_ids": ids})
    return ranks


def whole_batch_gradient(model_path: Path, ranks: list[dict], attention: str, pooling: str):
    """One process, float64, Hugging Face's own padded forward, plain autograd."""
    model = AutoModel.from_pretrained(model_path, dtype=torch.float64, attn_implementation="eager")
    model.config.is_causal = attention == "causal"

    def vectors(rows: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, rows))
        ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        if pooling == "mean":
            return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return states[torch.arange(len(rows)), mask.sum(1) - 1]

    queries = [row for rank in ranks for row in rank["rows"][: rank["num_queries"]]]
    documents, ids, positive = [], [], []
    for rank in ranks:
        positive += [len(documents) + i for i in range(rank["num_queries"])]
        documents += rank["rows"][rank["num_queries"] :]
        ids += rank["document_ids"]
    loss = infonce_reference(
        vectors(queries),
        vectors(documents),
        torch.tensor(positive),
        temperature=TEMPERATURE,
        prefixes=PREFIXES,
        prefix_weights=WEIGHTS,
        k_ids_N=torch.tensor(ids),
    ).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("attention", "pooling", "num_queries", "precision"),
    [
        ("bidirectional", "last", [6, 9], "fp32"),
        ("causal", "last", [6, 9], "fp32"),
        pytest.param("causal", "mean", [12, 1], "fp32", marks=pytest.mark.slow),
        ("bidirectional", "last", [6, 9], "bf16"),
    ],
    ids=["bidirectional-last", "causal-last", "causal-mean-one-rank-nearly-empty", "bf16"],
)
def test_gradients_under_zero_0_to_3_equal_the_whole_batch(
    tmp_path, attention, pooling, num_queries, precision
):
    """Two gloo ranks under DeepSpeed's launcher; uneven shares, hard negatives, false negatives."""
    model = tiny_llama(tmp_path / "model")
    ranks = random_ranks(num_queries, negatives=[11, 0])
    loss, gradients = whole_batch_gradient(model, ranks, attention, pooling)
    save_file(gradients, tmp_path / "gradients.safetensors")
    task = {
        "ranks": ranks,
        "attention": attention,
        "pooling": pooling,
        "temperature": TEMPERATURE,
        "prefixes": PREFIXES,
        "weights": WEIGHTS,
        "token_budget": 96,
        "precision": precision,
    }
    (tmp_path / "batch.json").write_text(json.dumps(task))

    done = run_deepspeed(WORKER, str(tmp_path))

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "errors.json").read_text())
    worst = {name: max(result["worst"] for name_, result in report.items() if name in name_)
             for name in ("ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")}  # fmt: skip
    print(worst)
    assert len(report) == 4 * 10
    for name, result in report.items():
        assert result["num_chunks"] >= 4, "the batch must be cut, or nothing is proved"
        kept = 0 if "no graph" in name or "all off" in name else 2
        kept = result["num_chunks"] if "every graph" in name else kept
        kept = 0 if name == "ZeRO 3, reduced chunk by chunk" else kept
        assert result["num_kept"] == kept, name
        assert result["num_masked"] > 0, "false negatives must occur, or the mask is not proved"
        if precision == "fp32":
            assert abs(result["loss"] - loss) < 1e-5 * abs(loss)
            assert result["worst"] < 1e-5, f"{name}: {result['errors']}"
        else:  # weights and states have 8 bits; a lost chunk or a wrong scale is far beyond this
            assert abs(result["loss"] - loss) < 0.05 * abs(loss)
            assert result["whole"] < 0.1, f"{name}: {result['errors']}"


def test_graphs_that_fit_are_all_kept(monkeypatch):
    """The first step holds one graph at a time, and that is no part of what every step needs."""
    room = _GraphRoom(torch.device("cpu"), "auto")
    monkeypatch.setattr(gradcache, "spare_bytes", lambda device: 570)
    assert room.count(10) == 0, "nothing is known yet"
    room.count_graph(100, 10)
    room.learn(peak_bytes=150, loss_bytes=40, num_kept=0, num_tokens=10)  # a graph and 50 besides
    assert room.count(10) == 2, "half of what fits, while it measures"
    room.learn(peak_bytes=2 * 104 + 50, loss_bytes=258, num_kept=2, num_tokens=10)
    assert room.count(10) == 5
    assert room.count(5) == 10, "graphs of smaller chunks"

    room = _GraphRoom(torch.device("cpu"), "auto")
    room.count_graph(100, 10)
    room.learn(peak_bytes=380, loss_bytes=380, num_kept=0, num_tokens=10)
    assert room.base_bytes == 380, "no graph was alive in a loss that takes more than the replay"
