"""A teacher's vectors of every text of a training set, on disk, found by the text's id.

    FOLDER/ids.npy       int64, ascending: the id of each query and document
           vectors.npy   float16 [texts, width], normalised, in that order; read as it is needed
           manifest.json teacher and shards; written last

`drama teach` writes such a folder (`teach.py`).

X texts asked for, E width of the teacher.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drama.errors import UserError


class TeacherVectors:
    """What `drama teach` wrote; memory holds the ids only.

    Raises:
        UserError: not such a folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").is_file():
            raise UserError(
                f"{folder} holds no teacher's vectors (manifest.json is missing); make them with "
                "`drama teach`"
            )
        self.ids = np.load(self.folder / "ids.npy", allow_pickle=False)
        self.vectors = np.load(self.folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        if len(self.ids) != len(self.vectors):
            raise UserError(f"{folder}: ids.npy and vectors.npy differ in length; make them again")

    def look_up(self, ids_X: Tensor) -> Tensor:
        """Vectors of these texts, float32 [X, E].

        Raises:
            UserError: a text that the teacher has not seen.
        """
        wanted = ids_X.numpy()
        at = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        if not np.array_equal(self.ids[at], wanted):
            raise UserError(
                f"{self.folder} lacks texts of this batch; run `drama teach` over data.shards"
            )
        return torch.from_numpy(self.vectors[at].astype(np.float32))
