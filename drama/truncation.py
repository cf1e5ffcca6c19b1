"""A truncation baked into a retriever folder: a linear module that keeps the first dimensions.

sentence-transformers 5.3 ignores a `truncate_dim` in the folder, and 6.2 cuts after the norm; a
`Dense` module between pooling and norm is read by both, and by the servers that read their modules.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

_WEIGHT = "linear.weight"
_IDENTITY = "torch.nn.modules.linear.Identity"


def write_truncation(module: Path, width: int, dim: int) -> None:
    """Write the files of a module that keeps the first `dim` of `width` dimensions."""
    module.mkdir()
    settings = {
        "in_features": width,
        "out_features": dim,
        "bias": False,
        "activation_function": _IDENTITY,
    }
    (module / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file({_WEIGHT: torch.eye(dim, width)}, module / "model.safetensors")


def baked_dim(folder: Path) -> int | None:
    """The width to which a folder's linear module cuts vectors; None where there is none, or one
    that does anything else."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        (path,) = (one["path"] for one in modules if one["type"].endswith(".Dense"))
        settings: dict[str, Any] = json.loads((folder / path / "config.json").read_text("utf-8"))
        weights = load_file(folder / path / "model.safetensors")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError):
        return None
    plain = settings.get("activation_function") == _IDENTITY and not settings.get("use_residual")
    weight = weights.get(_WEIGHT)
    if not plain or weight is None or len(weights) != 1 or weight.dim() != 2:
        return None
    dim, width = weight.shape
    return dim if torch.equal(weight.float(), torch.eye(dim, width)) else None
