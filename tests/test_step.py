"""The step as a whole: long documents, memory, and what a run says it computes with."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from drama import choices
from drama.data.records import Document, Record
from drama.data.sources import read_source
from drama.data.writer import write_shards
from drama.encoder import Encoder
from drama.errors import UserError
from drama.folder import RetrieverSettings
from drama.kernels.infonce_reference import infonce_reference
from drama.recipe import Recipe
from drama.testing import tiny_llama
from drama.tokenizer import TextEncoder, load_tokenizer

ROOT = Path(__file__).parents[1]
PAIRS = ROOT / "data" / "demo" / "pairs.jsonl.xz"
LONG = ROOT / "recipes" / "long-context.yaml"
WORKER = Path(__file__).parent / "workers" / "step_memory.py"
ROPE = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512}


def long_records() -> list[Record]:
    """Real texts: one document of more than 8,192 bytes, the others short; queries of forty."""
    records = list(islice(read_source(PAIRS), 60))
    book = " ".join(record.positives[0].text for record in records)
    assert len(book.encode()) > 8192
    short = [Document(record.positives[0].text[:200]) for record in records[:3]]
    documents = [Document(book), *short]
    return [
        Record(query=record.query[:39], positives=(document,), negatives=())
        for record, document in zip(records, documents, strict=False)
    ]


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "train.py"), *arguments],
        capture_output=True, text=True, timeout=300, check=False,
        env={**environment, "COLUMNS": "120"},
    )  # fmt: skip


def long_run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The shipped recipe on a tiny model that was made for 512 tokens."""
    settings = {
        "output": folder / "run", "model.path": folder / "backbone",
        "data.shards": f"[{folder / 'shards'}]", "data.lanes": 1, "data.max_query_tokens": 40,
        "loss.matryoshka_dims": "[32, 64]", "train.batch_size": 4, "train.steps": 1,
        "train.precision": "fp32", "train.token_budget": 8192,
    }  # fmt: skip
    pairs = [f"--set={key}={value}" for key, value in settings.items()]
    return train("--recipe", str(LONG), *pairs, *more)


@pytest.fixture(scope="module")
def long_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    tiny_llama(folder / "backbone", max_position_embeddings=512)
    write_shards(iter(long_records()), folder / "shards")
    return folder


def test_an_8192_token_document_beside_forty_token_queries(long_world: Path) -> None:
    """Against Hugging Face's own forward, text by text, with the same rotary positions."""
    rope = [f"--set=model.rope.{key}={value}" for key, value in ROPE.items()]
    done = long_run(long_world, *rope)
    assert done.returncode == 0, done.stderr[-3000:]
    line = json.loads((long_world / "run" / "metrics.jsonl").read_text())
    assert line["texts_cut"] >= 1
    assert line["tokens"] > 8192
    assert line["chunks"] >= 2

    model = AutoModel.from_pretrained(long_world / "backbone", attn_implementation="sdpa")
    model.config.is_causal = False
    model.config.rope_parameters = {**model.config.rope_parameters, **ROPE}
    model.rotary_emb = type(model.rotary_emb)(model.config)
    tokenize = TextEncoder(load_tokenizer(long_world / "backbone"), "Query: ", "")
    records = long_records()
    queries, _ = tokenize([record.query for record in records], "query", 40)
    documents, _ = tokenize([r.positives[0].full_text for r in records], "document", 8192)
    assert max(map(len, documents)) == 8192

    def vectors(rows: list[list[int]]) -> torch.Tensor:
        with torch.no_grad():
            states = [model(input_ids=torch.tensor([row])).last_hidden_state for row in rows]
        return torch.stack([state[0, -1] for state in states]).double()

    want = infonce_reference(
        *(vectors(queries), vectors(documents), torch.arange(4)),
        temperature=0.02, prefixes=[32, 64], prefix_weights=[1.0, 1.0],
    )  # fmt: skip
    assert line["loss"] == pytest.approx(want.loss.item(), rel=1e-4)
    exported = json.loads((long_world / "run" / "model" / "config.json").read_text())
    assert exported["rope_parameters"]["factor"] == 16.0
    assert exported["max_position_embeddings"] == 8192


def test_texts_beyond_the_backbones_positions_are_refused(long_world: Path) -> None:
    done = long_run(long_world, f"--set=output={long_world / 'other'}")
    assert done.returncode == 2
    assert "was made for 512 tokens" in done.stderr
    assert "model.rope" in done.stderr
    assert not (long_world / "other").exists()


