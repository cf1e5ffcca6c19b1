"""Every block configuration of the InfoNCE kernels, compiled for each target without a GPU."""

import pytest

pytest.importorskip("triton")
aot = pytest.importorskip("drama.kernels.aot")
kernels = pytest.importorskip("drama.kernels.infonce_kernels")

POINTERS = {
    "fp32": "ia ib positive_z limit top sum pull column_top column_sum column_pull row_lse "
    "column_lse positive_g row_factor column_factor",
    "i64": "positive row_id column_id owner",
    "i32": "masked widths",
}


def signature(kernel, element: str) -> dict[str, str]:
    types = {
        f"{name}_ptr": f"*{type_}" for type_, names in POINTERS.items() for name in names.split()
    }
    types |= {f"{name}_ptr": f"*{element}" for name in "qke"}
    return {name: types.get(name, "i32") for name in kernel.arg_names if not name.isupper()}


@pytest.mark.parametrize("num_prefixes", [1, 5])
@pytest.mark.parametrize("element", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_configuration_in_use_fits(target, element, num_prefixes):
    """No spills, shared memory within the limit, and tensor-core instructions of the target."""
    size = 4 if element == "fp32" else 2
    precision = "tf32x3" if element == "fp32" and target.startswith("sm") else "ieee"
    types = signature(kernels.scores_kernel, element)
    constants = {"EVEN": True, "HAS_IDS": True, "HAS_MARGIN": True, "HAS_OWNERS": False}
    if num_prefixes == 1:  # Triton makes a constant of a 1
        del types["num_prefixes"]
        constants["num_prefixes"] = 1
    for config in kernels.candidates(target, size, num_prefixes):
        for mode in (kernels.EXP, kernels.STATISTICS, kernels.GRADIENT):
            report = aot.compile_report(
                kernels.scores_kernel,
                types,
                constants | config.constants() | {"MODE": mode, "PRECISION": precision},
                target,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                aligned=("q_stride", "k_stride"),
            )
            assert report.fits, (config, mode, report.registers, report.spilled)
            if target == "sm_90" and config.rows >= 64:
                assert "wgmma" in report.assembly
            if target == "sm_100" and config.rows >= 64:
                assert "tcgen05" in report.assembly
            if target == "gfx942":
                assert "v_mfma" in report.assembly
        report = aot.compile_report(
            kernels.finish_kernel,
            signature(kernels.finish_kernel, element),
            {"P": num_prefixes, "BLOCK_C": kernels.FINISH_ROWS, "BLOCK_N": config.columns},
            target,
            num_warps=8,
            num_stages=2,
        )
        assert report.fits, (config, report.registers, report.spilled)


def test_a_gpu_that_was_not_checked_gets_the_smallest_blocks():
    smallest = kernels.candidates("sm_86", 2, 1)
    assert len(smallest) == 1
    for target in aot.TARGETS:
        for other in kernels.candidates(target, 2, 1):
            assert smallest[0].rows * smallest[0].columns <= other.rows * other.columns
