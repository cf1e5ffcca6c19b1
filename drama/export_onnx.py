"""A retriever as an ONNX graph: onnx/model.onnx, where sentence-transformers and TEI look for it.

    input_ids, attention_mask    int64 [B, L], both axes free
    last_hidden_state            float32 [B, L, H], for consumers that pool themselves
    sentence_embedding           float32 [B, D], pooled, cut and of norm 1

The mask is built inside the graph, so a bidirectional retriever stays one whatever runs it.

B texts, L tokens of the longest, H the backbone's width, D the vectors'.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from drama.console import console
from drama.encoder import Encoder
from drama.errors import UserError
from drama.full_disk import FullDisk
from drama.hf import check_sums
from drama.sample import SAMPLE

TOLERANCE = 1e-4
NEEDED = ("onnx", "onnxruntime", "onnxscript")
PLAIN, INT8 = "onnx/model.onnx", "onnx/model_quint8.onnx"
# a protobuf file ends at 2 GB; what is larger lies beside it under the name that TEI downloads
EMBEDDED_BYTES = 1_800_000_000
_TRACED = (2, 7)  # texts and tokens of the example that is traced; the checks take others
_CHECKED = ((1,), (3, 2, 1), (40, 9), (130, 17, 129, 64, 2), (700, 300))  # lengths of batches


@dataclass(frozen=True)
class OnnxFacts:
    """What was measured of the written graphs.

    difference: the largest to our embeddings. cosine_mean, cosine_min: of the int8 graph's
    embeddings of sample texts with ours; None where it was not asked for.
    """

    difference: float
    cosine_mean: float | None = None
    cosine_min: float | None = None


class _Graph(nn.Module):
    """What is traced: mask, backbone, pooling, truncation, norm."""

    def __init__(self, backbone: Any, encoder: Encoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.causal = encoder.settings.attention == "causal"
        self.last = encoder.settings.pooling == "last"
        self.dim = encoder.dim

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        length = input_ids.shape[1]
        position_L = torch.arange(length, device=input_ids.device)
        seen_B1L = attention_mask.bool()[:, None, :]
        seen_BLL = seen_B1L.expand(-1, length, -1)
        if self.causal:
            seen_BLL = seen_BLL & (position_L[None, :] <= position_L[:, None])
        # finite: a row that sees nothing, of left padding, would else become NaN and spread
        mask_BLL = torch.where(seen_BLL, 0.0, torch.finfo(torch.float32).min)
        states_BLH = self.backbone(
            input_ids=input_ids, attention_mask=mask_BLL[:, None], use_cache=False
        ).last_hidden_state
        if self.last:
            last_B = (position_L * attention_mask).argmax(1)
            index_B1H = last_B[:, None, None].expand(-1, 1, states_BLH.shape[2])
            pooled_BH = states_BLH.gather(1, index_B1H)[:, 0]
        else:
            weight_BL1 = attention_mask[..., None].float()
            pooled_BH = (states_BLH * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1.0)
        return states_BLH, F.normalize(pooled_BH[:, : self.dim], dim=1)


def check_installed() -> None:
    """Whether graphs can be written.

    Raises:
        UserError: a package is missing.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--onnx needs {', '.join(missing)}; pip install 'drama-retriever[export]', or "
            f"pip install {' '.join(missing)}"
        )


