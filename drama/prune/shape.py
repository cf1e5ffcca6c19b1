"""The shape of a Llama: read it, name a target, count what a cut saves."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rich.table import Table
from transformers import PreTrainedConfig

from drama.errors import UserError, nearest


@dataclass(frozen=True)
class Shape:
    """The sizes that pruning changes, and what it keeps: `head_dim`, biases of the attention's and
    the feed-forward's projections, norms on queries and keys."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape:
        """Read the shape from a configuration."""
        head_dim = getattr(config, "head_dim", None)
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            ffn=config.intermediate_size,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            attention_bias=getattr(config, "attention_bias", False),
            mlp_bias=getattr(config, "mlp_bias", False),
            qk_norm=config.model_type == "qwen3",
        )

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return ",".join(f"{name}={getattr(self, name)}" for name in KEYS)


@dataclass(frozen=True)
class Parameters:
    """Number of weights by part; `head` is 0 where the output layer is the embedding itself."""

    embedding: int
    head: int
    attention: int
    mlp: int
    norms: int

    @property
    def non_embedding(self) -> int:
        return self.attention + self.mlp + self.norms

    @property
    def total(self) -> int:
        return self.non_embedding + self.embedding + self.head


KEYS = ("layers", "hidden", "heads", "kv_heads", "ffn")

# The paper's shapes (DRAMA, section 4.3 and appendix A.3), with the source's groups of four query
# heads to a KV head kept.
NAMED: dict[str, dict[str, int]] = {
    "0.1b": {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 3, "ffn": 3072},
    "0.3b": {"layers": 16, "hidden": 1024, "heads": 16, "kv_heads": 4, "ffn": 4096},
}


