"""The attention and commit kernels compile for GPUs that are not here, without spilling on sm_90."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from compiled import SLOW, USUAL, compiled_by
from tree_copy import ROOT

from tools import check_kernel, trees


@pytest.fixture(scope="module")
def compiled(triton_cache):
    return compiled_by("compile_attention.py", triton_cache, *USUAL)


def test_every_kernel_compiles_for_every_target(compiled):
    check_targets(compiled, USUAL)


@pytest.mark.slow
def test_every_kernel_compiles_for_their_relatives(triton_cache):
    check_targets(compiled_by("compile_attention.py", triton_cache, *SLOW), SLOW)


@pytest.mark.slow
def test_every_launch_on_hopper(triton_cache):
    """Those that others stand for above too."""
    compiled = compiled_by("compile_attention.py", triton_cache, "sm_90", "sm_90 too")
    check_hopper(compiled)
    check_dots(compiled)
    folds = Counter(line["FUSED"] for line in compiled if line["kernel"] == "_partial_kernel")
    assert folds == {0: 4, 4: 4, 16: 1}


def check_targets(compiled, targets):
    kernels = {line["kernel"] for line in compiled}
    assert len(kernels) == 5
    assert {(line["kernel"], line["arch"]) for line in compiled} == {(k, t) for k in kernels for t in targets}


def test_nothing_spills_on_hopper(compiled):
    check_hopper(compiled)


def check_hopper(compiled):
    """Nothing spills in any dtype, head size and tile height."""
    hopper = [line for line in compiled if line["arch"] == "sm_90"]
    assert {line["dtype"] for line in hopper} == {"bf16", "fp32"}
    assert {64, 128} <= {line["FOLDED"] for line in hopper}
    assert [line for line in hopper if line["spilled"]] == []


def test_dots_run_on_hopper_tensor_cores_from_pipelined_copies(compiled):
    check_dots(compiled)


def check_dots(compiled):
    for line in compiled:
        if line["arch"] == "sm_90" and line["dtype"] == "bf16" and line["FOLDED"]:
            assert line["wgmma"] and line["pipelined"] == ("num_stages" in line), line


def test_check_kernel_shows_them_as_they_are_here(compiled, triton_cache):
    """Of each operation that has some of them, every launch, with the same figures; from Triton's cache, so
    without those that others stand for."""
    mine = {line["kernel"] for line in compiled}
    asked = {op: sorted(mine & {*of.kernels}) for op, of in check_kernel.operations().items()}
    asked = {op: kernels for op, kernels in asked.items() if kernels}
    code = "import json, sys; from tools import compile_op; compile_op.compile_attention.MORE = ();"
    code += "[*map(compile_op.main, json.loads(sys.argv[1]))]"
    env = trees.environment(ROOT) | {"TRITON_CACHE_DIR": str(triton_cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, json.dumps([*asked.values()])]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    figures = Counter((line["kernel"], line["registers"], line["shared"]) for line in found)
    hopper = [line for line in compiled if line["arch"] == "sm_90"]
    want = Counter((line["kernel"], line["registers"], line["shared"]) for line in hopper)
    assert {*asked} == {"attention", "commit"} and want <= figures
