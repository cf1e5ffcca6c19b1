from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM

from drama.errors import UserError
from drama.prune.source import find_llm, load_llm


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_llm(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_folder_loads_as_it_was_saved(
    model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_llm(model_folder)
    reference = LlamaForCausalLM.from_pretrained(model_folder)
    ids = torch.arange(20)[None]
    capfd.readouterr()
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert tokenizer("w5 w6")["input_ids"] == [5, 6]
    load_llm(model_folder)
    assert capfd.readouterr() == ("", "")


def test_missing_path(tmp_path: Path) -> None:
    assert "no such model folder" in refusal(tmp_path / "nothing")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    assert "not a model" in refusal(path)


def test_empty_folder(tmp_path: Path) -> None:
    assert "no config.json and no .gguf" in refusal(tmp_path)


def test_several_gguf_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "2 .gguf files (a.gguf, b.gguf)" in refusal(tmp_path)


def test_a_damaged_gguf(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"no gguf at all, but long enough to be read as a header")
    assert "configuration" in refusal(path)


@pytest.mark.parametrize("size", [100, 100_000, 3_000_000])
def test_a_half_downloaded_gguf(smollm2: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.gguf"
    with next(smollm2.glob("*.gguf")).open("rb") as file:
        path.write_bytes(file.read(size))
    assert "half downloaded" in refusal(path)


def test_no_weights(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(model_folder)


def test_half_downloaded(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = model_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    message = refusal(model_folder)
    assert "1 of 2 weight files are missing" in message
    assert "model-00002-of-00002.safetensors" in message


def test_truncated_weights(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "damaged" in refusal(model_folder)


def test_weights_of_another_shape(model_folder: Path) -> None:
    edit_config(model_folder, intermediate_size=44)
    assert "not of this" in refusal(model_folder)


def test_weights_with_a_layer_too_few(model_folder: Path) -> None:
    edit_config(model_folder, num_hidden_layers=5)
    assert "model.layers.4." in refusal(model_folder)


def test_another_architecture_is_named(model_folder: Path) -> None:
    GPT2Config(n_layer=1).save_pretrained(model_folder)
    message = refusal(model_folder)
    assert "architecture 'gpt2'" in message
    assert "llama, mistral, qwen2, qwen3" in message


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_loads_with_its_own_logits(
    tmp_path: Path, make_llama: Any, tokenizer: Any, family: str, tied: bool
) -> None:
    options: dict[str, Any] = {"tie_word_embeddings": tied}
    if family in ("llama", "qwen3"):
        options |= {"attention_bias": True}
    if family == "llama":
        options |= {"mlp_bias": True}
    if family == "mistral":
        options |= {"sliding_window": None}
    make_llama(family, **options).save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    model, _ = load_llm(tmp_path, torch.float64)
    assert model.config.model_type == ("qwen3" if family == "qwen3" else "llama")
    ids = torch.arange(60)[None]
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_becomes_the_longest_text(
    tmp_path: Path, make_llama: Any, tokenizer: Any, family: str
) -> None:
    options: dict[str, Any] = {"sliding_window": 40, "max_position_embeddings": 128}
    if family != "mistral":
        options |= {"use_sliding_window": True, "max_window_layers": 2}
    make_llama(family, **options).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    model, _ = load_llm(tmp_path, torch.float64)
    assert model.config.max_position_embeddings == 40
    assert getattr(model.config, "sliding_window", None) is None
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=0, atol=1e-12)
    longer = torch.arange(60)[None]
    assert not torch.allclose(model(longer).logits, reference(longer).logits)


def test_code_of_the_model_is_not_run(model_folder: Path) -> None:
    marker = model_folder / "ran"
    (model_folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit_config(model_folder, model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    refusal(model_folder)
    assert not marker.exists()


def test_tokenizer_missing(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").unlink()
    assert "no tokenizer (tokenizer.json is missing)" in refusal(model_folder)


def test_tokenizer_of_another_model(model_folder: Path) -> None:
    path = model_folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] |= {f"more{i}": 64 + i for i in range(10)}
    path.write_text(json.dumps(data))
    assert "74 entries" in refusal(model_folder)


def test_find_llm_takes_the_only_gguf_of_a_folder(smollm2: Path) -> None:
    assert find_llm(smollm2) == find_llm(next(smollm2.glob("*.gguf")))
