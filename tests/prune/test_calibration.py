from __future__ import annotations

import gzip
import hashlib
import lzma
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from drama.errors import UserError
from drama.prune import calibration
from drama.prune.calibration import Calibration, read_calibration

EOS = 1


def read(
    path: Path, tokenizer: PreTrainedTokenizerFast, tokens: int = 1000, **options: int
) -> Calibration:
    return read_calibration(
        path, tokenizer, num_tokens=tokens, held_out_tokens=500, length=64, **options
    )


def paragraphs_of(rows: torch.Tensor) -> list[tuple[int, ...]]:
    """Whole paragraphs in packed rows; the last one may be cut and is left out."""
    found, current = [], []
    for token in rows.flatten().tolist():
        current.append(token)
        if token == EOS:
            found.append(tuple(current))
            current = []
    return found


def test_rows_hold_whole_paragraphs_of_the_file_and_no_paragraph_twice(
    text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = read(text_file, tokenizer)
    assert text.scoring.shape == (16, 64)
    assert text.held_out.shape == (8, 64)
    truth = {
        (*(int(word[1:]) for word in paragraph.split()), EOS)
        for paragraph in text_file.read_text().split("\n\n")
    }
    scoring, held_out = paragraphs_of(text.scoring), paragraphs_of(text.held_out)
    assert set(scoring) <= truth
    assert set(held_out) <= truth
    assert len(set(scoring) | set(held_out)) == len(scoring) + len(held_out)
    assert text.sha256 == hashlib.sha256(text_file.read_bytes()).hexdigest()


def test_held_out_rows_do_not_depend_on_the_number_of_scoring_tokens(
    text_file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    # few enough characters are kept that the draw drops most of the file
    monkeypatch.setattr(calibration, "CHARACTERS_PER_TOKEN", 5)
    few, many = read(text_file, tokenizer, 64), read(text_file, tokenizer, 3000)
    assert torch.equal(few.held_out, many.held_out)
    assert torch.equal(few.scoring, many.scoring[:1])


def test_the_seed_decides_the_draw(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert torch.equal(read(text_file, tokenizer).scoring, read(text_file, tokenizer).scoring)
    other = read(text_file, tokenizer, seed=1)
    assert not torch.equal(read(text_file, tokenizer).scoring, other.scoring)


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_text_is_the_same(
    text_file: Path, tokenizer: PreTrainedTokenizerFast, suffix: str, opener
) -> None:
    packed = text_file.with_name("text.txt" + suffix)
    with opener(packed, "wb") as file:
        file.write(text_file.read_bytes())
    assert torch.equal(read(packed, tokenizer).scoring, read(text_file, tokenizer).scoring)


def test_repeated_paragraphs_count_once(
    text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = text_file.read_text().split("\n\n")[0]
    text_file.write_text("\n\n".join([first] * 500))
    with pytest.raises(UserError, match="in 1 distinct paragraphs"):
        read(text_file, tokenizer)


def test_too_short_names_the_numbers(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError) as caught:
        read(text_file, tokenizer, 100_000)
    have = sum(len(p.split()) + 1 for p in text_file.read_text().split("\n\n"))
    for part in (str(text_file), f"{have:,} tokens", "100,544 are needed", "512 held out"):
        assert part in str(caught.value)


def test_bad_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.txt: No such file"):
        read(tmp_path / "none.txt", tokenizer)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"binary\.txt:1: invalid UTF-8"):
        read(binary, tokenizer)
    truncated = tmp_path / "truncated.gz"
    truncated.write_bytes(gzip.compress(b"w5 w6\n\n" * 1000)[:-12])
    with pytest.raises(UserError, match=r"truncated\.gz: the compressed file is cut or damaged"):
        read(truncated, tokenizer)
    with pytest.raises(UserError, match="calibration tokens: 0"):
        read(binary, tokenizer, 0)
