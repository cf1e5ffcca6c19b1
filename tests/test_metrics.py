from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from drama.metrics import MetricsFile, forward_flops, matmul_rate


@pytest.mark.parametrize(
    "shape",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},  # q wider than hidden
    ],
    ids=["grouped", "full", "own-head-width"],
)
def test_forward_flops_are_those_that_torch_counts(shape: dict[str, int]) -> None:
    """Hugging Face's padded eager forward; texts of one length, so that nothing is padded."""
    settings = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96} | shape
    config = LlamaConfig(vocab_size=50, max_position_embeddings=64, **settings)
    config._attn_implementation = "eager"
    model = LlamaModel(config)
    num_texts, length = 3, 17
    ids = torch.randint(50, (num_texts, length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    # no head, no embedding product: all that torch counts is ours, the outer product of the rotary
    # angles excepted, which some versions count (2 * head_dim / 2 a position)
    head_dim = shape.get("head_dim", 64 // shape["num_attention_heads"])
    beyond = counter.get_total_flops() - forward_flops(config, [length] * num_texts)
    assert beyond in (0, head_dim * length, head_dim * length * num_texts)


def test_forward_flops_of_ragged_texts_add_up() -> None:
    """Attention grows with the square of each text's length, not of the batch's."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    lengths = [3, 40, 7]
    apart = sum(forward_flops(config, [length]) for length in lengths)
    assert forward_flops(config, lengths) == apart
    assert apart < forward_flops(config, [sum(lengths)])


def test_the_matrix_rate_is_plausible() -> None:
    rate = matmul_rate(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e14


def test_resuming_drops_later_and_half_written_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, first_step=0)
    for step in range(5):
        metrics.write({"step": step, "loss": 0.5})
        assert json.loads(path.read_text().splitlines()[-1])["step"] == step  # flushed at once
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # killed within the write

    metrics = MetricsFile(path, first_step=3)
    metrics.write({"step": 3, "loss": 0.25})
    metrics.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (0, 0.5), (1, 0.5), (2, 0.5), (3, 0.25),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


def test_starting_over_drops_every_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    MetricsFile(path, first_step=0).close()
    assert path.read_text() == ""
