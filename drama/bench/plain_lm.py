"""Language-model training as transformers does it: its model, its loss, its logits whole."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from drama.metrics import Stopwatch
from drama.optimizer import WAITLESS, adamw, step_engine
from drama.prune.source import find_llm, load_model, read_config
from drama.settings import Optimization


class PlainLM:
    """On the same engine, with the same optimizer. config: the DeepSpeed JSON."""

    def __init__(
        self, path: Path, train: Optimization, config: dict[str, Any], device: torch.device
    ) -> None:
        self.device = device
        where = find_llm(path)
        model = load_model(where, read_config(where)).train()
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(model, train, device, offloaded=False),
            config=config | {"steps_per_print": 2**31, "timers": WAITLESS},
        )
        self.grad_norm = 0.0
        self.seconds: dict[str, float] = {}

    def step(self, passes: Sequence[Mapping[str, Tensor]]) -> float:
        """One step over passes of equal weight, each the arguments of the model's forward; the mean
        loss."""
        loss = self.backward(passes)
        start = time.perf_counter()
        self.grad_norm = step_engine(self.engine)
        self.seconds["step"] = time.perf_counter() - start
        return loss

    def backward(self, passes: Sequence[Mapping[str, Tensor]]) -> float:
        """The same without the optimizer."""
        watch, total = Stopwatch(self.device), 0.0
        for number, batch in enumerate(passes, 1):
            on_device = {name: x.to(self.device) for name, x in batch.items()}
            loss = self.engine(**on_device, use_cache=False).loss
            watch.lap("forward")
            self.engine.backward(loss)
            watch.lap("backward")
            if number < len(passes):
                self.engine.step()
            total += loss.item() / len(passes)
        self.seconds = watch.seconds
        return total
