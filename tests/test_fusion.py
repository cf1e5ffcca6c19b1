"""Fused element-wise work changes nothing: Liger-Kernel in the interpreter, Inductor for real."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from drama import fusion, row_blocks
from drama.attention import ATTENTION_NAME
from drama.blocks import Execution
from drama.data.packing import pack
from drama.encoder import Encoder
from drama.folder import RetrieverSettings
from drama.testing import byte_tokenizer, tiny_llama

ROWS = [[5 + i % 200 for i in range(n)] for n in (3, 9, 9, 31)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    encoder.train().zero_grad()
    out_BD = encoder(pack(ROWS))
    (out_BD * torch.linspace(-1, 1, out_BD.numel()).view_as(out_BD)).sum().backward()
    return {"vectors": out_BD.detach()} | {
        name: p.grad for name, p in encoder.named_parameters() if p.grad is not None
    }


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def tiny_qwen3() -> Encoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 80}
    config = Qwen3Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.2
    )
    backbone = Qwen3Model._from_config(config, attn_implementation=ATTENTION_NAME)
    return Encoder(backbone, byte_tokenizer(), RetrieverSettings(pooling="last"))


@pytest.mark.parametrize(
    ("kind", "recompute"), [("last", False), ("mean", True), ("qwen3, last", False)]
)
def test_compiled_blocks_give_the_same_gradients(model: Path, kind: str, recompute: bool) -> None:
    if kind == "qwen3, last":
        encoder = tiny_qwen3()
    else:
        settings = RetrieverSettings(pooling=kind)  # type: ignore[arg-type]
        encoder = Encoder.from_pretrained(model, settings=settings)
    want = gradients(encoder)
    names = set(encoder.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    encoder.execution = Execution(compiled=True, recompute_blocks=recompute)
    assert_equal(gradients(encoder), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert set(encoder.state_dict()) == names


def count(calls: list[str], name: str, function: Callable[..., Any], *inputs: Any) -> Any:
    calls.append(name)
    return function(*inputs)


@pytest.mark.parametrize(
    ("wanted", "device", "liger", "found"),
    [
        ("off", "cpu", True, "transformers"),
        ("auto", "cuda", False, "transformers"),
        ("auto", "cuda", True, "Liger-Kernel"),
        ("auto", "meta", True, "transformers"),
    ],
)
def test_who_fuses(
    model: Path,
    wanted: str,
    device: str,
    liger: bool,
    found: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[str] = []
    monkeypatch.setattr(fusion, "has_liger", lambda: liger)
    monkeypatch.setattr(fusion, "use_liger", lambda backbone, device: used.append(device))
    backbone = Encoder.from_pretrained(model).backbone
    assert fusion.fuse(backbone, wanted, torch.device(device))[0] == found
    assert used == ([device] if found == "Liger-Kernel" else [])
    assert "forward" not in vars(backbone.layers[0].mlp)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_blocks_of_rows_give_the_same_gradients(
    model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_qwen3() if kind == "qwen3" else Encoder.from_pretrained(model)
    want = gradients(encoder)
    names = set(encoder.state_dict())
    assert fusion.fuse(encoder.backbone, "auto", torch.device("cpu"))[0] == "blocks of rows"
    calls: list[str] = []
    for function in (row_blocks._Norm, row_blocks._Gated):
        counted = functools.partial(count, calls, function.__name__, function.apply)
        monkeypatch.setattr(function, "apply", counted)
    assert_equal(gradients(encoder), want)
    blocks = len(encoder.backbone.layers)
    assert (calls.count("_Norm"), calls.count("_Gated")) == (2 * blocks, blocks)
    assert set(encoder.state_dict()) == names


def test_all_blocks_and_lengths_share_the_compiled_code(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_llama(tmp_path / "model", num_hidden_layers=6))
    encoder.execution = Execution(compiled=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for lengths in ((3, 9, 31), (5, 5), (8,)):
        batch = pack([[5 + i % 200 for i in range(n)] for n in lengths])
        with torch.no_grad():
            encoder(batch)
        encoder(batch).sum().backward()
    # before and after attention, and the last block's keys and values; with and without gradient
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6


def test_a_compiled_block_keeps_gate_and_up_but_not_their_product(model: Path) -> None:
    encoder = Encoder.from_pretrained(model, settings=RetrieverSettings(pooling="mean")).train()
    encoder.execution = Execution(compiled=True)
    kept: list[tuple[int, ...]] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(x.shape[-2:]))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        encoder(pack(ROWS))
    assert kept.count((sum(map(len, ROWS)), 96)) == 2 * 3  # of three blocks


LIGER = """
import sys, torch
from drama import fusion
from drama.encoder import Encoder
sys.path.insert(0, {tests!r})
from test_fusion import assert_equal, gradients
encoder = Encoder.from_pretrained({model!r})
want = gradients(encoder)
names = set(encoder.state_dict())
fusion.use_liger(encoder.backbone, "cpu")
import numpy, triton.language as tl
from triton.runtime import interpreter
plain = interpreter._implicit_cvt
def converted(x):  # the compiler makes tensors of a kernel's numbers, the interpreter not of floats
    if isinstance(x, float):
        handle = interpreter.TensorHandle(numpy.array([x], numpy.float32), tl.float32)
        return tl.core.tensor(handle, tl.float32)
    return plain(x)
interpreter._implicit_cvt = converted
for layer in encoder.backbone.layers:  # the interpreter cannot run this kernel; a GPU does
    del layer.input_layernorm.forward, layer.post_attention_layernorm.forward
from liger_kernel.ops import LigerSiLUMulFunction as swiglu
calls = []
whole = swiglu.forward
swiglu.forward = staticmethod(lambda *a: calls.append(1) or whole(*a))
assert_equal(gradients(encoder), want)
assert set(encoder.state_dict()) == names
assert len(calls) == 3, calls  # one in each block
"""


@pytest.mark.skipif(not fusion.has_liger(), reason="liger-kernel is not installed")
def test_ligers_swiglu_and_rope_give_the_same_gradients(model: Path) -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    code = LIGER.format(tests=str(Path(__file__).parent), model=str(model))
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
