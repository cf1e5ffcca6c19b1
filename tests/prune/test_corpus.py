from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from drama.errors import UserError
from drama.prune import corpus
from drama.prune.corpus import count_tokens

TEXTS = [f"Line {n} of bread.\nAnd its second line{'!' * (n % 5)}" for n in range(90)]


def counted(tokenizer: Any, texts: list[str]) -> Counter[int]:
    ids: Counter[int] = Counter()
    for text in texts:
        ids.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids


def test_every_form_of_file_is_counted_whole(byte_level: Any, tmp_path: Path) -> None:
    """Counted and held-out texts together are the file, whatever it is packed in."""
    raw = ("\n\n".join(TEXTS) + "\n").encode()
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS).encode()
    for name, data, expected in (
        ("a.txt", raw, [f"{text}\n\n" for text in TEXTS[:-1]] + [TEXTS[-1] + "\n"]),
        ("b.txt.gz", gzip.compress(raw), None),
        ("c.txt.xz", lzma.compress(raw), None),
        ("d.jsonl", lines, TEXTS),
        ("e.jsonl.xz", lzma.compress(lines), TEXTS),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        texts = expected or texts  # noqa: F821
        found = count_tokens([path], byte_level)
        assert list(found.held_out) == [texts[n] for n in (1, 21, 41, 61, 81)]
        rest = counted(byte_level, [text for text in texts if text not in found.held_out])
        assert {i: n for i, n in enumerate(found.counts_V.tolist()) if n} == rest
        assert found.sha256 == {str(path): hashlib.sha256(data).hexdigest()}


def test_several_files_are_one_corpus(byte_level: Any, tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text("\n\n".join(TEXTS[number * 30 : number * 30 + 30]))
    found = count_tokens(paths, byte_level)
    assert list(found.sha256) == [str(path) for path in paths]
    assert found.counts_V.sum() > 0.9 * sum(counted(byte_level, TEXTS).values())
    assert len(found.held_out) == 5


def test_long_texts_come_in_pieces_cut_before_white_space(byte_level: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    text = "word " * 5000 + "x" * 9000 + "\n" + "bread and\n" * 1000
    path.write_text(json.dumps({"text": text}))
    with path.open("rb") as raw:
        pieces = list(corpus._texts(path, raw))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= corpus.TEXT_CHARACTERS
    whole = byte_level(text, add_special_tokens=False)["input_ids"]
    in_pieces = sum(counted(byte_level, pieces).values())
    assert abs(in_pieces - len(whole)) <= 2  # the run of x has no white space to be cut at

    plain = tmp_path / "lines.txt"
    plain.write_text("bread and butter\n" * 2000)
    with plain.open("rb") as raw:
        pieces = list(corpus._texts(plain, raw))
    assert "".join(pieces) == plain.read_text()
    assert len(pieces) > 5


def test_held_out_texts_are_few_and_the_others_are_counted(
    byte_level: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "HELD_OUT_TEXTS", 3)
    path = tmp_path / "a.jsonl"
    texts = [f"text {n}" for n in range(400)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = count_tokens([path], byte_level)
    assert len(found.held_out) == 3
    rest = counted(byte_level, [text for text in texts if text not in found.held_out])
    assert found.counts_V.sum() == sum(rest.values())
    seeds = {count_tokens([path], byte_level, seed=seed).held_out for seed in range(4)}
    assert len(seeds) > 1
    assert found.held_out == count_tokens([path], byte_level).held_out


def test_the_tokenizer_s_truncation_plays_no_part(byte_level: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(TEXTS))
    expected = count_tokens([path], byte_level).counts_V.tolist()
    backend = byte_level.backend_tokenizer
    backend.enable_truncation(2)
    try:
        assert count_tokens([path], byte_level).counts_V.tolist() == expected
    finally:
        backend.no_truncation()


def test_bad_corpora_are_refused(byte_level: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.txt: No such file"):
        count_tokens([tmp_path / "none.txt"], byte_level)
    path = tmp_path / "a.txt"
    for content, count in (("", 0), ("\n \n\n", 0), ("one paragraph", 1)):
        path.write_text(content)
        with pytest.raises(UserError, match=rf"a\.txt: {count} paragraphs .* at least 2"):
            count_tokens([path], byte_level)
    path.write_bytes(b"good\n\xff\n")
    with pytest.raises(UserError, match=r"a\.txt:2: invalid UTF-8"):
        count_tokens([path], byte_level)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"body": "x"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: no text"):
        count_tokens([path], byte_level)
    path.write_text('{"text": "good"}\n{"text"\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: invalid JSON"):
        count_tokens([path], byte_level)
