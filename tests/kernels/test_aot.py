"""Every kernel compiles for every target without a GPU, and none spills on sm_90."""

import re
import sys

import pytest
from compiled import SLOW, USUAL, compiled_by

from orthrus_kernels import (
    attention_gluon_kernels,
    attention_kernels,
    linear_gluon,
    linear_gluon_codes,
    linear_gluon_wide,
)

ELSEWHERE = (
    attention_gluon_kernels, attention_kernels, linear_gluon, linear_gluon_codes, linear_gluon_wide,
)  # fmt: skip


@pytest.fixture(scope="module")
def compiled(triton_cache):
    return compiled_by("aot.py", triton_cache, *USUAL)


@pytest.mark.slow
def test_everything_compiles_for_their_relatives(triton_cache):
    check_targets(compiled_by("aot.py", triton_cache, *SLOW), SLOW)


@pytest.mark.slow
def test_every_launch_on_hopper(triton_cache):
    """Those that others stand for above too."""
    compiled = compiled_by("aot.py", triton_cache, "sm_90", "sm_90 too")
    assert not [line for line in compiled if "error" in line or line["spill_bytes"]]
    check_tiles(compiled)
    check_fused(compiled)
    assert check_two_codes(compiled) == 15
    assert len([line for line in compiled if line["kernel"] == "linear_kernel"]) > 50


def test_every_kernel_meets_every_target(compiled):
    check_targets(compiled, USUAL)


def check_targets(compiled, targets):
    """Every kernel was compiled for each, without an error. Those of attention are in test_attention_aot.py,
    those in Gluon, for Hopper alone, in test_gluon_aot.py and test_attention_gluon_aot.py."""
    modules = [m for name, m in sys.modules.items() if name.startswith("orthrus_kernels.")]
    kernels = {name.strip("_") for m in modules for name in vars(m) if name.endswith("_kernel")}
    kernels -= {name.strip("_") for of in ELSEWHERE for name in vars(of)}
    assert {line["kernel"] for line in compiled} == kernels
    assert not [line for line in compiled if "error" in line]
    for kernel in kernels:
        found = {line["target"] for line in compiled if line["kernel"] == kernel}
        assert found == set(targets), kernel


def test_nothing_spills_on_hopper(compiled):
    assert not [line for line in compiled if line["target"] == "sm_90" and line["spill_bytes"]]


def test_linear_uses_tensor_cores_and_wide_copies(compiled):
    check_tiles(compiled)


def check_tiles(compiled):
    """16-bit weights through wgmma on Hopper, two weights there; 16 bytes a copy, or tiles by descriptors
    where the table says so, in no more shared memory than a CTA has."""
    lines = [line for line in compiled if line["kernel"] == "linear_kernel" and "float32" not in line["case"]]
    hopper = [line for line in lines if line["target"] == "sm_90"]
    by_tma = [line for line in hopper if "tma=True" in line["case"]]
    assert by_tma and all(line["tma"] and line["shared"] <= 227 * 1024 for line in by_tma)
    assert all(line["cp_async_16"] for line in hopper if "tma=True" not in line["case"])
    # wgmma takes 64 rows of the weight at least; tiles of 32 run on mma.sync, faster for the smallest weights
    assert all(line["wgmma"] for line in hopper if "block_n=32" not in line["case"])


def test_linear_swiglu_sums_as_linear_does(compiled):
    check_fused(compiled)


def check_fused(compiled):
    """On wgmma in 16 bits, by descriptors where the tile says so; in fp32 by multiply-adds, though it is
    compiled without contraction."""
    lines = [line for line in compiled if line["kernel"] == "linear_swiglu_kernel" and not coded(line)]
    lines = [line for line in lines if "W8A8" not in line["case"]]
    hopper = [line for line in lines if line["target"] == "sm_90"]
    for line in hopper:
        assert line["tma" if "tma=True" in line["case"] else "cp_async_16"], line
        assert line["fma" if "float32" in line["case"] else "wgmma"], line
        assert line["shared"] <= 227 * 1024, line
    others = [line for line in lines if line["target"] != "gfx942" and "float32" not in line["case"]]
    assert others and not any(line["fma"] for line in others)  # nothing was contracted


def coded(line):
    """Whether the weight of a launch is quantised."""
    return "fp8" in line["case"] or "int4" in line["case"]


def test_codes_reach_the_tensor_cores_from_registers(compiled):
    """On Hopper the words come by ldmatrix and are widened in registers, by multiply-adds of pairs and no
    conversion. Nothing is loaded when it is used: factors are copied ahead as words are. Groups are
    folded by one multiply-add with contraction (linear) and without (fused)."""
    lines = [line for line in compiled if coded(line)]
    hopper = [line for line in lines if line["target"] == "sm_90"]
    assert {line["kernel"] for line in hopper} == {"linear_kernel", "linear_swiglu_kernel"}
    for line in hopper:
        assert line["wgmma_from_registers"] and line["ldmatrix"] and line["cp_async_16"], line
        assert line["loads"] == 0, line
        assert line["shared"] <= 227 * 1024, line
    for line in lines:
        if line["target"] != "gfx942":
            assert line["fma"] and line["fma_bf16x2"], line
            assert not [
                to for to in line["conversions"] if not re.fullmatch(r"cvt.rn.bf16(x2)?.f32;?", to)
            ], line


def test_two_codes_are_multiplied_as_they_are(compiled):
    assert check_two_codes(compiled) == 6


def check_two_codes(compiled):
    """W8A8 in every tile of its table: wgmma of two e4m3 from shared memory, nothing loaded when it is used,
    nothing converted but y, one multiply-add a fold. Any other instruction would have other bits. Returns the
    number of launches."""
    lines = [line for line in compiled if "W8A8" in line["case"]]
    assert {line["kernel"] for line in lines} == {"linear_kernel", "linear_swiglu_kernel"}
    for line in lines:
        assert line["wgmma_e4m3"] and not line["mma"] and not line["wgmma_from_registers"], line
        assert line["cp_async_16"] and line["fma"] and not line["loads"], line
        assert all(re.fullmatch(r"cvt.rn.bf16(x2)?.f32;?", to) for to in line["conversions"]), line
        assert line["shared"] <= 227 * 1024 and not line["spill_bytes"], line
    return len(lines)


def test_a_word_is_widened_by_itself(compiled):
    """The assembly takes one word at a time: a thread of a thin tile has one alone, so that of two words the
    second would be anything."""
    lines = [line for line in compiled if coded(line) and line["target"] != "gfx942"]
    assert lines and all(line["packed"] == ["1"] for line in lines)


def test_dependent_launches_touch_only_the_weights_before_they_wait(compiled):
    """What another kernel may be writing is read after griddepcontrol.wait; a prefetch to L2 may precede."""
    by_pdl = [line for line in compiled if line["case"].startswith("pdl ")]
    assert {line["target"] for line in by_pdl} == {"sm_90", "sm_100"}
    assert all(line["before_wait"] == ["prefetch.global.L2"] for line in by_pdl)
    others = [line for line in compiled if line["target"] != "gfx942" and line not in by_pdl]
    assert all(line["before_wait"] is None for line in others)
