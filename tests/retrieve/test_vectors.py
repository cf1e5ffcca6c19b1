"""What is no whole folder of vectors is refused by what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from drama.errors import UserError
from drama.retrieve.encode import encode_corpus
from drama.retrieve.vectors import read_vectors


def _edit_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_read_vectors_is_strict(dataset, model, tmp_path):
    folder = tmp_path / "v"
    with pytest.raises(UserError, match=r"v is no vectors folder \(manifest.json is missing\)"):
        read_vectors(folder)
    encode_corpus(dataset, model, folder)
    good = (folder / "manifest.json").read_text()

    _edit_manifest(folder, dim=32)
    with pytest.raises(UserError, match=r"of shape \(8, 64\), the manifest says .*\(8, 32\)"):
        read_vectors(folder)
    _edit_manifest(folder, dim="64")
    with pytest.raises(UserError, match=r"manifest\.json: 'dim' is missing, unknown or of the"):
        read_vectors(folder)
    _edit_manifest(folder, format_version=2)
    with pytest.raises(UserError, match=r"manifest\.json: format version 2, this version of"):
        read_vectors(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is not readable JSON"):
        read_vectors(folder)
    (folder / "manifest.json").write_text(good)

    stored = np.load(folder / "vectors.npy", mmap_mode="r+")
    stored[2, 7] = np.nan
    stored.flush()
    with pytest.raises(UserError, match=r"the vector of document 'd3' is not finite"):
        read_vectors(folder)
    stored[2, 7] = 0
    stored.flush()
    (folder / "ids.txt").write_text("d1\nd2\n")
    with pytest.raises(UserError, match=r"ids\.txt holds 2 ids for 8 vectors"):
        read_vectors(folder)
    with (folder / "vectors.npy").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(UserError, match=r"vectors\.npy cannot be read"):
        read_vectors(folder)
