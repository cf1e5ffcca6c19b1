from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from drama.cli import SECTIONS, main
from drama.recipe import TrainRecipe
from drama.testing import tiny_llama

ROOT = Path(__file__).resolve().parents[1]
RECORD = {"query": "what makes bread rise", "positives": [{"text": "Yeast makes bread rise."}]}
DOCUMENTS = [
    {"_id": "d1", "title": "Bees", "text": "A colony of bees stores honey."},
    {"_id": "d2", "title": "", "text": "Bread rises because of yeast."},
    {"_id": "d3", "title": "Tides", "text": "The moon pulls the oceans."},
]


def drama(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


def subprocess_drama(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "drama.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> Path:
    """A working folder with good and bad inputs."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(llama)
    Path("empty").mkdir()
    record = json.dumps(RECORD) + "\n"
    Path("records.jsonl").write_text(record * 3)
    Path("blank.jsonl").write_text(record + "\n")
    Path("hollow.jsonl").write_text(record + "{}\n")
    Path("broken.jsonl").write_text(record + '{"query": \n')
    Path("corpus.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCUMENTS))
    Path("cut.jsonl").write_text(json.dumps(DOCUMENTS[0]) + '\n{"_id": "d2", "te')
    Path("text.txt").write_text(
        "\n\n".join(f"Bees make {n} jars of honey, bakers bread. " * 4 for n in range(60))
    )
    return tmp_path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


# -- help -----------------------------------------------------------------------------------------


def test_help_shows_the_pipeline_and_every_command() -> None:
    shown = drama("--help")
    assert shown.exit_code == 0
    assert "drama shard ──▶ shards  ──┘        --recipe R.yaml" in shown.stdout
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(main.commands)
    lines = shown.stdout.splitlines()
    for name, command in main.commands.items():
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines), (
            f"{name} ({command.get_short_help_str()})"
        )
    for title in SECTIONS:
        assert f"{title}:" in shown.stdout


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_explains_itself(name: str) -> None:
    shown = drama(name, "--help")
    assert shown.exit_code == 0
    assert f"Usage: main {name}" in shown.stdout
    assert (main.commands[name].help or "").splitlines()[0][:40] in shown.stdout
    assert drama(name, "-h").stdout == shown.stdout


def test_help_is_quick_and_does_not_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from drama.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy', 'faiss'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "drama prune" in done.stdout


def test_the_version() -> None:
    import drama as package

    assert drama("--version").stdout.strip() == f"drama, version {package.__version__}"


# -- bad input ------------------------------------------------------------------------------------

MISSING = {
    "prune": (
        "prune gone --to 0.1b --calibration text.txt --out out",
        "gone: no such model folder or .gguf file; check the path",
    ),
    "prune-target": (
        "prune model --to layers=99 --calibration text.txt --out out",
        "target 'layers=99': layers=99 is larger than the source's 3; "
        "the nearest valid choice is 3",
    ),
    "prune-budget": (
        "prune model --budget 1 --calibration text.txt --out out",
        "budget '1': too small for a sane shape of this source (parameters); the smallest valid "
        "choice is params=",
    ),
    "prune-both": (
        "prune model --to 0.1b --budget 60M --calibration text.txt --out out",
        "--to and --budget: give a shape or a budget to find one for, not both",
    ),
    "prune-candidates": (
        "prune model --budget 100K --candidates 0 --calibration text.txt --out out",
        "candidates: 0; give at least 1",
    ),
    "shard": ("shard records.jsonl gone.jsonl --out out", "gone.jsonl does not exist"),
    "shard-size": (
        "shard records.jsonl --out out --shard-size 12parsec",
        "size '12parsec': write a number with KB, MB or GB, for example 256MB",
    ),
    "shard-size-0": ("shard records.jsonl --out out --shard-size 0MB", "size '0MB': write"),
    "shard-name": (
        "shard records.jsonl --out out --name a/b",
        "shard name 'a/b': use letters, digits, '.', '_' and '-' only",
    ),
    "verify": (
        "verify empty",
        "empty has no manifest.json: it is no folder of shards, or its writing did not end; "
        "write the shards again with `drama shard`",
    ),
    "verify-gone": ("verify gone", "gone is no folder of shards: there is no such folder"),
    "export": ("export gone --out out", "gone: not a model folder (config.json is missing)"),
    "encode-model": (
        "encode corpus.jsonl --model gone --out out",
        "gone: not a model folder",
    ),
    "encode-corpus": ("encode gone.jsonl --model model --out out", "gone.jsonl is no corpus"),
    "encode-broken": ("encode cut.jsonl --model model --out out", "cut.jsonl:2: invalid JSON"),
    "index": (
        "index gone --out out",
        "gone is no vectors folder (manifest.json is missing)",
    ),
    "search": (
        "search --index gone bees",
        "gone is no index folder (meta.json or ids.txt is missing)",
    ),
    "search-no-query": (
        "search --index gone",
        "no query: give one as an argument or a line of standard input",
    ),
    "evaluate": ("evaluate gone --system bm25 --out out", "gone is no test set; give a BEIR"),
    "evaluate-nothing": ("evaluate --system bm25", "no test set to evaluate on; give a BEIR"),
    "evaluate-suite": (
        "evaluate --suite beir13 --system bm25",
        "no suite 'beir13' (did you mean 'beir-13'?); there are beir-13, miracl-18, mldr-13",
    ),
    "evaluate-download": (
        "evaluate gone --download --system bm25",
        "--download fetches a suite; name one with --suite",
    ),
    "evaluate-twice": (
        "evaluate gone --system bm25 --system bm25 --out out",
        "two systems are called bm25; name them: --system NAME=SPEC",
    ),
    "evaluate-same-name": (
        "evaluate gone --system a/x --system b/x --out out",
        "two systems are called x; name them: --system NAME=SPEC",
    ),
    "evaluate-system": (
        "evaluate empty --system nosuch --out out",
        "system 'nosuch': 'nosuch' is none; give 'bm25', a model folder",
    ),
    "report": ("report gone", "gone is no run folder"),
    "report-empty": ("report empty", "empty holds nothing to report"),
}


def contents(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(("line", "message"), MISSING.values(), ids=MISSING.keys())
def test_bad_input_is_one_line_and_leaves_nothing(here: Path, line: str, message: str) -> None:
    before = contents(here)
    result = drama(*line.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    (error,) = result.stderr.splitlines()
    assert error.startswith("drama: error: ")
    assert message in error
    assert contents(here) == before


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("blank.jsonl", "blank.jsonl:2: empty record (a blank line); remove the line"),
        ("hollow.jsonl", "hollow.jsonl:2: empty record"),
        ("broken.jsonl", "broken.jsonl:2: invalid JSON: "),
    ],
)
def test_a_bad_record_stops_sharding_and_the_old_shards_stay(
    here: Path, file: str, message: str
) -> None:
    """Work has begun, so its progress bar stands above the one line of the error."""
    for old in (False, True):
        if old:
            assert drama("shard", "records.jsonl", "--out", "out").exit_code == 0
        before = {path: path.read_bytes() for path in here.glob("out/*")}
        assert bool(before) == old
        result = drama("shard", "records.jsonl", file, "--out", "out")
        assert result.exit_code == 2
        *bar, error = result.stderr.splitlines()
        assert error.startswith(f"drama: error: {message}")
        assert all(row.startswith("shard train ") for row in bar)
        assert {path: path.read_bytes() for path in here.glob("out/*")} == before
        assert not [path for path in here.iterdir() if path.name.startswith(".")]


def test_verify_names_the_damage(here: Path) -> None:
    assert drama("shard", "records.jsonl", "--out", "out").exit_code == 0
    tar = here / "out" / "train-000000.tar"
    sound = tar.read_bytes()
    done = drama("verify", "out")
    assert done.exit_code == 0
    assert "out: 3 records, all sound" in done.stderr

    tar.write_bytes(sound[:-700])
    cut = drama("verify", "out")
    assert cut.exit_code == 2
    (error,) = cut.stderr.splitlines()
    assert "out/train-000000.tar" in error
    assert "write the shards again with `drama shard`" in error

    at = sound.index(b"bread")
    tar.write_bytes(sound[:at] + b"BREAD" + sound[at + 5 :])
    changed = drama("verify", "out")
    assert changed.exit_code == 2
    said = "train-000000.tar: record 0 at byte 0: its checksum differs"
    assert said in changed.stderr.splitlines()[-1]


def test_calibration_text_is_read_before_the_weights(here: Path) -> None:
    before = contents(here)
    result = drama(
        "prune", "model", "--to", "layers=1", "--calibration", "gone.txt", "--out", "out"
    )
    assert result.exit_code == 2
    error = result.stderr.splitlines()[-1]  # below the plan
    assert error == "drama: error: cannot read gone.txt: No such file or directory"
    assert contents(here) == before


def test_wrong_usage_is_click_s_own_message() -> None:
    for line in ("prune", "index x --out y --type ivff", "search --index x -k 0", "nosuch"):
        result = drama(*line.split())
        assert result.exit_code == 2, line
        assert result.stderr.startswith("Usage: main")
        assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_a_real_process_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"query": \n')
    for arguments, message in (
        (("search", "--index", "gone"), "no query"),
        (("shard", "broken.jsonl", "--out", "out"), "broken.jsonl:1: invalid JSON"),
    ):
        done = subprocess_drama(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        error = done.stderr.splitlines()[-1]
        assert error.startswith("drama: error: ")
        assert message in error
        assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jsonl"]


def test_the_launcher_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "launchers" / "train.py"), "--recipe", "gone.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "train: error: recipe gone.yaml does not exist\n"


# -- the commands do what they say ----------------------------------------------------------------


def test_sizes_are_powers_of_1024() -> None:
    from drama.cli_data import parse_bytes

    assert [parse_bytes(s) for s in ("256MB", "1.5kb", "2GB", "7B")] == [2**28, 1536, 2**31, 7]


def test_from_texts_to_answers(here: Path) -> None:
    """Every command on a tiny random model: options arrive, outputs are what the next one reads."""
    dataset = here / "dataset"
    (dataset / "qrels").mkdir(parents=True)
    (dataset / "corpus.jsonl").write_text(Path("corpus.jsonl").read_text())
    (dataset / "queries.jsonl").write_text('{"_id": "q", "text": "what makes bread rise"}\n')
    (dataset / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td2\t1\n")

    def do(line: str, **options: str) -> Result:
        result = drama(*line.split(), **options)
        assert result.exit_code == 0, result.output
        return result

    do("prune model --to layers=2 --calibration text.txt --out small --calibration-tokens 600")
    assert json.loads((here / "small" / "config.json").read_text())["num_hidden_layers"] == 2
    do("export small --out retriever")
    assert json.loads((here / "retriever" / "config.json").read_text())["model_type"] == "eurobert"
    do("encode dataset --model retriever --out vectors --dim 32 --max-tokens 20")
    manifest = json.loads((here / "vectors" / "manifest.json").read_text())
    assert (manifest["dim"], manifest["max_tokens"], manifest["rows"]) == (32, 20, 3)
    built = do("index vectors --out index")
    assert "index: flat index; try: drama search --index index" in built.stderr

    one = do("search --index index -k 2 bees")
    assert one.stdout.splitlines()[0] == "bees"
    assert len(one.stdout.splitlines()) == 1 + 2 * 2
    by_line = do("search --index index -k 2", stdin="bees\n\n  bees  \n")
    assert by_line.stdout == 2 * one.stdout

    judged = do("evaluate dataset --system bm25 --system ours=index --out evaluation --json")
    results = json.loads(judged.stdout)
    assert list(results["systems"]) == ["bm25", "ours"]
    assert results["systems"]["bm25"]["metrics"]["nDCG@10"] == 1.0
    assert (here / "evaluation" / "dataset" / "runs" / "ours.trec").is_file()
    do("report evaluation")
    assert "ours" in (here / "evaluation" / "report.html").read_text()


def test_a_run_with_the_defaults_can_be_averaged_with_the_defaults() -> None:
    (last,) = (option for option in main.commands["average"].params if option.name == "last")
    assert last.default == TrainRecipe.model_fields["keep_last"].default
