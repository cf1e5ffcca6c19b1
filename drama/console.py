"""One console for everything that people watch: tables, notes and progress bars, on stderr."""

from __future__ import annotations

import os

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# of several ranks the first one speaks
console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")


def quiet_libraries() -> None:
    """Leave the console to our own lines; call it before transformers is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def progress(*, disable: bool = False) -> Progress:
    """A progress display: name, bar, share, count, elapsed, remaining, and a free `note` field.

    Use as a context manager; `add_task(name, total=n, note="")`, then `update(task, advance=1,
    note="...")`.
    """
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=disable,
    )


def help_text(docstring: str) -> str:
    """A script's docstring for Click's help: lines stay as they are, commands included."""
    return docstring.replace("\n\n", "\n\n\b\n")
