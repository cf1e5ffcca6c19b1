"""The folders are importable as `drama.*` alone, from a checkout, a wheel and an sdist."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("data", "ds_configs", "kernels", "launchers", "recipes")
NOT_IN_A_COPY = (
    ".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache",
    ".hypothesis", "tests", "benchmarks", "docs",
)  # fmt: skip


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


# -- the checkout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINKS)
def test_the_folders_enter_the_package_through_relative_links(name: str) -> None:
    link = ROOT / "drama" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert (ROOT / name).is_dir()


def test_the_folders_are_no_regular_packages() -> None:
    found = [path for name in LINKS for path in (ROOT / name).rglob("__init__.py")]
    assert found == []


@pytest.mark.parametrize("name", LINKS)
def test_a_checkout_on_the_path_shadows_nobody_s_package(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.find_spec(name)
    # a namespace package (origin None) yields to a regular one anywhere on the path
    assert spec is None or spec.origin is None or not spec.origin.startswith(str(ROOT))


def test_transformers_loads_a_model_from_the_repository_root() -> None:
    """It probes for Hugging Face's package `kernels`; the working folder is first on the path."""
    code = (
        "import sys; assert sys.path[0] == '';"
        "from transformers import LlamaConfig, LlamaModel;"
        "config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, "
        "num_hidden_layers=1, num_attention_heads=2);"
        "print(sum(p.numel() for p in LlamaModel(config).parameters()))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT, PYTHONSAFEPATH="").strip() == str(
        9 * 8 + 4 * 8 * 8 + 3 * 8 * 8 + 3 * 8  # embedding, attention, MLP, three norms
    )


# -- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree with its links; building leaves nothing behind in the checkout."""
    target = tmp_path_factory.mktemp("copy") / "checkout"
    ignore = shutil.ignore_patterns(*NOT_IN_A_COPY)
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=ignore))


def build(source: Path, out: Path, kind: str) -> Path:
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out),
        str(source), cwd=out.parent)  # fmt: skip
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(copy, tmp_path_factory.mktemp("wheel") / "out", "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's files as pip installs them."""
    target = tmp_path_factory.mktemp("site") / "packages"
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
        "--target", str(target), str(wheel), cwd=target.parent,
    )  # fmt: skip
    return target


def use(installed: Path, where: Path, code: str) -> str:
    """Run Python in a neutral folder on the installed wheel, never on the checkout."""
    guard = (
        "import drama, pathlib, sys\n"
        f"assert pathlib.Path(drama.__file__).is_relative_to({str(installed)!r}), drama.__file__\n"
        f"assert {str(ROOT)!r} not in sys.path\n"
    )
    after = (
        f"\nstray = [n for n, m in sys.modules.items() "
        f"if str(getattr(m, '__file__', '')).startswith({str(ROOT / 'drama')!r})]\n"
        "assert not stray, stray\n"
    )
    return run(
        sys.executable, "-P", "-c", guard + code + after, cwd=where, PYTHONPATH=str(installed)
    )


def shipped(folder: str) -> set[str]:
    """The files that a user's installation needs out of one of the linked folders."""
    return {
        f"drama/{folder}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_everything_and_only_drama(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in LINKS:
        assert shipped(folder) <= names, folder
    assert "drama/py.typed" in names
    prompts = {path.name for path in (ROOT / "drama" / "augment" / "prompts").iterdir()}
    assert {f"drama/augment/prompts/{name}" for name in prompts} <= names
    suites = {path.name for path in (ROOT / "drama" / "retrieve" / "suites").iterdir()}
    assert {f"drama/retrieve/suites/{name}" for name in suites} <= names
    assert "drama/retrieve/published.csv" in names
    assert "drama/serve/page.html" in names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"drama"}


def test_the_wheel_works_from_a_neutral_folder(installed: Path, tmp_path: Path) -> None:
    out = use(
        installed,
        tmp_path,
        """
import json
from pathlib import Path
import drama.data.shards, drama.kernels.infonce
from drama import demo
from drama.recipe import Recipe
recipe = Recipe.load(demo.ROOT / "recipes" / "demo.yaml")
config = recipe.deepspeed_config(world_size=2)
stages = demo.demo_stages(Path("runs/demo"), Path("llm"))
paths = [Path(word) for stage in stages for word in stage.command if word.startswith("/")]
print(json.dumps({
    "stage": config["zero_optimization"]["stage"],
    "root": str(demo.ROOT),
    "missing": [str(path) for path in paths if not path.exists()],
    "num_paths": len(paths),
}))
""",
    )
    facts = json.loads(out)
    assert facts["stage"] == 3
    assert facts["root"] == str(installed / "drama")
    assert facts["missing"] == []
    assert facts["num_paths"] == 6  # calibration, pairs, train.py, demo.yaml, scifact twice


def test_the_wheel_s_commands_and_launcher_start(installed: Path, tmp_path: Path) -> None:
    """`drama shard` on the shipped sample, and the launcher's help."""
    out = use(
        installed,
        tmp_path,
        """
from drama.cli import main
from drama.demo import ROOT
main(["shard", str(ROOT / "data" / "demo" / "pairs.jsonl.xz"), "--out", "shards"],
     standalone_mode=False)
""",
    )
    assert out == ""
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["shards"]
    launcher = installed / "drama" / "launchers" / "train.py"
    shown = run(
        sys.executable, "-P", str(launcher), "--help", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert "--recipe" in shown


def test_a_wheel_built_from_the_sdist_is_the_same(copy: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build(copy, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = build(source, tmp_path / "again", "wheel")
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(again) as b:
        assert set(a.namelist()) == set(b.namelist())
        for name in a.namelist():
            if name.startswith("drama/"):
                assert a.read(name) == b.read(name), name
