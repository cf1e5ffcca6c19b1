"""The decoder blocks for inference on a CPU in float32: fewer operations, weights laid out once.

The same mathematics as `drama.blocks`, for weights that no longer change:

    x = h / hypot(|h|, sqrt(D eps))          the norm's weight, and sqrt(D), are factors of the next
                                             product's: this is h / sqrt(mean(h^2) + eps)
    q, k, v = x W_qkv                        one product
    q, k = turned (q, k)                     RoPE, both at once
    h = h + attention(q, k, v) W_o           the sum is part of the product
    h = h + (silu(x W_gate) * (x W_up)) W_down        so are silu, product and sum

W are oneDNN's, in the layout that its products read ("prepacked"). Their sums run in the same order
for any number of threads and of rows but one, so a row's bits depend on nothing but the row; where
there is one row, it is multiplied twice.

T packed tokens, B sequences, D width, H query heads, G key/value heads, E head width, F width of
the feed-forward network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drama.attention import PackedLayout, varlen_attention
from drama.data.packing import PackedBatch


class _Product(NamedTuple):
    """A prepacked weight, and the bias where there is one."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Block:
    """floor, ffn_floor: sqrt(D eps) of the norms. head_norms: weights [E] of the norms of q and k,
    times sqrt(E), and sqrt(E eps)."""

    floor: Tensor
    qkv: _Product
    head_norms: tuple[Tensor, Tensor, Tensor] | None
    out: _Product
    ffn_floor: Tensor
    gate: _Product
    up: _Product
    down: _Product


def can_prepack(backbone: Any) -> bool:
    """Whether this machine and this backbone are the ones that `PrepackedBlocks` is for."""
    weight = backbone.embed_tokens.weight
    return (
        (weight.device.type, weight.dtype) == ("cpu", torch.float32)
        # oneDNN on x86: elsewhere its products were not looked at
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and backbone.config.hidden_act == "silu"
    )


