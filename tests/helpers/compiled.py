"""What a script of this folder compiles for GPUs that are not here, in a process without TRITON_INTERPRET."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orthrus_kernels

# GPUs that every kernel is compiled for. Those of SLOW, which multiply by mma.sync, `make test-slow` alone
# compiles for: they take a minute, and all but the instruction is what USUAL has.
USUAL, SLOW = ("sm_90", "sm_100", "gfx942"), ("sm_80", "sm_89", "sm_120")


def compiled_by(script: str, cache: Path, *arguments: str) -> list[dict[str, Any]]:
    """The lines of JSON that the script prints. cache: Triton's; what lies there is not compiled again, and
    Triton finds it by everything that goes into a compilation."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(orthrus_kernels.__file__).parent.parent)
    env |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    if said.returncode:  # no assertion: a planted bug that does not compile has not been caught by a value
        raise RuntimeError(said.stderr[-3000:])
    return [json.loads(line) for line in said.stdout.splitlines()]
