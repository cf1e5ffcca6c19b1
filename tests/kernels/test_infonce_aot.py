"""Every block configuration of the InfoNCE kernels, compiled for each target without a GPU."""

from itertools import product

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


MODES = (kernels.EXP, kernels.STATISTICS, kernels.GRADIENT)


def signature(kernel, element: str) -> dict[str, str]:
    types = {
        f"{name}_ptr": f"*{type_}" for type_, names in POINTERS.items() for name in names.split()
    }
    types |= {f"{name}_ptr": f"*{element}" for name in "qke"}
    return {name: types.get(name, "i32") for name in kernel.arg_names if not name.isupper()}


def scores_report(config, target, element, num_prefixes, precision, mode, *, owners, even):
    """With ids and margin, which take registers too."""
    types = signature(kernels.scores_kernel, element)
    constants = {"EVEN": even, "HAS_IDS": True, "HAS_MARGIN": True, "HAS_OWNERS": owners}
    if num_prefixes == 1:  # Triton makes a constant of a 1
        del types["num_prefixes"]
        constants["num_prefixes"] = 1
    return aot.compile_report(
        kernels.scores_kernel,
        types,
        constants | config.constants() | {"MODE": mode, "PRECISION": precision},
        target,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=("q_stride", "k_stride"),
    )


# what a call has: owners of columns, and prefixes that are multiples of a block's width
PLAIN = [(False, True)]
EVERY = [(owners, even) for owners in (False, True) for even in (False, True)]


def check(config, target, element, num_prefixes, mode, *, owners, even):
    """No spills, shared memory within the limit, and tensor-core instructions of the target."""
    precision = "tf32x3" if element == "fp32" and target.startswith("sm") else "ieee"
    report = scores_report(
        config, target, element, num_prefixes, precision, mode, owners=owners, even=even
    )
    what = (config, mode, owners, even, report.registers, report.spilled)
    assert report.fits, what
    if target == "sm_90" and config.rows >= 64:
        assert "wgmma" in report.assembly, what
    if target == "sm_100" and config.rows >= 64:
        assert "tcgen05" in report.assembly, what
    if target == "gfx942":
        assert "v_mfma" in report.assembly, what


def check_finish(config, target, element, num_prefixes):
    report = aot.compile_report(
        kernels.finish_kernel,
        signature(kernels.finish_kernel, element),
        {"P": num_prefixes, "BLOCK_C": kernels.FINISH_ROWS, "BLOCK_N": config.columns},
        target,
        num_warps=8,
        num_stages=2,
    )
    assert report.fits, (config, report.registers, report.spilled)


@pytest.mark.parametrize("num_prefixes", [1, 5])
@pytest.mark.parametrize(
    ("target", "element"), [*((target, "bf16") for target in aot.TARGETS), ("sm_90", "fp32")]
)
def test_the_first_choice_fits(target, element, num_prefixes):
    """Of plain calls, and of those with everything."""
    size = 4 if element == "fp32" else 2
    for plain in (True, False):
        config = kernels.candidates(target, size, num_prefixes, plain=plain)[0]
        call = (config, target, element, num_prefixes)
        check(*call, kernels.EXP, owners=not plain, even=plain)
    check_finish(*call)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "every"])
@pytest.mark.parametrize("num_prefixes", [1, 5])
@pytest.mark.parametrize("element", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_configuration_in_use_fits(target, element, num_prefixes, plain):
    size = 4 if element == "fp32" else 2
    for config in kernels.candidates(target, size, num_prefixes, plain=plain):
        call = (config, target, element, num_prefixes)
        for (owners, even), mode in product(PLAIN if plain else EVERY, MODES):
            check(*call, mode, owners=owners, even=even)
        check_finish(*call)


def test_a_gpu_that_was_not_checked_gets_the_smallest_blocks():
    smallest = kernels.candidates("sm_86", 2, 1, plain=True)
    assert len(smallest) == 1
    for target in aot.TARGETS:
        for other in kernels.candidates(target, 2, 1, plain=True):
            assert smallest[0].rows * smallest[0].columns <= other.rows * other.columns
