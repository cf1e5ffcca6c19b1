"""DRAMA: train small dense retrievers from large language models.

The names below are loaded when they are first used, so that `import drama` and `drama --help` stay
quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drama.encoder import Encoder
    from drama.errors import UserError
    from drama.folder import RetrieverSettings
    from drama.recipe import Recipe
    from drama.retrieve.mteb_model import mteb_model
    from drama.trainer import train

__version__ = "0.1.0"
__all__ = ["Encoder", "Recipe", "RetrieverSettings", "UserError", "mteb_model", "train"]

_HOMES = {
    "Encoder": "drama.encoder",
    "RetrieverSettings": "drama.folder",
    "UserError": "drama.errors",
    "Recipe": "drama.recipe",
    "mteb_model": "drama.retrieve.mteb_model",
    "train": "drama.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'drama' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
