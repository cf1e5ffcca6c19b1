"""Run a model under masks and compute only what is alive in them.

A unit with z = 0 adds nothing and gets no gradient, neither do its weights, so leaving it out is
exact, and a step gets cheaper as masks close: every projection runs on the rows and columns of the
living units. Each mask enters at one place, where it folds into a weight:

    hidden channel                 weight of the norms that read it; the mean square runs over
                                   living channels only
    KV group, query head, layer    columns of o_proj
    FFN channel, layer             columns of down_proj
    layer                          biases of o_proj and down_proj too

so embeddings may be tied, and a masked model equals the cut one to rounding (`fold`). A layer whose
z is 0 runs one token and adds zero: its modules are called on every rank in every step, as ZeRO 3
and the reduction of gradients need it.

B rows, N tokens a row, L layers, D hidden channels, C = heads * head_dim channels of the attention
output, I FFN channels; R and K are what lives of a weight's rows and columns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drama.prune.masks import Gates
from drama.prune.shape import Shape
from drama.prune.statistics import norms_of
from drama.prune.surgery import Plan, head_rows, query_heads

ATTENTION_IN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FFN_IN = ("mlp.gate_proj", "mlp.up_proj")
OUT = ("self_attn.o_proj", "mlp.down_proj")


def _take(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """weight[rows][:, columns]; None is all of them."""
    if rows is not None:
        weight = weight.index_select(0, rows)
    if columns is not None:
        weight = weight.gather(1, columns.expand(weight.shape[0], -1))
    return weight


class _LivingProduct(torch.autograd.Function):
    """x [T, K] times the living part of a weight, its columns scaled: [T, R].

    Keeps no part of the weight for the backward pass but takes it once more: under ZeRO 3 the
    engine gathers the whole one again by then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
        scale_K: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_TK, weight, rows, columns, scale_K)
        living_RK = _take(weight, rows, columns)
        if scale_K is not None:
            living_RK = (living_RK * scale_K).to(weight.dtype)
        return x_TK @ living_RK.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TR,) = grads
        x_TK, weight, rows, columns, scale_K = ctx.saved_tensors
        living_RK = _take(weight, rows, columns)
        scaled_RK = living_RK if scale_K is None else (living_RK * scale_K).to(weight.dtype)
        grad_x = grad_TR @ scaled_RK if ctx.needs_input_grad[0] else None
        grad_weight = grad_scale = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[4]:
            grad_RK = grad_TR.T @ x_TK
            if ctx.needs_input_grad[4]:
                grad_scale = (grad_RK.to(scale_K.dtype) * living_RK).sum(0)
            if ctx.needs_input_grad[1]:
                if scale_K is not None:
                    grad_RK = (grad_RK * scale_K).to(weight.dtype)
                grad_weight = _put(grad_RK, weight.shape, rows, columns)
        return grad_x, grad_weight, None, None, grad_scale


