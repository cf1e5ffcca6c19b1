"""The retriever: a Hugging Face backbone run over packed tokens, pooled to one vector a text.

B texts, T packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel

from drama.attention import ATTENTION_NAME
from drama.blocks import Execution, run_blocks
from drama.data.packing import PackedBatch, count_chunks, even_chunks, pack
from drama.errors import UserError
from drama.folder import Attention, RetrieverSettings, longest_text, read_config, read_settings
from drama.hf import check_sums, exact_rotary
from drama.kernels.pool import PooledNorm, pool_last, pool_mean
from drama.prepacked import PrepackedBlocks, can_prepack
from drama.tokenizer import Kind, TextEncoder, load_tokenizer

LEAST_ROWS = 32  # of a matrix product on the CPU, see `Encoder.embed`


class Encoder(nn.Module):
    """Backbone, tokenizer and settings of one retriever.

    `forward` takes a packed batch and returns unnormalised vectors [B, D]; `embed` takes token rows
    and returns normalised ones. `execution` may be set at any time.
    """

    def __init__(self, backbone: Any, tokenizer: Any, settings: RetrieverSettings) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = settings
        self.execution = Execution()
        self.prepacked: PrepackedBlocks | None = None
        self.text_encoder = TextEncoder(tokenizer, settings.query_prefix, settings.document_prefix)
        # transformers >= 5.2 reads this key in Llama-like models; EuroBERT is never causal
        backbone.config.is_causal = settings.attention == "causal"
        backbone.norm = PooledNorm(backbone.norm, settings.pooling)

    # -- loading ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        settings: RetrieverSettings | None = None,
        rope: Mapping[str, Any] | None = None,
        attention: Attention | None = None,
    ) -> Encoder:
        """Load a retriever folder, ours or another's, or a plain language model's with the default
        settings. Code that a folder brings is never run.

        Args:
            settings: instead of the folder's own; training sets them from the recipe.
            dtype: of the weights; float32 by default.
            rope: keys of transformers' `rope_parameters` that replace the folder's; the model then
                takes texts of `settings.max_tokens`.
            attention: the mask, where the folder does not declare it and settings are its own.

        Raises:
            UserError: not a model folder, a file that is not as `export` wrote it (see
                `drama.hf.check_sums`), weights or tokenizer missing, an architecture, pooling or
                module that is not run here (see `drama.folder`), a mask that nobody declares, or
                that is not the declared one.
        """
        folder = Path(path)
        check_sums(folder)
        config = read_config(folder)
        settings = settings or read_settings(folder, attention)
        if rope:
            # the length that yarn and llama3 stretch from, before it is raised
            made_for = {"original_max_position_embeddings": config.max_position_embeddings}
            stretched = rope.get("rope_type") in ("yarn", "llama3")
            given = {**(made_for if stretched else {}), **config.rope_parameters, **rope}
            config.rope_parameters = given
            config.max_position_embeddings = max(
                config.max_position_embeddings, settings.max_tokens
            )
        tokenizer = load_tokenizer(folder)
        try:
            backbone, info = AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype or torch.float32,
                attn_implementation=ATTENTION_NAME,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder}: the model cannot be loaded: {error}") from error
        if info["missing_keys"]:  # transformers fills them with random numbers
            raise UserError(f"{folder}: weight {min(info['missing_keys'])} is missing")
        encoder = cls(backbone, tokenizer, settings).to(device or "cpu").eval()
        encoder.check_mask(where=str(folder))
        return encoder

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        return self.settings.dim or int(self.backbone.config.hidden_size)

    @property
    def matryoshka_dims(self) -> tuple[int, ...]:
        return self.settings.matryoshka_dims or (self.dim,)

    @property
    def max_tokens(self) -> int:
        return self.settings.max_tokens

    @property
    def longest(self) -> int:
        """Most tokens of a text, see `drama.folder.longest_text`."""
        return longest_text(self.backbone.config)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    # -- the packed forward -------------------------------------------------------------------

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return unnormalised vectors [B, D] in the weights' dtype."""
        execution, norm = self.execution, self.backbone.norm
        at_last = execution.pooled_last_block and self.settings.pooling == "last"
        hidden_XD = self.hidden_states(batch, last_token_only=at_last)
        if at_last and self.prepacked is not None:  # the pooling operator costs a query 0.1 ms
            last_BD: Tensor = norm(hidden_XD)
            return last_BD
        cu_seqlens = batch.cu_seqlens
        if at_last:  # what is left is one row a sequence
            cu_seqlens = torch.arange(
                len(batch.lengths) + 1, dtype=torch.int32, device=hidden_XD.device
            )
        if execution.pooled_norm:
            pooled_BD: Tensor = norm(hidden_XD, cu_seqlens)
            return pooled_BD
        pool = pool_last if self.settings.pooling == "last" else pool_mean
        return pool(norm(hidden_XD), cu_seqlens)

    def hidden_states(self, batch: PackedBatch, *, last_token_only: bool = False) -> Tensor:
        """Return the residual stream after the last block, before the final norm.

        [T, D], or with `last_token_only` the last token of every sequence, [B, D].
        """
        if self.prepacked is not None:
            return self.prepacked(
                self.backbone,
                batch,
                causal=self.settings.attention == "causal",
                last_token_only=last_token_only,
            )
        return run_blocks(
            self.backbone,
            batch,
            causal=self.settings.attention == "causal",
            last_token_only=last_token_only,
            recompute=self.execution.recompute_blocks,
            compiled=self.execution.compiled,
        )

    def prepack(self) -> None:
        """Lay the blocks out for inference on this CPU, see `drama.prepacked`; where that is not
        possible (GPU, another type than float32, no oneDNN) nothing is done.

        The weights move: the encoder can no longer be trained, exported, moved or cast.
        """
        if self.prepacked is None and can_prepack(self.backbone):
            self.prepacked = PrepackedBlocks(self.backbone.requires_grad_(False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        """Move or cast as usual, but keep the rotary frequencies in float32."""
        assert self.prepacked is None, "prepacked weights cannot be moved"
        with exact_rotary(self.backbone.rotary_emb):
            super()._apply(fn, recurse)
        return self

    # -- texts to vectors ---------------------------------------------------------------------

    def tokenize(
        self, texts: Sequence[str], kind: Kind, max_tokens: int | None = None
    ) -> list[list[int]]:
        """Return token ids with prefix and EOS (or what a foreign folder's tokenizer appends), cut
        at `max_tokens` (default: the model's)."""
        return self.text_encoder(texts, kind, max_tokens or self.max_tokens)[0]

    @torch.inference_mode()
    def embed(
        self,
        token_rows: Sequence[Sequence[int]],
        *,
        dim: int | None = None,
        token_budget: int = 8192,
    ) -> np.ndarray:
        """Return L2-normalised float32 vectors [len(token_rows), dim], in the order given.

        Rows are sorted by length, packed and run in chunks of about `token_budget` tokens. On a CPU
        a vector's bits do not depend on the chunk: products of few rows, whose sums run in another
        order, are filled up with texts of one token. They may depend on the number of threads,
        unless the blocks are prepacked, which need no filling either.

        Raises:
            UserError: `dim` is wider than the model, or a row longer than its sliding window.
        """
        width = dim or self.dim
        if width > self.dim:
            raise UserError(f"dim {width} is wider than the model's {self.dim}")
        vectors_BD = np.empty((len(token_rows), width), np.float32)
        if not len(token_rows):
            return vectors_BD
        most = max(map(len, token_rows))
        if most > self.longest and self.longest < self.backbone.config.max_position_embeddings:
            raise UserError(f"{most} tokens go beyond the sliding window of {self.longest}")
        fill = self.device.type == "cpu" and self.prepacked is None
        least = LEAST_ROWS if fill else 0
        order = sorted(range(len(token_rows)), key=lambda i: len(token_rows[i]))
        lengths = [len(token_rows[i]) for i in order]
        for chunk in even_chunks(lengths, count_chunks(lengths, token_budget)):
            rows = [order[i] for i in chunk]
            filling = [[0]] * (least - len(rows))
            packed = pack([*(token_rows[i] for i in rows), *filling]).to(self.device)
            out_BD = self(packed)[: len(rows), :width]
            vectors_BD[rows] = F.normalize(out_BD.float(), dim=1).cpu().numpy()
        return vectors_BD

    def encode(
        self, texts: Sequence[str], kind: Kind, *, dim: int | None = None, token_budget: int = 8192
    ) -> np.ndarray:
        """Tokenise and embed texts: float32 [len(texts), dim], normalised."""
        return self.embed(self.tokenize(texts, kind), dim=dim, token_budget=token_budget)

    # -- the mask probe -----------------------------------------------------------------------

    @torch.no_grad()
    def check_mask(self, where: str = "model") -> None:
        """Run the model and refuse it when its mask is not the declared one.

        Changes the last token of a text and looks at the states of those before it, through the
        packed path and through the model's own padded forward (a short row beside a longer one:
        some overrides are bidirectional only where nothing is padded). All of them, not the first
        alone: that one may be an attention sink whose huge state swallows the change. A neighbour
        in the packed batch must not notice anything.

        Raises:
            UserError: declared and real mask differ.
        """
        causal = self.settings.attention == "causal"
        text = [token % self.backbone.config.vocab_size for token in range(11, 19)]
        changed = [*text[:-1], 20 % self.backbone.config.vocab_size]
        neighbour, length = text + text, len(text)
        before_TD, after_TD = (
            self.hidden_states(pack([row, neighbour]).to(self.device)) for row in (text, changed)
        )
        if not before_TD.isfinite().all():
            raise UserError(f"{where}: the model gives NaN or infinity; the weights are broken")
        if not torch.equal(before_TD[length:], after_TD[length:]):
            raise UserError(f"{where}: packed texts see each other; attention back end is broken")
        seen = {"packed": not torch.equal(before_TD[: length - 1], after_TD[: length - 1])}
        padded = []
        for row in (text, changed):
            batch = torch.tensor([row + text, neighbour], device=self.device)
            mask = torch.ones_like(batch)
            mask[0, length:] = 0
            states_BLD = self.backbone(input_ids=batch, attention_mask=mask).last_hidden_state
            padded.append(states_BLD[0, : length - 1])
        seen["padded"] = not torch.equal(padded[0], padded[1])
        for path, sees_ahead in seen.items():
            if sees_ahead == causal:
                real = "bidirectional" if sees_ahead else "causal"
                raise UserError(
                    f"{where}: declared {self.settings.attention}, but the {path} forward is "
                    f"{real}; check is_causal in config.json and the transformers version"
                )
