"""`drama index` and `drama search` as people use them: on a terminal, through pipes, in batches."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from drama.cli import main
from drama.testing import tiny_llama

TEXTS = {
    "b1": ("Bread", "Bread rises because yeast turns sugar into gas."),
    "b2": ("Honey bees", "A colony of bees stores honey."),
    "b3": ("", "The pull of the moon moves the oceans."),
}


def drama(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    tiny_llama(folder / "model", num_hidden_layers=1)
    rows = [{"_id": id_, "title": a, "text": b} for id_, (a, b) in TEXTS.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arguments in (
        ("encode", f"{folder}/corpus.jsonl", "--model", f"{folder}/model", "--out"),
        ("index", f"{folder}/vectors", "--type", "int8", "--rows-per-file", "2", "--out"),
    ):
        name = "vectors" if arguments[0] == "encode" else "index"
        result = drama(*arguments, f"{folder}/{name}")
        assert result.exit_code == 0, result.output
    return folder


def test_results_as_text_and_as_json(world: Path) -> None:
    shown = drama("search", "--index", f"{world}/index", "-k", "3", "what makes bread rise?")
    lines = shown.stdout.splitlines()
    assert lines[0] == "what makes bread rise?"
    assert len(lines) == 1 + 2 * 3
    heads = {line.split()[-1]: line for line in lines[1::2]}
    assert re.fullmatch(r"  \d  -?\d\.\d{3}  Bread  b1", heads["b1"])
    assert re.fullmatch(r"  \d  -?\d\.\d{3}  b3", heads["b3"])
    assert f"     {TEXTS['b1'][1]}" in lines

    done = drama("search", "--index", f"{world}/index", "-k", "3", "--json", "bread", "tides")
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["query"], second["query"]) == ("bread", "tides")
    assert {hit["id"] for hit in first["hits"]} == set(TEXTS)
    (bread,) = [hit for hit in first["hits"] if hit["id"] == "b1"]
    assert bread["marks"] == [[0, 5]] == bread["title_marks"]


def test_a_run_of_a_query_file(world: Path, tmp_path: Path) -> None:
    (tmp_path / "q.tsv").write_text("q1\tbread\nq2\ttides\n")
    done = drama(
        "search", "--index", f"{world}/index", "--queries", f"{tmp_path}/q.tsv", "--run",
        f"{tmp_path}/out.trec", "--effort", "2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in (tmp_path / "out.trec").read_text().splitlines()]
    assert [(row[0], row[1], row[3], row[5]) for row in rows] == [
        (query, "Q0", rank, "drama") for query in ("q1", "q2") for rank in "123"
    ]


def test_what_does_not_go_together(world: Path) -> None:
    for arguments, message in (
        (("--queries", "q.tsv"), "--queries FILE and --run OUT go together"),
        (("--run", "out"), "--queries FILE and --run OUT go together"),
        (("--queries", "q.tsv", "--run", "out", "bees"), "queries come from q.tsv or from the"),
        (("--model", f"{world}/vectors", "bees"), "vectors is not the model of the index"),
        (("--queries", "gone.tsv", "--run", "out"), "gone.tsv"),
        ((" ",), "query 1 of 1 is empty"),
    ):
        done = drama("search", "--index", f"{world}/index", *arguments)
        assert done.exit_code == 2, arguments
        assert message in done.stderr.splitlines()[-1]


def test_the_prompt_of_a_terminal(world: Path) -> None:
    own, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "drama.cli", "search", "--index", f"{world}/index", "-k", "1"],
        stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(theirs)
    said = read_until(own, b"search> ")
    assert "3 documents, type int8; Ctrl-D ends" in " ".join(
        re.sub(r"\x1b\[[\d;]*m", "", said).split()
    )
    os.write(own, b"\n")  # nothing asked
    assert read_until(own, b"search> ").strip() == "search>"
    os.write(own, b"bread yeast\n")
    answer = read_until(own, b"search> ")
    assert re.search(r"1  -?\d\.\d{3}", answer)
    assert "\x1b[1m" in answer  # bold
    os.write(own, b"bread \xff\n")
    assert "drama: error: query 1 of 1 is not valid UTF-8" in read_until(own, b"search> ")
    os.write(own, b"\x04")
    assert process.wait(60) == 0
    os.close(own)


def test_the_prompt_of_json_leaves_stdout_to_the_answers(world: Path) -> None:
    own, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "drama.cli", "search", "--index", f"{world}/index", "--json"],
        stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, close_fds=True,
    )  # fmt: skip
    os.close(theirs)
    read_until(own, b"search> ")
    os.write(own, b"bread \xff\n")
    assert "not valid UTF-8" in read_until(own, b"search> ")
    os.write(own, b"bread\n")
    read_until(own, b"search> ")
    os.write(own, b"\x04")
    stdout, _ = process.communicate(timeout=60)
    os.close(own)
    assert process.returncode == 0
    assert json.loads(stdout)["query"] == "bread"


def test_queries_that_are_no_utf_8(world: Path) -> None:
    command = [sys.executable, "-m", "drama.cli", "search", "--index", f"{world}/index"]
    for arguments, stdin in (((), b"bread\ncaf\xe9\n"), ((b"bread", b"caf\xe9"), None)):
        done = subprocess.run([*command, *arguments], input=stdin, capture_output=True)
        assert done.returncode == 2
        assert done.stderr.decode() == "drama: error: query 2 of 2 is not valid UTF-8\n"


def test_control_characters_of_documents_do_not_reach_the_terminal(
    world: Path, tmp_path: Path
) -> None:
    row = {"_id": "b\x1b[2J", "title": "Bread\x9b31m\a", "text": "Bread \x1b]0;x\x07 rises\x7f"}
    (tmp_path / "corpus.jsonl").write_text(json.dumps(row) + "\n")
    encoding = drama(
        "encode", f"{tmp_path}/corpus.jsonl", "--model", f"{world}/model", "--out", f"{tmp_path}/v"
    )
    assert encoding.exit_code == 0, encoding.output
    assert drama("index", f"{tmp_path}/v", "--out", f"{tmp_path}/i").exit_code == 0
    shown = drama("search", "--index", f"{tmp_path}/i", "bread").stdout
    assert "Bread\ufffd31m\ufffd  b\ufffd[2J" in shown
    assert "Bread \ufffd]0;x\ufffd rises\ufffd" in shown
    as_json = drama("search", "--index", f"{tmp_path}/i", "--json", "bread").stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown + as_json)
    (hit,) = json.loads(as_json)["hits"]
    assert (hit["id"], hit["title"], hit["snippet"]) == (row["_id"], row["title"], row["text"])


def read_until(terminal: int, end: bytes) -> str:
    """What a terminal shows until it asks; the first `end` after the echo of a line does not count
    as long as more comes."""
    shown, deadline = b"", time.monotonic() + 120
    while not shown.endswith(end):
        assert time.monotonic() < deadline, shown
        shown += os.read(terminal, 4096)
        shown = shown.replace(b"\x1b[?2004h", b"").replace(b"\x1b[?2004l", b"")
    return shown.decode(errors="replace")
