"""Compile the attention kernels for GPUs that are not here; one JSON line each. Run without TRITON_INTERPRET.

usage: python compile_attention.py TARGET...   (such as sm_90; "sm_90 too": launches that others stand for)"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import aot
from aot_launches import HOPPER, MORE
from triton.compiler import ASTSource

from orthrus_kernels import attention_triton as a
from orthrus_kernels.commit import _commit_kernel
from orthrus_kernels.pages import PAGE

POINTERS = {"q", "k", "v", "k_cache", "v_cache", "out", "k_rows", "v_rows"}
TABLES = {"rows", "limits", "tiles", "slots", "segments", "items", "row_segments", "accepted", "start"}
TABLES |= {"arrivals", "count", "pages"}


def source_of(kernel, dtype: str, constants: dict) -> ASTSource:
    """What a launch compiles; pointers and strides divisible by 16."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in POINTERS:
            signature[name] = f"*{dtype}"
        elif name in TABLES:
            signature[name] = "*i32"
        elif name in ("acc", "stats"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if signature[name][0] == "*" or name.startswith("stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compiled_ptx(kernel, dtype: str, constants: dict, arch: str, **options) -> str:
    """The PTX of one kernel."""
    built, _ = aot.built_from(source_of(kernel, dtype, constants), aot.TARGETS[arch], options)
    return built.asm["ptx"]


def compiled(kernel, dtype: str, constants: dict, arch: str, **options) -> dict:
    """Registers, spilled bytes and shared memory of one kernel."""
    target = aot.TARGETS[arch]
    built, log = aot.built_from(source_of(kernel, dtype, constants), target, options)
    report = {"kernel": kernel.__name__, "arch": arch.removesuffix(" too"), "dtype": dtype, **options}
    report |= {name: constants.get(name) for name in ("D", "FOLDED", "FUSED")}
    report["shared"] = built.metadata.shared
    if target.backend == "cuda":
        ptx = built.asm["ptx"]
        report |= {"registers": aot.registers(log), "spilled": aot.spilled(log)}
        report |= {"wgmma": "wgmma.mma_async" in ptx, "pipelined": "cp.async" in ptx}
    return report


def main() -> None:
    """All of the launch table on sm_90, 16-bit head size 128 elsewhere."""
    for arch in sys.argv[1:]:
        if arch not in MORE:
            commit(arch)
        for (d, size), (folded, block, warps, stages) in a.LAUNCH.items():
            if arch not in HOPPER + MORE and (d, size) != (128, 2):
                continue
            dtype = "bf16" if size == 2 else "fp32"
            tall = a.TALL if size == 2 else 1
            # (kernel, tiles side by side, query heads and rows that the last program folds)
            jobs = [(a._partial_kernel, 1, fused) for fused in folds(arch, d, size)]
            jobs += [] if arch in MORE else [(a._whole_kernel, tall, None)]
            for kernel, height, fused in jobs:
                group, rows = 4, height * folded
                constants = {"GROUP": group, "TILE": rows // group, "FOLDED": rows, "D": d, "BLOCK_S": block}
                constants |= {"STAGES": stages, "PAGE": PAGE, "PDL": False}
                if fused is not None:
                    unroll = a._fused_unroll(fused, d, warps)
                    constants |= {"FUSED": fused, "UNROLL": unroll}
                    constants |= {} if fused else {"arrivals": None}
                how = {"num_warps": height * warps, "num_stages": stages}
                print(json.dumps(compiled(kernel, dtype, constants, arch, **how)), flush=True)
            if arch not in MORE:
                paths(arch, d, dtype)
                constants = {"D": d, "UNROLL": a.COMBINE_UNROLL, "PDL": False}
                line = compiled(a._combine_kernel, dtype, constants, arch, num_warps=1)
                print(json.dumps(line), flush=True)


def folds(arch: str, d: int, size: int) -> tuple[int, ...]:
    """Query heads and rows that the last program of a launch folds. The launch that folds most has most
    registers, and stands for the others but where most passes run."""
    if arch not in HOPPER + MORE:
        return (4,)
    if (d, size) == (128, 2):
        return (4,) if arch in MORE else (0, a.FUSED_HEADS)
    return (0,) if arch in MORE else (4,)


def paths(arch: str, d: int, dtype: str) -> None:
    """The kernel of path tiles."""
    folded, block, warps, _ = a.LAUNCH[d, 2 if dtype == "bf16" else 4]
    part = min(a.PATH_PART, folded)
    constants = {
        "D": d,
        "GROUP": 4,
        "TILE": folded // 4,
        "PLACES": folded // 4,
        "FOLDED": folded,
        "BLOCK_S": block,
        "PAGE": PAGE,
        "PDL": False,
    }
    constants |= {"STAGES": a.PATH_STAGES, "PART": part, "UNROLL": a._path_unroll(part, d, warps)}
    line = compiled(a._path_kernel, dtype, constants, arch, num_warps=warps)
    print(json.dumps(line), flush=True)


def commit(arch: str) -> None:
    print(
        json.dumps(
            compiled(_commit_kernel, "bf16", {"PAGE": PAGE, "D": 128, "BLOCK_D": 128}, arch, num_warps=1)
        )
    )


if __name__ == "__main__":
    main()