def parse_target(text: str, source: Shape) -> Shape:
    """Read a target shape: a name ("0.1b", "0.3b") or "layers=12,hidden=768,heads=12,ffn=3072".

    Keys that are not named keep the source's value. Of `heads` and `kv_heads` one is enough: the
    other follows from the source's group size, and whole groups are cut. Both together may also
    name smaller groups: heads=6,kv_heads=3 of a source with 9 and 3 keeps two query heads of each
    group, the same ones in all groups of a layer.

    Raises:
        UserError: an unknown name or key, a value that is no whole number, or a shape that cannot
            be cut from `source`; the message names the nearest valid choice.
    """
    name = text.strip().lower()
    sizes = NAMED[name] if name in NAMED else _parse_pairs(text)
    if "heads" in sizes and "kv_heads" not in sizes:
        _check_whole_groups(sizes["heads"], source, text)
        sizes = sizes | {"kv_heads": sizes["heads"] // source.group}
    if "kv_heads" in sizes and "heads" not in sizes:
        sizes = sizes | {"heads": sizes["kv_heads"] * source.group}
    target = replace(source, **sizes)  # type: ignore[arg-type]
    _check(target, source, text)
    return target


def _parse_pairs(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UserError(
                f"target '{text}': '{pair.strip()}' is neither a named shape "
                f"({', '.join(NAMED)}) nor KEY=NUMBER{nearest(key, [*NAMED, *KEYS])}"
            )
        if key not in KEYS:
            raise UserError(
                f"target '{text}': unknown key '{key}'{nearest(key, KEYS)}; "
                f"known: {', '.join(KEYS)}"
            )
        if key in sizes:
            raise UserError(f"target '{text}': {key} is given twice; give it once")
        if not re.fullmatch(r"[+-]?\d+", value):
            raise UserError(f"target '{text}': {key}={value} is not a whole number")
        sizes[key] = int(value)
    return sizes


def _check_whole_groups(heads: int, source: Shape, text: str) -> None:
    group = source.group
    if heads >= 1 and heads % group:
        near = min(max(round(heads / group), 1), source.kv_heads) * group
        raise UserError(
            f"target '{text}': heads={heads} is not a whole number of KV groups (the source has "
            f"{group} query heads to a KV head); the nearest valid choice is heads={near}, or name "
            "kv_heads too to cut inside the groups"
        )


def _check(target: Shape, source: Shape, text: str) -> None:
    for key in KEYS:
        value, limit = getattr(target, key), getattr(source, key)
        if value < 1:
            raise UserError(f"target '{text}': {key}={value}; the smallest valid choice is 1")
        if value > limit:
            raise UserError(
                f"target '{text}': {key}={value} is larger than the source's {limit}; "
                f"the nearest valid choice is {limit}"
            )
    kv_heads = target.kv_heads
    if target.heads % kv_heads or target.heads > kv_heads * source.group:
        near = min(max(round(target.heads / kv_heads), 1), source.group) * kv_heads
        raise UserError(
            f"target '{text}': heads={target.heads} with kv_heads={kv_heads}: every KV head needs "
            f"the same number of query heads, 1 to {source.group}; the nearest valid choice is "
            f"heads={near}"
        )
    if target.hidden % target.heads:
        # a rule of transformers' configurations, EuroBERT's too, even where head_dim is explicit
        near = max(round(target.hidden / target.heads), 1) * target.heads
        if near > source.hidden:
            near = source.hidden // target.heads * target.heads
        whole = target.heads == kv_heads * source.group
        choices = {  # another number of whole groups, or of heads in each
            heads: f" or heads={heads}" + f",kv_heads={heads // source.group}" * whole
            for heads in range(source.group if whole else kv_heads, source.heads + 1,
                               source.group if whole else kv_heads)
            if target.hidden % heads == 0 and (whole or heads <= kv_heads * source.group)
        }  # fmt: skip
        other = min(choices, key=lambda heads: abs(heads - target.heads), default=None)
        raise UserError(
            f"target '{text}': hidden={target.hidden} is not a multiple of heads={target.heads}; "
            f"the nearest valid choice is hidden={near}" + (choices[other] if other else "")
        )


def count_parameters(shape: Shape, vocab_size: int, tied: bool) -> Parameters:
    """Count the weights by part; biases count with their projections."""
    query = shape.heads * shape.head_dim
    key_value = shape.kv_heads * shape.head_dim
    attention = shape.hidden * 2 * (query + key_value)
    attention += shape.attention_bias * (query + 2 * key_value + shape.hidden)
    mlp = 3 * shape.hidden * shape.ffn + shape.mlp_bias * (2 * shape.ffn + shape.hidden)
    norms = 2 * shape.hidden + shape.qk_norm * 2 * shape.head_dim
    return Parameters(
        embedding=vocab_size * shape.hidden,
        head=0 if tied else vocab_size * shape.hidden,
        attention=shape.layers * attention,
        mlp=shape.layers * mlp,
        norms=shape.layers * norms + shape.hidden,
    )


def flops_per_token(shape: Shape, length: int = 512) -> int:
    """FLOPs of one token's forward pass as an encoder, in a bidirectional text of `length` tokens.

    Two per weight of the blocks, and 4 * length per attention channel (QK^T and PV). The output
    layer is not run by an encoder; norms and softmax are left out.
    """
    counted = count_parameters(shape, vocab_size=0, tied=True)
    attention = 4 * length * shape.heads * shape.head_dim * shape.layers
    return 2 * (counted.attention + counted.mlp) + attention


def plan_table(
    source: Shape, target: Shape, *, vocab_size: int, tied: bool, kept_tokens: int | None = None
) -> Table:
    """Lay the two shapes, their parameters (millions) and GFLOPs per token side by side.

    kept_tokens: rows that a vocabulary cut leaves of the embedding's `vocab_size`.
    """
    table = Table(title="pruning plan")
    for heading in ("", "before", "after", "kept"):
        table.add_column(heading, justify="right" if heading else "left")
    rows: list[tuple[str, float, float, str]] = [
        (key, getattr(source, key), getattr(target, key), ",d") for key in KEYS
    ]
    before = count_parameters(source, vocab_size, tied)
    after = count_parameters(target, kept_tokens or vocab_size, tied)
    for part in ("embedding", "head", "attention", "mlp", "norms", "non_embedding", "total"):
        label = f"{part.replace('_', '-')} (M)"
        rows.append((label, getattr(before, part) / 1e6, getattr(after, part) / 1e6, ",.2f"))
    gflops = (flops_per_token(source) / 1e9, flops_per_token(target) / 1e9)
    rows.append(("GFLOPs per token, 512 long", *gflops, ",.3f"))
    for label, old, new, form in rows:
        kept = f"{new / old:.0%}" if old else ""
        table.add_row(label, format(old, form), format(new, form), kept)
    return table
