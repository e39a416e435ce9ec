"""Compile attention in Gluon for sm_90, beside Triton's kernel; one JSON line each. Run by
test_attention_gluon_aot.py in a process without TRITON_INTERPRET: `python
tests/helpers/compile_attention_gluon.py`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import aot  # noqa: E402
import torch  # noqa: E402
from aot_launches import meta, module  # noqa: E402

from orthrus_kernels import PassShape  # noqa: E402
from orthrus_kernels.pass_tables import PassTables  # noqa: E402

HOPPER, META = aot.TARGETS["sm_90"], torch.device("meta")
_GLOBAL = re.compile(r"\b(?:ld|st|atom|red)\.(?:\w+\.)*?global|cp\.async")
_LAYOUT = re.compile(r"^(#\w+) = (#ttg\.nvidia_mma<.*>)", re.M)
# results of sums and maxima, of products, and the operand of products in registers
_SUM = re.compile(r"\}\) : \((tensor<[^()]*>)\) ->")
_DOT = re.compile(r"ttng\.warp_group_dot [^\n]*\} : (\S.*?) \* .*? -> (tensor<.*?>) loc")


def launched(op, kernel: str, heads: int, whole: bool):
    """The kernel and its arguments in a pass of 8 key heads; nobody reads the tables."""
    shape, tall = PassShape(64, 64, 64, 8, 1), kernel == "_attention_gluon_kernel"
    height = 128 * 8 // heads if tall else op.tile_rows(heads, 8, 128, torch.bfloat16, whole)
    tables = PassTables.new(shape, 2048, height, whole, META)
    qkv, cache, pages = meta(64, heads + 16, 128), meta(32, 8, 64, 128), meta(1, 1, dtype=torch.int32)
    q, k, v = qkv.split([heads, 8, 8], 1)
    with aot.recorded(op, kernel) as recorder:
        run = op.attention_gluon if tall else op.attention_triton
        run(q, k, v, cache, cache, pages, tables, 1.0, pdl=True)
    (arguments,) = recorder.launches
    return recorder.kernel, arguments


def arithmetic(ttgir: str) -> list[str]:
    """What a row's bits follow from: the layouts that are summed over and that products have."""
    layouts = dict(_LAYOUT.findall(ttgir))
    found = {f"sum {of}" for of in _SUM.findall(ttgir)}
    for left, result in _DOT.findall(ttgir):
        found.add(f"products {result}")
        if "#ttg.dot_op" in left and "64x64" in left:
            found.add(f"probabilities {left}")
    return sorted(re.sub(r"#mma\d*", lambda name: layouts[name[0]], line) for line in found)


def order(sass: str) -> list[str]:
    """Products, exponentials and waits for products, in order, runs of one kind as one."""
    names = {"MUFU.EX2": "exp", "HGMMA.64x64x16": "scores", "HGMMA.64x128x16": "values", "DEPBAR": "wait"}
    found = re.findall(r"MUFU\.EX2|HGMMA\.64x\d+x16|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d", sass)
    steps = [next(said for name, said in names.items() if name in of) for of in found]
    steps = [said + of[-1] if said == "wait" else said for said, of in zip(steps, found, strict=True)]
    return [step for i, step in enumerate(steps) if i == 0 or step != steps[i - 1]]


def before_wait(ptx: str) -> list[str]:
    """What touches global memory before the kernel waits for the grid in front: the first warps before their
    wait, the others before the barrier that the first ones reach behind it."""
    head, _, rest = ptx.partition("griddepcontrol.wait")
    first = re.search(r"bra\.uni\s+(\$L__BB\d+_\d+)", head)
    workers = ptx.partition(f"\n{first[1]}:")[2].partition("barrier.sync")[0]
    assert rest and workers, "a wait, and warps that start behind it"
    return _GLOBAL.findall(head) + _GLOBAL.findall(workers)


def gluon_lines() -> Iterator[dict]:
    """Both forms, two numbers of heads."""
    for heads, whole in ((8, False), (32, True)):
        kernel, arguments = launched(module("attention_gluon"), "_attention_gluon_kernel", heads, whole)
        built, log, _ = aot.built_for(kernel, arguments, HOPPER)
        (sass,) = aot.disassembled([built.asm["cubin"]])
        yield {
            "kernel": "gluon", "heads": heads, "whole": whole, "arithmetic": arithmetic(built.asm["ttgir"]),
            "warnings": re.findall(r"\(C\d+\)[^\n]*", log), "order": order(sass),
            **aot.described(built, log, HOPPER), "before_wait": before_wait(built.asm["ptx"]),
        }  # fmt: skip


def main() -> None:
    for line in gluon_lines():
        print(json.dumps(line), flush=True)
    kernel, arguments = launched(module("attention_triton"), "_partial_kernel", 32, False)
    built, _, _ = aot.built_for(kernel, arguments, HOPPER)
    print(json.dumps({"kernel": "triton", "arithmetic": arithmetic(built.asm["ttgir"])}), flush=True)


if __name__ == "__main__":
    main()
