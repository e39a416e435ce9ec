"""Compile a few kernels for sm_90 and print how each loads and multiplies, one JSON line a kernel. Run by
test_compiled_options.py without TRITON_INTERPRET."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import aot
from aot_launches import meta, module
from compile_attention import compiled_ptx

from orthrus_kernels import Weight, tables
from orthrus_kernels import attention_triton as attention


def report(name: str, ptx: str) -> None:
    """Loads of global memory by opcode, and whether fp32 products are fused into sums."""
    loads = Counter(re.findall(r"\bld\.(?:relaxed\.|volatile\.)?global\S*", ptx))
    print(json.dumps({"kernel": name, "loads": loads, "fma": "fma.rn.f32" in ptx}), flush=True)


def launched(name: str, owner, kernel: str, launch) -> None:
    with aot.recorded(owner, kernel) as recorder:
        launch()
    built, _, _ = aot.built_for(recorder.kernel, recorder.launches[0], aot.TARGETS["sm_90"])
    report(name, built.asm["ptx"])


def main() -> None:
    norm, qk, linear = module("rms_norm"), module("qk_norm_rope"), module("linear")
    x, w, cos = meta(4, 1024), meta(1024), meta(4, 32, dtype=aot.torch.float32)
    launched("rms_norm", norm, "_rms_norm_kernel", lambda: norm.rms_norm_triton(x, w, 1e-6))
    qkv, w_d = meta(4, 6, 64), meta(64)
    launched(
        "qk_norm_rope", qk, "_qk_norm_rope_kernel",
        lambda: qk.qk_norm_rope_triton(qkv, 2, w_d, w_d, cos, cos, 1e-6),
    )  # fmt: skip
    entry = tables.LinearEntry(32, 4, (tables.LinearTile(None, 16, 32, True, 4, 2),))
    space = linear.Workspace.new(aot.torch.device("meta"), 1 << 20, 1 << 10)
    weight = Weight(meta(64, 256))
    launched(
        "linear", linear, "_linear_kernel",
        lambda: linear.linear_triton(meta(8, 256), weight, entry=entry, space=space),
    )  # fmt: skip
    constants = {"D": 64, "UNROLL": 2, "PDL": False}
    report("fold", compiled_ptx(attention._combine_kernel, "bf16", constants, "sm_90", num_warps=1))


if __name__ == "__main__":
    main()
