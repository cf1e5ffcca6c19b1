from __future__ import annotations

import gzip
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drama.data import plain as plain_text
from drama.errors import UserError
from drama.prune.text import Domain, TextStream, documents, find_texts, open_domain, tokenise
from drama.testing import byte_tokenizer


def test_paragraphs_and_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "a.txt.xz"
    with lzma.open(plain, "wt") as file:
        file.write("\n\none\ntwo\n\n \nthree\n")
    assert list(documents(plain)) == ["one\ntwo", "three"]
    code = tmp_path / "code.txt"  # JSON is told by the name: a text may begin with a brace
    code.write_text("{ x }\n\n}")
    assert list(documents(code)) == ["{ x }", "}"]
    monkeypatch.setattr(plain_text, "LONGEST_DOCUMENT", 5)
    code.write_text("abc\ndef\nghi\njkl\nm")  # no blank line to its end
    assert list(documents(code)) == ["abc\ndef", "ghi\njkl", "m"]
    rows = [{"text": "ä {b}"}, {"title": "T", "text": "t\n\nu"}, {"title": None, "text": "v"}]
    packed = tmp_path / "a.jsonl.gz"
    with gzip.open(packed, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert list(documents(packed)) == ["ä {b}", "T\nt\n\nu", "v"]


@pytest.mark.parametrize("line", ['{"text": 3}', '{"body": "x"}', '{"text": "x"', "plain"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: "):
        list(documents(path))


def tokens_of(folder: Path, name: str = "d", **changes: Any) -> Path:
    options: dict[str, Any] = {"max_tokens": 10**6, "identity": "t"}
    return tokenise(name, [folder / "a.txt", folder / "b.txt"], byte_tokenizer(), folder / "text",
                    **(options | changes))  # fmt: skip


def test_token_ids_are_the_documents_of_all_files_in_turn_closed_by_eos(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt").write_text("three")
    tokenizer = byte_tokenizer()
    expected = [i for word in ("one", "three", "two") for i in (*tokenizer(word)["input_ids"], 2)]
    file = tokens_of(tmp_path)
    assert np.fromfile(file, np.int32).tolist() == expected
    written = file.stat().st_mtime_ns
    assert tokens_of(tmp_path).stat().st_mtime_ns == written  # not once more
    for change in ({"identity": "u"}, {"max_tokens": 4}):
        tokens_of(tmp_path, **change)
        assert file.stat().st_mtime_ns > written
        written = file.stat().st_mtime_ns
    (tmp_path / "b.txt").write_text("THREE")
    tokens_of(tmp_path, max_tokens=4)
    assert file.stat().st_mtime_ns > written
    written = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes()[:-4])  # cut by hand
    assert tokens_of(tmp_path, max_tokens=4).stat().st_mtime_ns > written


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n\n")
    with pytest.raises(UserError, match=r"domains\.wiki: no text in .*a\.txt, .*b\.txt"):
        tokens_of(tmp_path, "wiki")
    with pytest.raises(UserError, match=r"domains\.wiki: .*c\.txt is no file"):
        find_texts("wiki", [tmp_path / "a.txt", tmp_path / "c.txt"])
    file = tmp_path / "short.bin"
    np.arange(29, dtype=np.int32).tofile(file)
    with pytest.raises(UserError, match=r"domains\.wiki: too short: 29 tokens .* 3 rows of 10"):
        open_domain("wiki", file, length=10, held_out=2, seed=0)
    assert len(open_domain("wiki", file, length=10, held_out=1, seed=0)) == 1


def domain(name: str, rows: int, held_out: int = 2) -> Domain:
    return Domain(name, np.arange(rows * 4 + 3, dtype=np.int32), 4, held_out, seed=0)


def test_every_epoch_draws_every_row_once_and_no_held_out_one() -> None:
    found = domain("a", 12)  # rows 0 and 6 are held out, evenly spread
    assert found.held_out_rows.tolist() == [[0, 1, 2, 3], [24, 25, 26, 27]]
    assert len(found) == 10
    epochs = [[found.draw(e * 10 + i)[0] // 4 for i in range(10)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert epochs[0] != epochs[1]
    assert found.draw(3)[0] // 4 == epochs[0][3]  # back in an earlier epoch
    assert domain("a", 12).draw(13)[0] // 4 == epochs[1][3]
    assert [domain("b", 12).draw(i)[0] // 4 for i in range(10)] != epochs[0]


def test_a_batch_has_each_domain_by_its_weight() -> None:
    weights = {"a": 0.62, "b": 0.38 - 1e-3, "c": 1e-3}
    stream = TextStream([domain(name, 50) for name in weights], seed=0)
    totals: Counter[int] = Counter()
    for step in range(500):
        ids_RN, domain_R = stream.batch(step, weights, 8)
        assert ids_RN.shape == (8, 4)
        counts = torch.bincount(domain_R, minlength=3).tolist()
        for count, share in zip(counts, weights.values(), strict=True):
            assert abs(count - 8 * share) < 1
        totals.update(domain_R.tolist())
    assert totals[2] > 0  # rarer than one a batch, and still drawn
    for number, share in enumerate(weights.values()):
        assert totals[number] / 4000 == pytest.approx(share, abs=0.01)


def test_a_stream_goes_on_from_what_was_drawn() -> None:
    weights = {"a": 0.5, "b": 0.5}
    whole, parts = (TextStream([domain(n, 50) for n in weights], seed=3) for _ in range(2))
    batches = [whole.batch(step, weights, 6) for step in range(20)]
    for step in range(9):
        parts.batch(step, weights, 6)
    again = TextStream([domain(n, 50) for n in weights], seed=3)
    again.drawn = json.loads(json.dumps(parts.drawn))
    for step in range(9, 20):
        for a, b in zip(again.batch(step, weights, 6), batches[step], strict=True):
            assert torch.equal(a, b)
