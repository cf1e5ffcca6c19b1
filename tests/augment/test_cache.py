"""Answers on disk: what is in stays in, whoever else writes, and damage is told, not deleted."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from drama.augment.cache import Cache, Totals
from drama.augment.chat import Answer, Refusal
from drama.errors import UserError

KEY, OTHER = "a" * 64, "b" * 64
ANSWER = Answer("Größe 大きさ 🐝\n\0 end", 7, 3, "stop", estimated=True)


def test_what_is_put_in_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "answers.sqlite"
    cache = Cache(path)
    assert cache.get(KEY) is None
    cache.put(KEY, ANSWER, "tiny")
    cache.refuse(OTHER, Refusal("HTTP 400", "too long"), "tiny")
    cache.close()
    cache = Cache(path)
    assert cache.get(KEY) == Answer(ANSWER.text, 7, 3, "stop", cached=True, estimated=True)
    assert cache.refusal(OTHER) == Refusal("HTTP 400", "too long")
    assert cache.get(OTHER) is None
    assert cache.refusal(KEY) is None
    assert len(cache) == 1
    cache.put(OTHER, Answer("", 10, 20, "stop"), "tiny")
    assert cache.totals() == Totals(2, 17, 23)
    assert cache.totals().tokens == 40
    cache.close()
    assert Cache(tmp_path / "empty.sqlite").totals() == Totals()
    row = sqlite3.connect(path).execute("SELECT model, date FROM answers").fetchone()
    assert row[0] == "tiny"
    assert row[1].endswith("+00:00")
    assert path.read_bytes()[18:20] == b"\2\2"  # the write-ahead log: readers wait for nobody


def test_the_first_answer_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "answers.sqlite")
    cache.put(KEY, ANSWER, "tiny")
    cache.put(KEY, Answer("another", 1, 1, "stop"), "tiny")
    kept = cache.get(KEY)
    assert kept is not None
    assert kept.text == ANSWER.text


WRITER = """
import itertools, sys
from drama.augment.cache import Cache, Totals
from drama.augment.chat import Answer

cache = Cache(sys.argv[1])
for number in itertools.count() if sys.argv[3] == "0" else range(int(sys.argv[3])):
    cache.put(f"{sys.argv[2]} {number}", Answer("text " * 200, 7, 3, "stop"), "tiny")
    print(number, flush=True)
"""


def writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_jobs_share_a_file_that_neither_has_made(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    jobs = [writer(path, name, 200) for name in ("x", "y")]
    assert [job.communicate()[0].split()[-1:] for job in jobs] == [["199"], ["199"]]
    cache = Cache(path)
    assert len(cache) == 400
    assert all(cache.get(f"{n} {i}") for n, i in itertools.product("xy", range(200)))


def test_a_kill_loses_nothing_that_was_put_in(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    job = writer(path, "x", 0)
    assert job.stdout is not None
    for _ in range(150):
        last = int(job.stdout.readline())
    os.kill(job.pid, signal.SIGKILL)
    last = max(int(line) for line in [str(last), *job.stdout.read().split()])
    job.wait()
    cache = Cache(path)
    assert all(cache.get(f"x {number}") for number in range(last + 1))


def fail_halfway(cache: Cache) -> None:
    with cache.together():
        cache.put(KEY, ANSWER, "tiny")
        raise ZeroDivisionError


def test_what_is_written_together_is_kept_together_or_not_at_all(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "answers.sqlite")
    with pytest.raises(ZeroDivisionError):
        fail_halfway(cache)
    assert cache.get(KEY) is None
    with cache.together():
        cache.put(KEY, ANSWER, "tiny")
    assert cache.get(KEY)


def filled(path: Path) -> bytes:
    cache = Cache(path)
    with cache.together():
        for number in range(2000):
            cache.put(f"{number:064d}", ANSWER, "tiny")
    cache.close()
    return path.read_bytes()


def read_all(path: Path) -> None:
    cache = Cache(path)
    for number in range(2000):
        cache.get(f"{number:064d}")


@pytest.mark.parametrize("where", ["start", "middle", "text file"])
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path: Path, where: str) -> None:
    path = tmp_path / "answers.sqlite"
    good = filled(path)
    middle = len(good) // 2 // 4096 * 4096
    damaged = {
        "start": b"\xff" * 4096 + good[4096:],
        "middle": good[:8192] + b"\xff" * (middle - 8192) + good[middle:],
        "text file": b'{"query": "no database"}\n' * 100,
    }[where]
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="the cache is damaged .*; it was left as it is") as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == damaged


def test_a_text_that_is_none_any_more_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    filled(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("UPDATE answers SET text = CAST(x'ff' AS TEXT)")
    with pytest.raises(UserError, match="the cache is damaged"):
        read_all(path)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_bytes(filled(path)[:50_000])
    with pytest.raises(UserError, match=r"answers\.sqlite: the cache is damaged"):
        read_all(path)


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    filled(path)
    other = sqlite3.connect(path)
    other.execute("PRAGMA user_version = 7")
    other.close()
    with pytest.raises(UserError, match="schema version 7; this program reads version 1"):
        Cache(path)


def test_a_database_of_another_program_is_not_written_into(tmp_path: Path) -> None:
    path = tmp_path / "photos.sqlite"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE photos (name TEXT)")
    other.close()
    with pytest.raises(UserError, match=r"photos\.sqlite: a database of another program"):
        Cache(path)
    tables = sqlite3.connect(path).execute("SELECT name FROM sqlite_master").fetchall()
    assert tables == [("photos",)]


def test_a_job_that_holds_the_file_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    Cache(path).close()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match=r"another job has held the cache for 0\.05 s"):
        Cache(path, busy_s=0.05)


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: the cache cannot be used"):
        Cache(tmp_path / "folder")
