"""The commands and the launcher that encode: options arrive, faults are one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from drama.cli import main
from drama.cli_encode import encode
from drama.testing import tiny_llama

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "data" / "demo" / "calibration.txt.gz"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def drama(*arguments):
    return CliRunner().invoke(main, [str(word) for word in arguments])


def test_needle_shows_a_table_and_keeps_it(model, tmp_path):
    options = ("--model", model, "--text", TEXT, "--kind", "passkey", "--documents", 3)
    result = drama("needle", *options, "--lengths", "200,1K", "--depths", "0,100", "--out",
                   tmp_path / "out", "--max-tokens", 1024)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "1,024" in result.stderr
    assert "by chance 0.333, MRR 0.611" in result.stderr
    stored = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert stored["about"]["kind"] == "passkey"
    assert [(c["length"], c["depth"]) for c in stored["cells"]] == [
        (200, 0), (200, 100), (1024, 0), (1024, 100)
    ]  # fmt: skip
    assert (tmp_path / "out" / "needle.md").read_text().startswith("| tokens | 0 % | 100 % |")
    assert (tmp_path / "out" / "needle.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lengths", "256,1m"), "--lengths: '1m' is no length; write 256,1k,32k"),
        (("--depths", "0;50"), "--depths: '0;50' must be numbers from 0 to 100"),
        (("--lengths", "999k"), "1,022,976 are needed; give more --text"),
    ],
)
def test_bad_lengths_and_depths(model, options, message):
    result = drama("needle", "--model", model, "--text", TEXT, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_encode_computes_and_stores_as_told(model, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"_id": "a", "text": "tides"}\n{"_id": "b", "text": "bees"}\n')
    options = ("--precision", "bf16", "--dtype", "float16", "--window", 1, "--token-budget", 99)
    result = drama("encode", corpus, "--model", model, "--out", tmp_path / "v", *options)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "v" / "manifest.json").read_text())
    for name, value in (("compute_dtype", "bfloat16"), ("dtype", "float16"), ("window", 1),
                        ("token_budget", 99), ("rows", 2)):  # fmt: skip
        assert manifest[name] == value


def test_the_launcher_takes_what_the_command_takes():
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "encode.py"), "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for option in encode.params:
        assert max(option.opts, key=len) in done.stdout.lower() or option.name == "corpus"
    assert "deepspeed launchers/encode.py CORPUS --model MODEL" in done.stdout
