"""Do other libraries give the embeddings that we give? Asked of a folder that was exported."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from drama.encoder import Encoder
from drama.errors import UserError

TOLERANCE = 1e-5  # float32
SAMPLE = (
    "What causes high blood pressure?",
    "Vaccines train the immune system to recognise a pathogen before it is met.",
    "zinc",
    "Die Hauptstadt von Frankreich ist Paris; 東京は日本の首都です。",
    "A long document. " * 60,
)


def embedding_differences(folder: str | Path, texts: Sequence[str] = SAMPLE) -> dict[str, float]:
    """Return the largest absolute difference to our packed embeddings, by way of computing them.

    transformers (`AutoModel`, no remote code) with one padded batch and text by text, and
    sentence-transformers, padded batch and text by text, where it is installed. float32.

    Raises:
        UserError: a difference above 1e-5, named.
    """
    encoder = Encoder.from_pretrained(folder)
    ours_BD = encoder.encode(list(texts), "document")
    prefix, pooling = encoder.settings.document_prefix, encoder.settings.pooling
    found = {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    for way, batch_size in (("padded", len(texts)), ("unpadded", 1)):
        rows = []
        for first in range(0, len(texts), batch_size):
            batch = tokenizer(
                [prefix + text for text in texts[first : first + batch_size]],
                padding=True,
                truncation=True,
                max_length=encoder.max_tokens,
                return_tensors="pt",
            )
            with torch.no_grad():
                states_BLD = model(**batch).last_hidden_state
            rows.append(_pooled(states_BLD, batch["attention_mask"], pooling))
        found[f"transformers {way}"] = _largest(torch.cat(rows).numpy(), ours_BD)
    if importlib.util.find_spec("sentence_transformers") is not None:
        from sentence_transformers import SentenceTransformer

        retriever = SentenceTransformer(str(folder), device="cpu")
        for way, batch_size in (("padded", len(texts)), ("unpadded", 1)):
            theirs_BD = retriever.encode(
                list(texts), prompt_name="document", batch_size=batch_size, show_progress_bar=False
            )
            found[f"sentence-transformers {way}"] = _largest(theirs_BD, ours_BD)
    worst = max(found, key=lambda way: found[way])
    if found[worst] > TOLERANCE:
        raise UserError(f"{folder}: {worst} differs from our embeddings by {found[worst]:.1e}")
    return found


def _pooled(states_BLD: Tensor, mask_BL: Tensor, pooling: str) -> Tensor:
    if pooling == "mean":
        mask_BL1 = mask_BL[..., None].float()
        return F.normalize((states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1), dim=1)
    last_B = mask_BL.sum(1) - 1
    return F.normalize(states_BLD[torch.arange(len(last_B)), last_B], dim=1)


def _largest(theirs_BD: np.ndarray, ours_BD: np.ndarray) -> float:
    return float(np.abs(theirs_BD - ours_BD).max())