def write_onnx(folder: Path, *, int8: bool = False) -> OnnxFacts:
    """Write the graphs of an exported folder into it, in float32, and check them.

    The float32 graph is held against our embeddings on batches of other sizes and lengths than the
    one that was traced, padded on the right.

    Args:
        int8: a second graph whose weights are uint8 and whose activations are quantised as they
            come; its cosines to ours are measured, on texts, and not judged.

    Raises:
        UserError: a package is missing, or the graph gives other embeddings than ours.
        OSError: no room for the second graph.
    """
    check_installed()
    import onnx_ir

    encoder = Encoder.from_pretrained(folder)
    path = folder / PLAIN
    path.parent.mkdir()
    large = sum(x.numel() * 4 for x in encoder.backbone.parameters()) > EMBEDDED_BYTES
    with _quiet():
        program = _traced(folder, encoder)
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # source lines, with the paths of this machine
        onnx_ir.save(program.model, path, external_data=f"{path.name}_data" if large else None)
        del program
    difference = _check(path, encoder)
    console.print(f"{PLAIN}: differs from our embeddings by at most {difference:.1e}")
    if not int8:
        return OnnxFacts(difference)
    # onnxruntime writes a copy first, and says nothing of a disk that fills up meanwhile
    disk = FullDisk()
    disk.check_room(folder, 2 * sum(x.stat().st_size for x in path.parent.iterdir()))
    if disk.found:
        raise OSError(errno.ENOSPC, "No space left for the graph of 8 bits", str(folder / INT8))
    with _quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # unsigned weights: signed ones overflow in the 16-bit sums of CPUs without VNNI
        quantize_dynamic(
            path,
            folder / INT8,
            per_channel=True,
            weight_type=QuantType.QUInt8,
            use_external_data_format=large,
        )
    rows = encoder.tokenize(SAMPLE, "document")
    cosine_B = (OnnxModel(folder / INT8)(rows) * encoder.embed(rows)).sum(1)
    facts = OnnxFacts(difference, float(cosine_B.mean()), float(cosine_B.min()))
    console.print(
        f"{INT8}: cosine with our embeddings {facts.cosine_mean:.4f} on average, "
        f"{facts.cosine_min:.4f} at least, on {len(rows)} texts"
    )
    return facts


def _traced(folder: Path, encoder: Encoder) -> Any:
    backbone = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    ids_BL = torch.ones(_TRACED, dtype=torch.int64)
    mask_BL = ids_BL.clone()
    mask_BL[0, 5:] = 0
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with torch.no_grad():
        return torch.onnx.export(
            _Graph(backbone, encoder).eval(),
            (ids_BL, mask_BL),
            dynamo=True,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state", "sentence_embedding"],
            dynamic_shapes=(axes, axes),
            verbose=False,
        )


class OnnxModel:
    """A written graph, open in onnxruntime."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.session: Any = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Embeddings [B, D] of token rows, padded on the right into one batch."""
        longest = max(map(len, rows))
        mask_BL = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        ids_BL = np.array([[*row, *[0] * (longest - len(row))] for row in rows])
        batch = {"input_ids": ids_BL, "attention_mask": mask_BL}
        found: np.ndarray = self.session.run(["sentence_embedding"], batch)[0]
        return found


def open_graph(folder: Path, encoder: Encoder) -> OnnxModel | None:
    """The float32 graph of a folder whose `encoder` this is, held against it on one text.

    None where the folder's list of hashes names none, so that graphs which others put there are
    never run, and without onnxruntime.

    Raises:
        UserError: the graph is damaged, or gives other embeddings than the model.
    """
    path = folder / PLAIN
    if not path.is_file() or importlib.util.find_spec("onnxruntime") is None:
        return None
    if PLAIN not in check_sums(folder, PLAIN):
        return None
    mend = f"export again, or remove {path.parent} to do without"
    try:
        model = OnnxModel(path)
        rows = encoder.tokenize(SAMPLE[:1], "query", min(64, encoder.max_tokens))
        difference = float(np.abs(model(rows) - encoder.embed(rows)).max())
    except Exception as error:  # onnxruntime's share no base of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: onnxruntime cannot run the graph: {reason}; {mend}") from error
    if not difference <= TOLERANCE:
        raise UserError(
            f"{path} gives other embeddings than the model, by {difference:.1e} (at most "
            f"{TOLERANCE:g}); {mend}"
        )
    return model


def _check(path: Path, encoder: Encoder) -> float:
    """The largest difference of the graph's embeddings to ours.

    Raises:
        UserError: above 1e-4, with the batch where.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = encoder.backbone.config.vocab_size
    model, worst = OnnxModel(path), 0.0
    for wanted in _CHECKED:
        lengths = [min(length, encoder.max_tokens) for length in wanted]
        rows = [
            torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths
        ]
        difference = float(np.abs(model(rows) - encoder.embed(rows)).max())
        if not difference <= TOLERANCE:
            raise UserError(
                f"{path.name} gives other embeddings than the model, by {difference:.1e} at "
                f"lengths {lengths} (at most {TOLERANCE:g}); nothing is written, report it with "
                "the versions of torch and onnxruntime"
            )
        worst = max(worst, difference)
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Around exporters that talk about what they skip."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
