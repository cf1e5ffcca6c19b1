"""Compile Triton kernels ahead of time, without a GPU, and read what the compiler says of them.

    report = compile_report(kernel, signature, constants, "sm_90", num_warps=8, num_stages=3)
    assert report.fits and "wgmma" in report.assembly

Shared memory comes from Triton, registers and spills from `ptxas -v` (NVIDIA) or from the kernel's
metadata (AMD). A configuration that does not fit would fail at run time or crawl; the lists of
configurations beside the kernels hold only what fits, and the tests compile each of them.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# what one block may use, opt-in maximum (CUDA C programming guide, table of compute capabilities;
# AMD CDNA3 ISA: 64 KiB of LDS)
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TARGETS = tuple(SHARED_LIMIT)


@dataclass(frozen=True)
class Report:
    """What the compiler says of one kernel on one target; bytes a block, registers a thread."""

    target: str
    shared_bytes: int
    registers: int
    spilled: int
    assembly: str

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared_bytes <= SHARED_LIMIT[self.target]


def compile_report(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    *,
    num_warps: int,
    num_stages: int,
    aligned: Collection[str] = (),
) -> Report:
    """Compile `kernel` for `target` (one of `TARGETS`).

    Args:
        signature: Triton type of each argument that is no constant, such as "*bf16" or "i32".
        constants: value of each `tl.constexpr` argument.
        aligned: integer arguments that are multiples of 16, as Triton sees for itself at run time;
            pointers always are. Row strides decide whether loads can be pipelined at all.
    """
    arch = target if target.startswith("gfx") else int(target.removeprefix("sm_"))
    gpu = GPUTarget("hip", arch, 64) if target.startswith("gfx") else GPUTarget("cuda", arch, 32)
    types = dict(signature) | dict.fromkeys(constants, "constexpr")
    ordered = {name: types[name] for name in kernel.arg_names}
    hints = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, type_) in enumerate(ordered.items())
        if type_.startswith("*") or name in aligned
    }
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # a cached binary comes without the report
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            ASTSource(kernel, signature=ordered, constexprs=dict(constants), attrs=hints),
            target=gpu,
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            sum(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Report(target, shared, registers, spilled, text)
    text = compiled.asm["ptx"]
    used = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill", log.getvalue())
    assert used is not None, f"ptxas did not report: {log.getvalue()}"
    return Report(target, shared, int(used[1]), sum(map(int, spills)), text)
