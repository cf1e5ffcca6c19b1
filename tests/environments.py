"""Other versions of a library beside the installed one, for tests of what consumers read.

An environment is a virtual environment of its own that holds the named requirements and sees this
one's packages behind them, so that only what is named differs. pip gets no dependencies: whoever
names a version that needs others names those too.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


def environment_with(*requirements: str) -> Path:
    """The python of an environment with these requirements, such as `sentence-transformers==5.3.*`.

    Made once and kept under `$XDG_CACHE_HOME`; skips the test where pip finds no package index.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drama-tests"
    cache.mkdir(parents=True, exist_ok=True)
    ours = sysconfig.get_path("purelib")
    key = hashlib.sha256("\n".join([sys.version, ours, *sorted(requirements)]).encode())
    folder = cache / key.hexdigest()[:16]
    python, done = folder / "bin" / "python", folder / "done"
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not done.is_file():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *requirements]
            made = subprocess.run(install, capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"cannot install {', '.join(requirements)}: {made.stderr[-300:]}")
            # a .pth file's folder comes after the environment's own, so what is named wins
            (own,) = folder.glob("lib/python*/site-packages")
            (own / "behind.pth").write_text(ours + "\n", encoding="utf-8")
            done.touch()
    return python