class PrepackedBlocks:
    """The blocks of a backbone, which gives its weights away, one block after the other: it can
    neither run nor be saved any more, but its embedding, norm and rotary table stay."""

    @torch.no_grad()
    def __init__(self, backbone: Any) -> None:
        assert can_prepack(backbone)
        attention = backbone.layers[0].self_attn
        self.head_dim, self.scale = int(attention.head_dim), float(attention.scaling)
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.blocks = []
        for layer in backbone.layers:
            self.blocks.append(self._take(layer))
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    del module.weight  # else all are held twice
        backbone.register_state_dict_pre_hook(_refuse)
        self.table: tuple[Tensor, Tensor] | None = None  # of RoPE

    def _take(self, layer: Any) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        before_D, floor = _norm(layer.input_layernorm)
        between_D, ffn_floor = _norm(layer.post_attention_layernorm)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        qkv = torch.cat([p.weight for p in projections]) * before_D
        bias = None
        if attention.q_proj.bias is not None:
            bias = torch.cat([p.bias for p in projections])
        norms = None
        if hasattr(attention, "q_norm"):  # Qwen3 norms every head
            norms = _norm(attention.q_norm)[0], *_norm(attention.k_norm)
        return _Block(
            floor=floor,
            qkv=_prepack(qkv, bias),
            head_norms=norms,
            out=_prepack(attention.o_proj.weight, attention.o_proj.bias),
            ffn_floor=ffn_floor,
            gate=_prepack(mlp.gate_proj.weight * between_D, mlp.gate_proj.bias),
            up=_prepack(mlp.up_proj.weight * between_D, mlp.up_proj.bias),
            down=_prepack(mlp.down_proj.weight, mlp.down_proj.bias),
        )

    def __call__(
        self, backbone: Any, batch: PackedBatch, *, causal: bool, last_token_only: bool
    ) -> Tensor:
        """As `drama.blocks.run_blocks`, without gradients."""
        layout = PackedLayout(batch.cu_seqlens, batch.lengths, causal=causal)
        hidden_TD = backbone.embed_tokens(batch.input_ids_T)
        turn = self._turn(backbone.rotary_emb, batch)
        for block in self.blocks[:-1]:
            hidden_TD = self._run(block, hidden_TD, turn, layout)
        if last_token_only:
            layout = replace(layout, last_query=True)
        return self._run(self.blocks[-1], hidden_TD, turn, layout)

    def _turn(self, rotary: Any, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Cosines [T, 1, E] and sines [T, 1, E / 2], out of a table: made anew they are a fiftieth
        of a short query. Where they depend on the longest text they cannot stand in one."""
        kind, most = rotary.rope_type, max(batch.lengths)
        if "dynamic" in kind or kind == "longrope":
            return self._turn_of(rotary, batch.position_ids_T)
        table = self.table
        if table is None or most > len(table[0]):
            self.table = table = self._turn_of(rotary, torch.arange(2 * most))
        cos_P1E, sin_P1e = table  # not self's, which another thread may have made smaller
        if len(batch.lengths) == 1:
            return cos_P1E[:most], sin_P1e[:most]
        return cos_P1E[batch.position_ids_T], sin_P1e[batch.position_ids_T]

    def _turn_of(self, rotary: Any, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        hidden_11 = torch.empty(1, 1)  # gives the type
        cos_T1E, sin_T1E = (x[0][:, None] for x in rotary(hidden_11, positions_T[None]))
        return cos_T1E, sin_T1E[..., : self.head_dim // 2].contiguous()

    def _run(
        self,
        block: _Block,
        hidden_TD: Tensor,
        turn: tuple[Tensor, Tensor],
        layout: PackedLayout,
    ) -> Tensor:
        """The states after a block, of the tokens that ask."""
        rows = _product(_unit(hidden_TD, block.floor), block.qkv)
        turned = self.heads + self.kv_heads
        qk, v_TGE = torch.split_with_sizes(
            rows.view(len(rows), -1, self.head_dim), (turned, self.kv_heads), 1
        )
        if block.head_norms is not None:
            q_E, k_E, floor = block.head_norms
            qk = _unit(qk, floor)
            qk[:, : self.heads] *= q_E
            qk[:, self.heads :] *= k_E
        q_THE, k_TGE = torch.split_with_sizes(_turned(qk, *turn), (self.heads, self.kv_heads), 1)
        if layout.last_query:
            last_B = layout.cu_seqlens[1:].long() - 1
            q_THE, hidden_TD = q_THE[last_B], hidden_TD[last_B]
        out_THE = varlen_attention(q_THE, k_TGE, v_TGE, layout, self.scale)
        hidden_TD = _product_and(out_THE.flatten(1), block.out, "add", hidden_TD)
        normed_TD = _unit(hidden_TD, block.ffn_floor)
        gate_TF = _product(normed_TD, block.gate, "swish")
        return _product_and(
            _product_and(normed_TD, block.up, "mul", gate_TF), block.down, "add", hidden_TD
        )


def _turned(x_TNE: Tensor, cos_T1E: Tensor, sin_T1e: Tensor) -> Tensor:
    """RoPE. No product and sum in one operation, which a last odd number of a thread would round
    otherwise than a full vector: so torch's complex product gave other bits with three threads."""
    turned_TNE = x_TNE * cos_T1E
    low, high = x_TNE.chunk(2, -1)
    turned_low, turned_high = turned_TNE.chunk(2, -1)
    turned_low.sub_(high * sin_T1e)
    turned_high.add_(low * sin_T1e)
    return turned_TNE


def _norm(norm: Any) -> tuple[Tensor, Tensor]:
    """The factor [W] of what `_unit` gives, and the floor that it takes."""
    weight_W = norm.weight.detach()
    width = len(weight_W)
    floor = torch.tensor((width * norm.variance_epsilon) ** 0.5, dtype=weight_W.dtype)
    return weight_W * width**0.5, floor


def _unit(x: Tensor, floor: Tensor) -> Tensor:
    """x / hypot(|x|, floor) along the last axis."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)


def _prepack(weight_OI: Tensor, bias_O: Tensor | None) -> _Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), None)
    return _Product(packed, None if bias_O is None else bias_O.detach())


def _product(x_TI: Tensor, product: _Product, after: str = "none") -> Tensor:
    """after: none, or "swish", which is silu."""
    if len(x_TI) == 1:
        return _product(x_TI.expand(2, -1), product, after)[:1]
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, *product, after, [], "")
    return y_TO


def _product_and(x_TI: Tensor, product: _Product, after: str, other_TO: Tensor) -> Tensor:
    """after: "add" or "mul" `other_TO`."""
    if len(x_TI) == 1:
        return _product_and(x_TI.expand(2, -1), product, after, other_TO.expand(2, -1))[:1]
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_TI, other_TO, *product, after)
    return y_TO


def _refuse(*_: Any) -> None:
    raise RuntimeError("the blocks' weights were prepacked for inference; load the folder again")
