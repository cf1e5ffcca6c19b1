"""The InfoNCE kernels, compiled for each target without a GPU, with every mask and with none."""

from itertools import product

import pytest

pytest.importorskip("triton")
aot = pytest.importorskip("drama.kernels.aot")
kernels = pytest.importorskip("drama.kernels.infonce_kernels")

TYPES = {"positive": "*i64", "row_id": "*i64", "column_id": "*i64", "owner": "*i64"}
TYPES |= {"num_masked": "*i64", "masked": "*i32"}
MASKS = ("HAS_IDS", "HAS_OWNERS", "HAS_MARGIN")
# arguments that are None without the flag
ABSENT = {
    "HAS_IDS": ("row_id_ptr", "column_id_ptr"),
    "HAS_OWNERS": ("owner_ptr",),
    "HAS_MARGIN": ("limit_ptr",),
    "HAS_COLUMNS": ("column_top_ptr", "column_sum_ptr", "column_lse_ptr"),
    "HAS_FACTOR": ("factor_ptr",),
    "HAS_MASKED": ("masked_ptr",),
}
TILE = {"BLOCK_C": kernels.BLOCK_C, "BLOCK_N": kernels.BLOCK_N}
ROWS = {"BLOCK_R": kernels.BLOCK_R, "BLOCK_D": kernels.BLOCK_D}


def report(kernel, target, constants, num_warps, *, vectors="*bf16", gradient="*bf16"):
    """vectors, gradient: types of q, k and x, and of h and out."""
    types = {f"{name}_ptr": type_ for name, type_ in TYPES.items()}
    types |= dict.fromkeys(("q_ptr", "k_ptr", "x_ptr"), vectors)
    types |= dict.fromkeys(("h_ptr", "out_ptr"), gradient)
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if not name.isupper()
    }
    constants = dict(constants)
    for flag, names in ABSENT.items():
        if not constants.get(flag, True):
            for name in set(names) & set(signature):
                del signature[name]
                constants[name] = None
    strides = [name for name in signature if name.endswith("stride")]
    return aot.compile_report(
        kernel, signature, constants, target, num_warps=num_warps, num_stages=3, aligned=strides
    )


def check_tiles(target, element, masks, columns):
    """A mask by ids counts masked columns too, which only some calls do."""
    flags = dict.fromkeys(MASKS, masks) | {"HAS_COLUMNS": columns}
    for kernel in (kernels.statistics_kernel, kernels.gradient_kernel):
        found = report(kernel, target, flags | TILE, kernels.NUM_WARPS, gradient=element)
        assert found.fits, (kernel, flags, found.registers, found.spilled)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_tiles_of_scores_fit(target):
    for masks, columns in product((False, True), repeat=2):
        check_tiles(target, "*bf16", masks, columns)


@pytest.mark.slow
@pytest.mark.parametrize("element", ["*fp16", "*fp32"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_tiles_of_other_types_fit(target, element):
    for masks, columns in product((False, True), repeat=2):
        check_tiles(target, element, masks, columns)


@pytest.mark.parametrize("vectors", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_over_rows_fit(target, vectors):
    eps = ROWS | {"EPS": 1e-12}
    calls = [
        (kernels.losses_kernel, {"HAS_MASKED": True, "BLOCK_T": kernels.BLOCK_T}),
        (kernels.inverse_norms_kernel, eps),
        (kernels.positives_kernel, ROWS),
        (kernels.tangent_kernel, eps | {"HAS_FACTOR": False, "ADD": False}),
        (kernels.tangent_kernel, eps | {"HAS_FACTOR": True, "ADD": True}),
    ]
    for kernel, constants in calls:
        # what is added to is float32, and so is what comes of fp16
        gradient = "*fp32" if constants.get("ADD") or vectors == "*fp16" else vectors
        found = report(kernel, target, constants, 4, vectors=vectors, gradient=gradient)
        assert found.fits, (kernel, constants, found.registers, found.spilled)
