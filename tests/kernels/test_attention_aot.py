"""The attention and commit kernels compile for GPUs that are not here, without spilling on sm_90."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
TARGETS = ("80", "89", "90", "100", "120", "gfx942")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HELPERS / "compile_attention.py", *TARGETS]
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert said.returncode == 0, said.stderr[-3000:]
    return [json.loads(line) for line in said.stdout.splitlines()]


def test_every_kernel_compiles_for_every_target(compiled):
    kernels = {line["kernel"] for line in compiled}
    assert len(kernels) == 4
    assert {(line["kernel"], line["arch"]) for line in compiled} == {(k, t) for k in kernels for t in TARGETS}


def test_nothing_spills_on_hopper(compiled):
    """In any dtype, head size and tile height."""
    hopper = [line for line in compiled if line["arch"] == "90"]
    assert {line["dtype"] for line in hopper} == {"bf16", "fp32"}
    assert {64, 128} <= {line["FOLDED"] for line in hopper}
    assert [line for line in hopper if line["spilled"]] == []


def test_dots_run_on_hopper_tensor_cores_from_pipelined_copies(compiled):
    for line in compiled:
        if line["arch"] == "90" and line["dtype"] == "bf16" and "num_stages" in line:
            assert line["wgmma"] and line["pipelined"], line