def _put(grad_RK: Tensor, shape: torch.Size, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """The adjoint of `_take`: zeros of `shape` with `grad_RK` at its rows and columns."""
    if columns is not None:
        wide = grad_RK.new_zeros(grad_RK.shape[0], shape[1])
        grad_RK = wide.scatter_(1, columns.expand(grad_RK.shape[0], -1), grad_RK)
    if rows is not None:
        grad_RK = grad_RK.new_zeros(shape).index_copy_(0, rows, grad_RK)
    return grad_RK


class LivingLinear(nn.Linear):
    """A projection cut to its living rows and columns."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    scale_K: Tensor | None = None
    bias_scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat_TK = x.reshape(-1, x.shape[-1])
        y: Tensor = _LivingProduct.apply(
            flat_TK, self.weight, self.rows, self.columns, self.scale_K
        )
        if self.bias is not None:
            bias = self.bias if self.rows is None else self.bias[self.rows]
            if self.bias_scale is not None:
                bias = (bias * self.bias_scale).to(bias.dtype)
            y = y + bias
        return y.view(*x.shape[:-1], y.shape[-1])


class _LivingNorm(nn.Module):
    """RMSNorm over the living channels, mixed into the model's own class."""

    weight: Tensor
    variance_epsilon: float
    columns: Tensor | None = None
    scale_K: Tensor | None = None
    support_K: Tensor | None = None  # 1 where a channel lives, 0 where it only fills up the width

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        if self.support_K is None:
            mean_square = wide.square().mean(-1, keepdim=True)
        else:
            mean_square = (wide.square() @ self.support_K.to(wide.dtype))[..., None]
            mean_square = mean_square / self.support_K.sum().clamp_min(1)
        unit = (wide * torch.rsqrt(mean_square + self.variance_epsilon)).to(x.dtype)
        weight = self.weight
        if self.columns is not None:
            weight = weight[self.columns]
        if self.scale_K is not None:
            weight = (weight * self.scale_K).to(x.dtype)
        return weight * unit


class _LivingEmbedding(nn.Embedding):
    """The living channels of every token's row."""

    columns: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x if self.columns is None else x.index_select(-1, self.columns)


class _LivingLayer(nn.Module):
    """A layer that adds nothing where its mask is closed."""

    closed: bool = False

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not self.closed:
            whole: Tensor = super().forward(hidden_states, **kwargs)
            return whole
        token = hidden_states[:1, :1]
        kwargs["position_embeddings"] = tuple(x[:1, :1] for x in kwargs["position_embeddings"])
        kwargs["position_ids"] = None
        kwargs["attention_mask"] = None
        # both of its outputs are scaled by z = 0: the difference is zero, and so are its gradients
        return hidden_states + (super().forward(token, **kwargs) - token)


@dataclass(frozen=True)
class _Layer:
    """What lives of one layer; indices are int64, None is everything."""

    closed: bool
    places: int  # query heads that live in a group
    q_rows: Tensor | None
    kv_rows: Tensor | None
    ffn_rows: Tensor | None
    attention: Tensor | None  # scales [C'] of o_proj's columns
    ffn: Tensor | None  # scales [I'] of down_proj's columns
    out: Tensor | None  # z of the layer


class Alive:
    """What lives under some masks: indices, and the scales of what lives.

    Each scale is a leaf whose gradient the passes of a step add up; `backward` hands the sums on to
    the masks' parameters.

    hidden, norm, support: indices [K] of the living hidden channels, their scales, and 1 where one
    lives and 0 where it only fills up; None is all of them, no scale, no filling. layers: the same
    of every layer.

    multiple: the numbers of living hidden and FFN channels are filled up to multiples of this with
    closed ones, since the tensor cores of a GPU want widths of 64; they change no result.
    """

    def __init__(self, gates: Gates, source: Shape, *, multiple: int = 1) -> None:
        self.source, self.multiple = source, multiple
        self.gates = gates
        self._pairs: list[tuple[Tensor, Tensor]] = []
        on_cpu = {kind: kept.cpu() for kind, kept in gates.kept.items()}
        z = gates.z
        self._device = next((x.device for x in z.values()), torch.device("cpu"))
        self.hidden: Tensor | None = None
        self.norm: Tensor | None = None
        self.support: Tensor | None = None
        if "hidden" in z:
            self.hidden = self._index(on_cpu["hidden"])
            self.norm = self._leaf(z["hidden"][self.hidden])
            living = gates.kept["hidden"][self.hidden]
            if len(self.hidden) > int(on_cpu["hidden"].sum()):
                self.support = living.float()
        self.layers = [self._layer(i, on_cpu) for i in range(source.layers)]

    def _layer(self, i: int, on_cpu: dict[str, Tensor]) -> _Layer:
        source, z = self.source, self.gates.z
        of_layer = z["layer"][i] if "layer" in z else None
        groups, places = list(range(source.kv_heads)), list(range(source.group))
        of_heads = []  # factors [heads that live]
        if "kv_group" in z:
            groups = self._units(on_cpu["kv_group"][i])
        if "query_head" in z:
            places = self._units(on_cpu["query_head"][i])
        if "kv_group" in z:
            of_heads.append(z["kv_group"][i][groups].repeat_interleave(len(places)))
        if "query_head" in z:
            of_heads.append(z["query_head"][i][places].repeat(len(groups)))
        heads = query_heads(groups, places, source.group)
        attention = ffn = ffn_rows = None
        if of_heads or of_layer is not None:
            factors = of_heads if of_layer is None else [*of_heads, of_layer]
            scale = functools.reduce(torch.mul, factors).expand(len(heads))
            attention = self._leaf(scale.repeat_interleave(source.head_dim))
        if "ffn" in z:
            ffn_rows = self._index(on_cpu["ffn"][i])
            scale = z["ffn"][i][ffn_rows]
            ffn = self._leaf(scale if of_layer is None else scale * of_layer)
        elif of_layer is not None:
            ffn = self._leaf(of_layer.expand(source.ffn))

        def rows_of(living: list[int], count: int) -> Tensor | None:
            rows = head_rows(living, source.head_dim) if len(living) < count else None
            return None if rows is None else rows.to(self._device)

        return _Layer(
            closed="layer" in z and not bool(on_cpu["layer"][i]),
            places=len(places),
            q_rows=rows_of(heads, source.heads),
            kv_rows=rows_of(groups, source.kv_heads),
            ffn_rows=ffn_rows,
            attention=attention,
            ffn=ffn,
            out=None if of_layer is None else self._leaf(of_layer),
        )

    def _units(self, kept: Tensor) -> list[int]:
        """Numbers of the kept units; the first one where none is, at z = 0: a width is never 0."""
        return kept.nonzero()[:, 0].tolist() or [0]

    def _index(self, kept: Tensor) -> Tensor:
        """The same as int64, filled up to the next multiple with the first closed units."""
        count = max(1, int(kept.sum()))
        wanted = min(len(kept), -(-count // self.multiple) * self.multiple)
        first = (~kept).to(torch.uint8).argsort(stable=True)[:wanted]
        return first.sort().values.to(self._device)

    def _leaf(self, scale: Tensor) -> Tensor:
        if not scale.requires_grad:
            return scale
        leaf = scale.detach().requires_grad_()
        self._pairs.append((scale, leaf))
        return leaf

    def gradients(self) -> Tensor:
        """What the passes have added up, all leaves in one vector, for a reduction over ranks."""
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for _, x in self._pairs]
        return torch.cat([g.flatten() for g in grads]) if grads else torch.zeros(0)

    def backward(self, gradients: Tensor, penalty: Tensor) -> None:
        """Bring `gradients`, laid out as `gradients()`, and those of a scalar to the parameters."""
        parts = gradients.split([leaf.numel() for _, leaf in self._pairs])
        scales = [scale for scale, _ in self._pairs]
        grads: list[Tensor | None] = [
            part.view_as(scale) for part, scale in zip(parts, scales, strict=True)
        ]
        torch.autograd.backward([*scales, penalty], [*grads, None])

    def share(self) -> float:
        """Share of the blocks' weights that is computed with."""
        source = self.source
        hidden = source.hidden if self.hidden is None else len(self.hidden)
        heads = 2 * (source.heads + source.kv_heads) * source.head_dim
        living = 0
        for layer in self.layers:
            if not layer.closed:
                q = source.heads * source.head_dim if layer.q_rows is None else len(layer.q_rows)
                kv = source.kv_heads * source.head_dim
                kv = kv if layer.kv_rows is None else len(layer.kv_rows)
                ffn = source.ffn if layer.ffn_rows is None else len(layer.ffn_rows)
                living += hidden * (2 * (q + kv) + 3 * ffn)
        return living / (source.layers * source.hidden * (heads + 3 * source.ffn))

    def plan(self) -> Plan:
        """The plan that keeps what lives; fold first. All layers must have one shape."""
        source, kept = self.source, self.gates.kept
        layers = self._units(kept["layer"]) if "layer" in kept else list(range(source.layers))

        def per_layer(kind: str, size: int) -> tuple[tuple[int, ...], ...]:
            if kind not in kept:
                return (tuple(range(size)),) * len(layers)
            return tuple(tuple(self._units(kept[kind][i])) for i in layers)

        hidden = self._units(kept["hidden"]) if "hidden" in kept else range(source.hidden)
        return Plan(
            layers=tuple(layers),
            hidden=tuple(hidden),
            kv_groups=per_layer("kv_group", source.kv_heads),
            query_heads=per_layer("query_head", source.group),
            ffn=per_layer("ffn", source.ffn),
            norm_scales=(1.0,) * (2 * len(layers) + 1),
        )


def make_maskable(model: Any) -> None:
    """Let `install` put masks on a model; without any it computes what it did, weights and names
    stay. Once for each model."""

    def become(module: nn.Module, mixin: type[nn.Module]) -> None:
        if not issubclass(type(module), mixin):
            module.__class__ = type(f"{mixin.__name__}{type(module).__name__}",
                                    (mixin, type(module)), {})  # fmt: skip

    for layer in model.model.layers:
        become(layer, _LivingLayer)
        for name in (*ATTENTION_IN, *FFN_IN, *OUT):
            become(layer.get_submodule(name), LivingLinear)
    for norm in norms_of(model):
        become(norm, _LivingNorm)
    become(model.model.embed_tokens, _LivingEmbedding)
    become(model.lm_head, LivingLinear)


def install(model: Any, alive: Alive) -> None:
    """Put masks on a maskable model, in the place of those before."""
    for norm in norms_of(model):
        norm.columns, norm.scale_K, norm.support_K = alive.hidden, alive.norm, alive.support
    model.model.embed_tokens.columns = model.lm_head.columns = alive.hidden
    for layer, lives in zip(model.model.layers, alive.layers, strict=True):
        layer.closed = lives.closed
        layer.self_attn.num_key_value_groups = lives.places
        rows = (lives.q_rows, lives.kv_rows, lives.kv_rows)
        for name, of_head in zip(ATTENTION_IN, rows, strict=True):
            linear = layer.get_submodule(name)
            linear.rows, linear.columns = of_head, alive.hidden
        for name in FFN_IN:
            linear = layer.get_submodule(name)
            linear.rows, linear.columns = lives.ffn_rows, alive.hidden
        inner = ((lives.q_rows, lives.attention), (lives.ffn_rows, lives.ffn))
        for name, (columns, scale) in zip(OUT, inner, strict=True):
            linear = layer.get_submodule(name)
            linear.rows, linear.columns = alive.hidden, columns
            linear.scale_K, linear.bias_scale = scale, lives.out


@torch.no_grad()
def fold(model: Any, alive: Alive) -> None:
    """Multiply the masks into a model's weights, each once: `cut` along `alive.plan()` then gives
    the logits of the masked model."""
    for norm in norms_of(model):
        if alive.norm is not None:
            norm.weight[alive.hidden] *= alive.norm.to(norm.weight.dtype)
    for layer, lives in zip(model.model.layers, alive.layers, strict=True):
        inner = ((lives.q_rows, lives.attention), (lives.ffn_rows, lives.ffn))
        for name, (columns, scale) in zip(OUT, inner, strict=True):
            linear = layer.get_submodule(name)
            if scale is not None:
                where = slice(None) if columns is None else columns
                linear.weight[:, where] *= scale.to(linear.weight.dtype)
            if lives.out is not None and linear.bias is not None:
                linear.bias *= lives.out.to(linear.bias.dtype)
