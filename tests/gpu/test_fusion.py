"""Liger-Kernel's kernels and Inductor's in the blocks, on a GPU, in float32 and bf16."""

from pathlib import Path

import pytest
import torch

from drama import fusion
from drama.blocks import Execution
from drama.data.packing import pack
from drama.encoder import Encoder
from drama.testing import tiny_llama

pytestmark = pytest.mark.gpu
ROWS = [[5 + i % 200 for i in range(n)] for n in (3, 9, 9, 31)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    encoder.train().zero_grad()
    out_BD = encoder(pack(ROWS).to("cuda"))
    (out_BD * torch.linspace(-1, 1, out_BD.numel(), device="cuda").view_as(out_BD)).sum().backward()
    return {"vectors": out_BD.detach()} | {
        name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("fuse", ["liger", "compile"])
def test_fused_blocks_give_the_same_gradients(
    tmp_path: Path, dtype: torch.dtype, fuse: str
) -> None:
    if fuse == "liger" and not fusion.has_liger():
        pytest.skip("liger-kernel is not installed")
    encoder = Encoder.from_pretrained(tiny_llama(tmp_path / "model"), dtype=dtype, device="cuda")
    want = gradients(encoder)
    if fuse == "liger":
        fusion.use_liger(encoder.backbone, "cuda")
    else:
        torch._dynamo.reset()
        encoder.execution = Execution(compiled=True)
    for name, tensor in gradients(encoder).items():
        assert (tensor - want[name]).norm() <= TOLERANCE[dtype] * want[name].norm(), name
