from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from drama.console import console
from drama.errors import UserError
from drama.prune.shape import Shape, count_parameters, flops_per_token, parse_target, plan_table

LLAMA_1B = Shape(layers=16, hidden=2048, heads=32, kv_heads=8, ffn=8192, head_dim=64)


def test_of_reads_a_configuration_with_and_without_head_dim() -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2,
                         intermediate_size=100, num_hidden_layers=3)  # fmt: skip
    assert Shape.of(config) == Shape(3, 96, 6, 2, 100, 16)
    config.head_dim = 32
    assert Shape.of(config).head_dim == 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.1b", Shape(12, 768, 12, 3, 3072, 64)),
        ("0.3B", Shape(16, 1024, 16, 4, 4096, 64)),
        ("layers=12, hidden=768,heads=12,ffn=3072", Shape(12, 768, 12, 3, 3072, 64)),
        ("kv_heads=3,hidden=768", Shape(16, 768, 12, 3, 8192, 64)),
        ("layers=4", Shape(4, 2048, 32, 8, 8192, 64)),
        ("hidden=768,heads=16,kv_heads=8", Shape(16, 768, 16, 8, 8192, 64)),
    ],
)
def test_parse_target(text: str, expected: Shape) -> None:
    assert parse_target(text, LLAMA_1B) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.2b", ["0.2b", "0.1b", "0.3b"]),
        ("layer=3", ["unknown key 'layer'", "did you mean 'layers'"]),
        ("layers=3,layers=4", ["layers is given twice"]),
        ("hidden=big", ["hidden=big is not a whole number"]),
        ("ffn=0", ["ffn=0", "the smallest valid choice is 1"]),
        ("heads=-4", ["heads=-4", "smallest"]),
        ("layers=17", ["layers=17", "source's 16", "nearest valid choice is 16"]),
        ("heads=10", ["heads=10", "4 query heads", "heads=8"]),
        ("heads=1", ["heads=1 ", "nearest valid choice is heads=4"]),
        ("heads=12,kv_heads=5", ["heads=12 with kv_heads=5", "1 to 4", "heads=10"]),
        ("heads=32,kv_heads=4", ["heads=32 with kv_heads=4", "heads=16"]),
        ("hidden=776,heads=12", ["hidden=776", "multiple of heads=12", "hidden=780", "heads=8"]),
        ("hidden=4,heads=32", ["hidden=4", "hidden=32", "heads=4"]),
    ],
)
def test_bad_targets_name_the_value_and_the_nearest_valid_one(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_target(text, LLAMA_1B)
    for word in [f"target '{text}'", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_a_real_model(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=16,
        intermediate_size=40, num_hidden_layers=3, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    counted = count_parameters(Shape.of(config), 50, tied)
    assert counted.total == sum(weight.numel() for weight in model.parameters())
    blocks = sum(weight.numel() for weight in model.model.parameters()) - 50 * 48
    assert counted.non_embedding == blocks


def test_the_paper_shapes_have_the_known_sizes() -> None:
    # derived by hand: 12 * (768 * 64 * (12 + 12 + 3 + 3) + 3 * 768 * 3072) + 25 * 768
    target = parse_target("0.1b", LLAMA_1B)
    assert count_parameters(target, 128_256, True).non_embedding == 102_648_576
    assert flops_per_token(target, 0) == 2 * (102_648_576 - 25 * 768)
    assert flops_per_token(target, 100) - flops_per_token(target, 0) == 4 * 100 * 768 * 12


def test_plan_table_shows_before_and_after() -> None:
    table = plan_table(LLAMA_1B, parse_target("0.1b", LLAMA_1B), vocab_size=128_256, tied=True)
    with console.capture() as captured:
        console.print(table, width=100)
    text = captured.get()
    for figure in ("2,048", "768", "38%", "102.65", "973.15", "201.15"):
        assert figure in text
