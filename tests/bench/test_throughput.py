"""The training step's benchmark, as far as it can be looked at without a step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from drama import fusion
from drama.bench import throughput
from drama.testing import tiny_llama


def test_operators_are_those_of_the_device_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is read on the CPU, and moved later."""

    def ask(backbone: Any, wanted: str, device: torch.device) -> None:
        raise RuntimeError(f"{wanted} on {device.type}")

    monkeypatch.setattr(fusion, "fuse", ask)
    folder = tiny_llama(tmp_path / "model")
    with (
        pytest.raises(RuntimeError, match="auto on cuda"),
        throughput.ours(throughput.Ours(), folder, torch.device("cuda")),
    ):
        pass


def test_the_ablation_changes_one_thing_at_a_time() -> None:
    whole = throughput.Ours(token_budget=4096)
    for way in throughput.ablation(whole):
        changed = [name for name in vars(whole) if getattr(way, name) != getattr(whole, name)]
        assert len(changed) == 1
