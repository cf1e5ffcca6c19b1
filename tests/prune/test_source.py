from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2Config

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
    assert "not of this configuration" in refusal(model_folder)


def test_weights_with_a_layer_too_few(model_folder: Path) -> None:
    edit_config(model_folder, num_hidden_layers=5)
    assert "model.layers.4." in refusal(model_folder)


def test_another_architecture_is_named(model_folder: Path) -> None:
    Qwen2Config(num_hidden_layers=1).save_pretrained(model_folder)
    assert "architecture 'qwen2'" in refusal(model_folder)


def test_code_of_the_model_is_not_run(model_folder: Path) -> None:
    marker = model_folder / "ran"
    (model_folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit_config(model_folder, model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    refusal(model_folder)
    assert not marker.exists()


def test_biases_are_refused(model_folder: Path) -> None:
    edit_config(model_folder, attention_bias=True)
    assert "biases" in refusal(model_folder)


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
