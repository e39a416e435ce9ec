"""The attention and commit kernels compile for GPUs that are not here, without spilling on sm_90."""

import pytest
from compiled import SLOW, USUAL, compiled_by


@pytest.fixture(scope="module")
def compiled(triton_cache):
    return compiled_by("compile_attention.py", triton_cache, *USUAL)


def test_every_kernel_compiles_for_every_target(compiled):
    check_targets(compiled, USUAL)


@pytest.mark.slow
def test_every_kernel_compiles_for_their_relatives(triton_cache):
    check_targets(compiled_by("compile_attention.py", triton_cache, *SLOW), SLOW)


def check_targets(compiled, targets):
    kernels = {line["kernel"] for line in compiled}
    assert len(kernels) == 5
    assert {(line["kernel"], line["arch"]) for line in compiled} == {(k, t) for k in kernels for t in targets}


def test_nothing_spills_on_hopper(compiled):
    """In any dtype, head size and tile height."""
    hopper = [line for line in compiled if line["arch"] == "sm_90"]
    assert {line["dtype"] for line in hopper} == {"bf16", "fp32"}
    assert {64, 128} <= {line["FOLDED"] for line in hopper}
    assert [line for line in hopper if line["spilled"]] == []


def test_dots_run_on_hopper_tensor_cores_from_pipelined_copies(compiled):
    for line in compiled:
        if line["arch"] == "sm_90" and line["dtype"] == "bf16" and line["FOLDED"]:
            assert line["wgmma"] and line["pipelined"] == ("num_stages" in line), line
