"""How large the evidence is made: on two cores, on one GPU, or tiny, to see that all of it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from drama.errors import UserError, nearest

ENGLISH = ("medquad", "fairytaleqa", "scitldr", "pubmedqa", "qed")
CROPPED = ("wikipedia-en", "debian-de", "debian-es", "debian-ru", "debian-zh_CN")


@dataclass(frozen=True)
class Scale:
    """Sizes of everything, and the machine's speed, from which minutes are estimated.

    shapes: by size, "small" and "large"; the large one is run with fewer starts. batch_examples: of
    a cell of the batch experiment, the same for all sizes. speed: trained tokens a second of the
    small shape. start_s: seconds that a process takes to begin.
    """

    name: str
    seeds: tuple[int, ...]
    shapes: dict[str, str]
    dims: tuple[int, ...]  # Matryoshka widths of the small shape
    vocabulary: str
    calibration_tokens: int
    recover_steps: int
    mask_steps: int
    batch: int
    steps: int
    max_tokens: int  # of a document, in training and evaluation
    token_budget: int  # of a chunk: memory, not mathematics
    workers: int  # that tokenise beside a training
    batches: tuple[int, ...]
    batch_examples: int
    queries: int  # documents that the language model writes a query for; 0: it is not run
    crops: int  # documents of each text that are cropped
    texts: tuple[str, ...]
    suites: dict[str, str]  # by experiment
    nano_shape: str
    nano_tokens: int  # of a document, in training
    nano_steps: int
    nano_batch: int
    speed: float
    start_s: float


CPU = Scale(
    name="cpu", seeds=(0, 1, 2),
    shapes={"small": "layers=6,hidden=384,heads=6,ffn=1024",
            "large": "layers=12,hidden=384,heads=6,ffn=1024"},
    dims=(64, 192, 384), vocabulary="16k", calibration_tokens=8192,
    recover_steps=60, mask_steps=300, batch=64, steps=48, max_tokens=64,
    token_budget=4096, workers=1, batches=(64, 512, 4096), batch_examples=8192,
    queries=150, crops=1500, texts=CROPPED,
    suites={"pruned": "basic", "augment": "wide", "batch": "basic", "shape": "basic",
            "nano": "all"},
    nano_shape="layers=8,hidden=384,heads=6,ffn=1024", nano_tokens=192,
    nano_steps=480, nano_batch=128,
    speed=3200, start_s=8,
)  # fmt: skip
GPU = replace(
    CPU, name="gpu", batches=(64, 256, 1024, 4096),
    calibration_tokens=32768, recover_steps=400, mask_steps=300,
    batch=256, steps=200, max_tokens=192, token_budget=131072, workers=12,
    batch_examples=65536, queries=1000, crops=4000,
    suites={**CPU.suites, "pruned": "wide", "batch": "wide", "shape": "wide"},
    nano_steps=900, nano_batch=1024,
    speed=600_000, start_s=12,
)  # fmt: skip
SMOKE = replace(
    CPU, name="smoke", seeds=(0,), shapes={"small": "layers=1,hidden=64,heads=4,ffn=64",
                                           "large": "layers=2,hidden=64,heads=4,ffn=64"},
    dims=(16, 64), vocabulary="512", calibration_tokens=512, recover_steps=2, mask_steps=2,
    batch=16, steps=2, max_tokens=32, batches=(16, 32), batch_examples=64, queries=0, crops=50,
    texts=("demo",),
    suites=dict.fromkeys(CPU.suites, "smoke"),
    nano_shape="layers=2,hidden=64,heads=4,ffn=64", nano_tokens=64,
    nano_steps=2, nano_batch=64,
)  # fmt: skip
SCALES = {scale.name: scale for scale in (CPU, GPU, SMOKE)}


def find_scale(name: str) -> Scale:
    """A scale by its name.

    Raises:
        UserError: there is none of the name.
    """
    if name not in SCALES:
        raise UserError(f"scale '{name}' is none of {', '.join(SCALES)}{nearest(name, SCALES)}")
    return SCALES[name]
