"""A retriever's folder as a model of mteb 2 (the package, `pip install drama-retriever[mteb]`).

    import drama, mteb

    model = drama.mteb_model("runs/mine/model")
    results = mteb.evaluate(model, tasks=mteb.get_tasks(["SciFact"]))

B texts, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from drama.console import progress
from drama.errors import UserError
from drama.retrieve.models import Model, Precision, open_model
from drama.tokenizer import Kind

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType
except ImportError as error:
    raise UserError(
        f"mteb cannot be imported ({error}); pip install 'drama-retriever[mteb]'"
    ) from None

WINDOW = 2048  # texts that are sorted by length and packed together


def mteb_model(
    path: str | Path,
    *,
    dim: int | None = None,
    max_tokens: int | None = None,
    precision: Precision | None = None,
) -> MtebModel:
    """Open any folder that `drama encode` opens, for `mteb.evaluate`.

    Args:
        dim: the first so many columns, normalised again. Default all.
        max_tokens: where texts are cut. Default the model's.
        precision: see `drama.retrieve.models.open_model`.

    Raises:
        UserError: as `open_model`, or `dim` or `max_tokens` does not fit the model.
    """
    return MtebModel(open_model(path, precision=precision), dim, max_tokens)


class MtebModel(AbsEncoder):
    """Queries get the query's prefix; documents, and the texts of tasks that know no queries, the
    document's. Prompts that a task of mteb brings are not used.

    `mteb_model_meta` carries the hash of the folder's files and the options, so mteb's cache never
    takes one model's results for another's.
    """

    def __init__(self, model: Model, dim: int | None, max_tokens: int | None) -> None:
        self.model = model
        self.dim, self.max_tokens = model.check_dim(dim), model.check_max_tokens(max_tokens)
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"drama/{Path(model.path).resolve().name}",
                "revision": model.sha256,
                "embed_dim": self.dim,
                "max_tokens": self.max_tokens,
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["PyTorch"],
                "open_weights": True,
                "experiment_kwargs": {
                    "dim": self.dim,
                    "max_tokens": self.max_tokens,
                    "precision": model.compute_dtype,
                },
            }
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Vectors [B, D] of norm 1, float32, of all the texts that a loader of mteb gives.

        Raises:
            UserError: the task has no texts.
        """
        texts: list[str] = []
        for batch in inputs:
            if "text" not in batch:
                raise UserError(f"task {task_metadata.name} has no texts; a retriever takes texts")
            texts.extend(batch["text"])
        kind: Kind = "query" if prompt_type == PromptType.query else "document"
        vectors_BD = np.empty((len(texts), self.dim), np.float32)
        with progress(disable=not kwargs.get("show_progress_bar", True)) as shown:
            task = shown.add_task(kind, total=len(texts), note=task_metadata.name)
            for first in range(0, len(texts), WINDOW):
                window = slice(first, first + WINDOW)
                vectors_BD[window] = self.model.encode(
                    texts[window], kind, dim=self.dim, max_tokens=self.max_tokens
                )
                shown.update(task, advance=len(texts[window]))
        return vectors_BD
