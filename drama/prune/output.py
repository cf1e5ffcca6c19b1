"""The folder of a pruned model: checked before the work, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from drama.errors import UserError
from drama.files import replacing_folder
from drama.hf import write_rope_keys, write_sums
from drama.prune.source import quiet

REPORT_NAME = "pruning.json"


def check_out(out: Path, source_path: Path, num_bytes: int, what: str = "the pruned model") -> None:
    """Refuse an output that would destroy something or cannot hold the model.

    Raises:
        UserError: it is the source (a folder or a file), inside it or around it; a file; something
            else; or the disk is too small for `what`.
    """
    source, target = source_path.resolve(), out.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise UserError(f"{out}: the output overlaps the source model {source_path}; name another")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the pruned model")
    if out.is_dir() and any(out.iterdir()) and not (out / REPORT_NAME).is_file():
        raise UserError(
            f"{out}: holds files that are no pruned model (no {REPORT_NAME}), and would be "
            "replaced; name an empty or new folder"
        )
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"{out}: {what} takes {num_bytes / 1e6:,.0f} MB, the disk has "
            f"{free / 1e6:,.0f} MB free; free some or name another disk"
        )


def write_model(small: Any, tokenizer: Any, facts: dict[str, Any], out: Path) -> None:
    """Write the model, its tokenizer and pruning.json in the place of an older pruned model."""
    with replacing_folder(out) as folder:
        with quiet():
            small.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        write_rope_keys(folder)
        text = json.dumps(facts, indent=1, allow_nan=False)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
        write_sums(folder)
