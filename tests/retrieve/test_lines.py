from __future__ import annotations

import pytest

from drama.errors import UserError
from drama.retrieve.lines import Lines, write_lines


def test_lines_by_number(tmp_path):
    rows = ["one", "", "drei\x85\u2028 é", "日本\r"]
    write_lines(tmp_path / "a.txt", iter(rows))
    lines = Lines(tmp_path / "a.txt")
    assert [lines[i] for i in range(4)] == list(lines) == rows
    assert lines[-1] == rows[-1]
    assert len(lines) == 4
    assert (tmp_path / "a.txt").read_bytes() == "".join(f"{row}\n" for row in rows).encode()
    with pytest.raises(IndexError):
        lines[4]


def test_nothing_is_left_when_the_lines_end_in_an_error(tmp_path):
    def rows():
        yield "a"
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_lines(tmp_path / "a.txt", rows())
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"a\.txt cannot be read"):
        Lines(tmp_path / "a.txt")
    write_lines(tmp_path / "a.txt", ["one", "two"])
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"a\.txt and its offsets do not fit"):
        Lines(tmp_path / "a.txt")