def test_the_run_says_once_what_it_computes_with(long_world: Path) -> None:
    done = long_run(
        long_world, "--set=data.max_document_tokens=256", "--set=step.pooled_norm=false",
        f"--set=output={long_world / 'said'}", "--set=train.steps=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("how this run computes") == 1
    table = {}
    for line in done.stderr.splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) == 5:
            table[cells[1]] = (cells[2], cells[3])
    assert table["attention"] == ("sdpa per sequence", "no varlen kernel for this device")
    assert table["last block"][0] == "at the pooled tokens"
    assert table["final norm"] == ("at every token", "step.pooled_norm: false")
    assert table["activations"][0] == "block inputs only"
    assert table["norm, SwiGLU, RoPE"] == (
        "blocks of rows",
        "less of a graph to keep; RoPE is transformers'",
    )
    assert table["kept graphs"] == ("auto", "measured in the first step")
    lines = [
        json.loads(line)
        for line in (long_world / "said" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[0]["chunks_kept"] == 0
    assert lines[1]["chunks_kept"] == lines[1]["chunks"], "a tiny graph fits anywhere"


def recipe(**changes: Any) -> Recipe:
    tree = {"name": "x", "output": "x", "model": {"path": "x"}, "data": {"shards": ["x"]}}
    return Recipe.from_tree({**tree, "train": {"steps": 1, **changes.pop("train", {})}, **changes})


def test_liger_is_refused_where_it_cannot_run(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_llama(tmp_path / "model"))
    with pytest.raises(UserError, match=r"step\.liger on: Liger-Kernel runs on CUDA"):
        choices.prepare(encoder, recipe(step={"liger": "on"}), torch.device("cpu"))


@pytest.mark.parametrize(
    ("wanted", "stage", "device", "compiled"),
    [
        ("auto", "zero1", "cuda", True),
        ("auto", "zero3", "cuda", False),
        ("auto", "zero1", "cpu", False),
        (True, "zero2", "cpu", True),
        (False, "zero1", "cuda", False),
    ],
)
def test_blocks_are_compiled_where_that_helps(
    tmp_path: Path, wanted: str | bool, stage: str, device: str, compiled: bool
) -> None:
    encoder = Encoder.from_pretrained(tiny_llama(tmp_path / "model"))
    settled = recipe(
        step={"compile": wanted, "liger": "off"}, train={"precision": "fp32", "deepspeed": stage}
    )
    choices.prepare(encoder, settled, torch.device(device))
    assert encoder.execution.compiled == compiled


def test_blocks_are_not_compiled_where_weights_lie_unaligned(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden_size=68, head_dim=16)  # norms of 136 bytes
    encoder = Encoder.from_pretrained(model)
    settled = recipe(step={"liger": "off"}, train={"precision": "fp32", "deepspeed": "zero1"})
    shown = choices.prepare(encoder, settled, torch.device("cuda"))
    assert not encoder.execution.compiled
    assert "no multiple of 16 bytes" in next(c.why for c in shown if c.what == "torch.compile")


def test_the_compiler_and_liger_are_not_both_taken(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_llama(tmp_path / "model"))
    with pytest.raises(UserError, match=r"step\.compile on, step\.liger on"):
        choices.prepare(encoder, recipe(step={"compile": "on", "liger": "on"}), torch.device("cpu"))


def test_a_json_for_several_ranks_is_no_obstacle_to_compiling(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_llama(tmp_path / "model"))
    config = tmp_path / "eight.json"
    config.write_text(
        '{"train_micro_batch_size_per_gpu": 256, "bf16": {"enabled": "auto"}, '
        '"zero_optimization": {"stage": 1}}'
    )
    train = {"precision": "fp32", "deepspeed": str(config), "batch_size": 2048}
    settled = recipe(step={"liger": "off"}, train=train)
    choices.prepare(encoder, settled, torch.device("cuda"), world_size=8)
    assert encoder.execution.compiled


def test_compile_is_refused_with_zero_3() -> None:
    settled = recipe(step={"compile": "on"}, train={"precision": "fp32", "deepspeed": "zero3"})
    with pytest.raises(UserError, match=r"step\.compile on does not go with ZeRO 3"):
        settled.deepspeed_config(world_size=1)


def test_rope_that_lacks_a_key_is_one_clear_line(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    with pytest.raises(UserError, match="the model cannot be loaded"):
        Encoder.from_pretrained(
            model, settings=RetrieverSettings(), rope={"rope_type": "llama3", "factor": 4.0}
        )


def test_memory_does_not_grow_with_the_global_batch() -> None:
    """256, 1,024 and 4,096 pairs, allocations counted; what is proportional to the batch is the
    vectors, their gradients and the token ids, and nothing else grows."""
    run = subprocess.run(
        [sys.executable, str(WORKER), "256", "1024", "4096"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = {int(k): v for k, v in json.loads(run.stdout.splitlines()[-1]).items()}
    print(found)
    assert found[256]["chunks"] >= 2
    for pairs in (1024, 4096):
        assert found[pairs]["chunks"] > found[256]["chunks"]
        assert found[pairs]["peak"] - found[256]["peak"] <= found[pairs]["proportional"]
    graph = found[256]["peak"]
    assert found[4096]["proportional"] < 0.5 * graph, "else the bound would allow a graph"
